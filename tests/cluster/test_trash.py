"""The trash as a user meets it: at a mount, by the commands and in Python."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fs3
from fs3.testing.cluster import LocalCluster
from tests.cluster.command import fs3_command
from tests.cluster.mounts import mounted


@pytest.fixture
def mount(shared_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mount of the module's cluster, which is the default one of commands."""
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    with mounted(shared_cluster, tmp_path / "m") as path:
        yield path


def listed(*arguments: str) -> list[str]:
    return [entry["path"] for entry in json.loads(fs3_command("trash", "ls", "--json", *arguments).stdout)]


def test_a_tree_removed_at_a_mount_comes_back_as_it_was(mount: Path) -> None:
    name = f"t{os.urandom(4).hex()}"
    top = mount / name
    (top / "a" / "b").mkdir(parents=True)
    contents = {f"a/{i}": os.urandom(3000 * i) for i in range(5)} | {"a/b/deep": b"deep", "plain": b"p"}
    for path, content in contents.items():
        (top / path).write_bytes(content)
    for directory in ("", "a", "a/b"):
        fs3_command("trash", "on", "--keep", "2h", f"/{name}/{directory}")
    assert "2h" in fs3_command("trash", "get", f"/{name}/a").stdout
    subprocess.run(["rm", "-r", str(top / "a")], check=True)
    (top / "plain").unlink()
    assert not (top / "a").exists()
    assert set(listed(f"/{name}")) == {f"/{name}/{path}" for path in [*contents, "a", "a/b"]}
    restored = fs3_command("trash", "restore", f"/{name}/a").stdout.split()
    assert set(restored) == {f"/{name}/{path}" for path in [*contents, "a", "a/b"] if path != "plain"}
    fs3_command("trash", "restore", f"/{name}/plain", "--to", f"/{name}/again")
    for path, content in contents.items():
        assert (top / path.replace("plain", "again")).read_bytes() == content
    assert listed(f"/{name}") == []


def test_the_latest_of_several_comes_back_and_the_others_stay(mount: Path) -> None:
    name = f"t{os.urandom(4).hex()}"
    (mount / name).mkdir()
    fs3_command("trash", "on", f"/{name}")
    for content in ("first", "second"):
        (mount / name / "f").write_text(content)
        (mount / name / "f").unlink()
    fs3_command("trash", "restore", f"/{name}/f")
    assert (mount / name / "f").read_text() == "second"
    taken = fs3_command("trash", "restore", f"/{name}/f", check=False)
    assert taken.returncode == 1
    assert "restore it to another path" in taken.stderr
    fs3_command("trash", "restore", f"/{name}/f", "--to", f"/{name}/g")
    assert (mount / name / "g").read_text() == "first"
    missing = fs3_command("trash", "restore", f"/{name}/none", check=False)
    assert missing.returncode == 1
    assert "fs3 trash ls" in missing.stderr


def test_purging_and_skipping_the_trash_remove_for_good(mount: Path, shared_cluster: LocalCluster) -> None:
    name = f"t{os.urandom(4).hex()}"
    (mount / name / "d").mkdir(parents=True)
    fs3_command("trash", "on", f"/{name}")
    for leaf in ("one", "two", "three"):
        (mount / name / leaf).write_text(leaf)
    fs3_command("rm", "--skip-trash", f"/{name}/one")
    fs3_command("rm", "-r", "--skip-trash", f"/{name}/d")
    assert listed(f"/{name}") == []
    fs3_command("rm", f"/{name}/two", f"/{name}/three")
    assert set(listed(f"/{name}")) == {f"/{name}/two", f"/{name}/three"}
    assert "purged 0" in fs3_command("trash", "purge", "--older-than", "1h", f"/{name}").stdout
    assert "purged 1 entry" in fs3_command("trash", "purge", f"/{name}/two").stdout
    assert listed(f"/{name}") == [f"/{name}/three"]
    refused = fs3_command("trash", "purge", check=False)
    assert refused.returncode == 1
    assert "--all" in refused.stderr
    fs3_command("trash", "off", f"/{name}")
    assert "off" in fs3_command("trash", "get", f"/{name}").stdout
    (mount / name / "four").write_text("4")
    (mount / name / "four").unlink()
    with fs3.connect(shared_cluster.url + f"/{name}", token=shared_cluster.token) as fs:
        assert [entry.path for entry in fs.trash.entries()] == ["/three"]
        [entry] = fs.trash.entries("/three")
        assert list(fs.trash.restore(entry)) == ["/three"]
        assert fs.open("/three").read() == "three"
