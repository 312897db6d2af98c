"""The commands that work on a cluster without a mount."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from fs3.testing import measure
from fs3.testing.cluster import LocalCluster
from tests.cluster.command import fs3_command
from tests.cluster.mounts import mounted


@pytest.fixture
def fs3_on(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the module's cluster the default one; a fresh directory on it."""
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    directory = f"/t{os.urandom(4).hex()}"
    fs3_command("mkdir", directory)
    return directory


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A local tree with nested directories, an empty file, a large one, a link, odd modes and times."""
    root = tmp_path / "tree"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "empty").touch()
    (root / "a" / "b" / "large").write_bytes(os.urandom(20 << 20))
    (root / "a" / "script").write_bytes(b"#!/bin/sh\n")
    (root / "a" / "script").chmod(0o751)
    os.utime(root / "a" / "script", ns=(10**18, 10**18 + 7))
    (root / "link").symlink_to("a/script")
    return root


def describe(root: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Mode, time of modification and content by name."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in sorted(root.rglob("*")):
        st = path.lstat()
        content: bytes | str = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        modified = 0 if path.is_symlink() else st.st_mtime_ns
        found[str(path.relative_to(root))] = (stat.S_IMODE(st.st_mode), modified, content)
    return found


def test_a_tree_copied_in_and_out_again_is_equal(fs3_on: str, tree: Path, tmp_path: Path) -> None:
    fs3_command("cp", "-r", str(tree), f":{fs3_on}/copy")
    fs3_command("cp", "-r", f":{fs3_on}/copy", f":{fs3_on}/second")
    fs3_command("cp", "-r", f":{fs3_on}/second", str(tmp_path / "out"))
    assert describe(tmp_path / "out") == describe(tree)
    usage = json.loads(fs3_command("du", "--json", f"{fs3_on}/copy").stdout)
    assert usage == [
        {"path": f"{fs3_on}/copy", "bytes": (20 << 20) + 10 + 8, "files": 4, "directories": 3, "inodes": 7}
    ]


def test_listing_stat_and_cat_tell_the_truth(fs3_on: str, tree: Path) -> None:
    fs3_command("cp", "-r", str(tree), f":{fs3_on}")
    listed = json.loads(fs3_command("ls", "--json", f"{fs3_on}/tree").stdout)
    assert [(e["name"], e["kind"]) for e in listed] == [("a", "directory"), ("link", "symlink")]
    assert fs3_command("ls", f"{fs3_on}/tree/a").stdout.split() == ["b/", "empty", "script"]
    assert "0751" in fs3_command("ls", "-l", f"{fs3_on}/tree/a").stdout
    (record,) = json.loads(fs3_command("stat", "--json", f"{fs3_on}/tree/a/script").stdout)
    assert (record["bytes"], record["mode"], record["mtime_ns"]) == (10, "0751", 10**18 + 7)
    (link,) = json.loads(fs3_command("stat", "--json", f"{fs3_on}/tree/link").stdout)
    assert link["target"] == "a/script"
    assert fs3_command("cat", f"{fs3_on}/tree/link", f"{fs3_on}/tree/a/script").stdout == "#!/bin/sh\n" * 2


def test_names_are_moved_linked_and_removed(fs3_on: str, tree: Path) -> None:
    fs3_command("cp", "-q", str(tree / "a" / "script"), f":{fs3_on}/one")
    fs3_command("ln", f"{fs3_on}/one", f"{fs3_on}/two")
    fs3_command("ln", "-s", "two", f"{fs3_on}/three")
    fs3_command("mkdir", "-p", f"{fs3_on}/x/y/z")
    fs3_command("mv", f"{fs3_on}/one", f"{fs3_on}/x/y")
    assert fs3_command("mv", "-n", f"{fs3_on}/two", f"{fs3_on}/three", check=False).returncode == 1
    assert fs3_command("cat", f"{fs3_on}/three").stdout == "#!/bin/sh\n"
    assert fs3_command("ls", f"{fs3_on}/x/y").stdout.split() == ["one", "z/"]
    refused = fs3_command("rm", f"{fs3_on}/x", f"{fs3_on}/absent", f"{fs3_on}/two", check=False)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 2
    assert "-r" in refused.stderr
    fs3_command("rm", "-r", f"{fs3_on}/x")
    fs3_command("rm", "-f", f"{fs3_on}/x")
    assert fs3_command("ls", fs3_on).stdout.split() == ["three"]


def test_copies_of_what_is_not_there_or_not_asked_for_are_refused(fs3_on: str, tree: Path, tmp_path: Path) -> None:
    for arguments, word in [
        (["cp", str(tree), f":{fs3_on}/d"], "-r"),
        (["cp", str(tree / "absent"), f":{fs3_on}/d"], "absent"),
        (["cp", "a", "b"], "local"),
        (["cp", f":{fs3_on}/absent", str(tmp_path / "d")], "absent"),
        (["cat", "/"], "a directory"),
        (["cp", str(tree / "link"), str(tree / "a" / "empty"), f":{fs3_on}/no-directory"], "not a directory"),
    ]:
        result = fs3_command(*arguments, check=False)
        assert result.returncode == 1
        assert word in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert fs3_command("ls", fs3_on).stdout == ""


def test_the_benchmarks_run_and_print_json(fs3_on: str, tmp_path: Path) -> None:
    limits = json.loads(fs3_command("bench", "limits", "--scale", "0.01", "--dir", str(tmp_path), "--json").stdout)
    assert limits["bare_chain"]["mb_per_s"] > 0
    write = json.loads(fs3_command("bench", "write", "--size", "16MiB", "--json").stdout)
    assert write["write"]["mb_per_s"] > 0
    read = json.loads(fs3_command("bench", "read", "--size", "16MiB", "--json").stdout)
    assert read["random 4 KiB, 256 at a time"]["per_s"] > 0
    storage = fs3_command("bench", "storage", "--size", "8MiB", "--operations", "1024", "--scale", "0.01", "--json")
    found = json.loads(storage.stdout)["fs3"]
    assert set(found) == {*measure.STORAGE_LIMITS, "random 4 KiB overwrites, batches of 256"}
    assert all(found[name]["ratio"] > 0 for name in measure.STORAGE_LIMITS)
    # Every replica of every byte goes to a disk.
    assert found["random 4 KiB overwrites, batches of 256"]["write_amplification"] >= 1
    meta = json.loads(fs3_command("bench", "meta", "--files", "100", "--json").stdout)
    assert set(meta) == {"create", "stat", "unlink"}
    assert fs3_command("ls", "/").stdout.find("fs3-bench") == -1


def test_the_benchmarks_run_through_a_mount(fs3_on: str, shared_cluster: LocalCluster, tmp_path: Path) -> None:
    with mounted(shared_cluster, tmp_path / "m") as path:
        where = ("--mount", str(path), "--json")
        write = json.loads(fs3_command("bench", "write", "--size", "8MiB", *where).stdout)
        assert write["write (mount)"]["mb_per_s"] > 0
        read = json.loads(fs3_command("bench", "read", "--size", "8MiB", *where).stdout)
        assert read["read (mount)"]["mb_per_s"] > 0
        meta = json.loads(fs3_command("bench", "meta", "--files", "32", *where).stdout)
        assert set(meta) == {"create_write_close", "stat", "unlink"}
        assert [p.name for p in path.iterdir() if p.name.startswith(".fs3-bench")] == []
    refused = fs3_command("bench", "write", "--mount", str(tmp_path), check=False)
    assert "not a mountpoint" in refused.stderr


def test_the_doctor_finds_this_machine_fit(tmp_path: Path) -> None:
    result = json.loads(fs3_command("doctor", "--json", "--dir", str(tmp_path)).stdout)
    assert result["ok"] is True
    assert {c["check"] for c in result["checks"]} >= {"native module", "FUSE", "direct I/O"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str) -> None:
    assert "fs3" in fs3_command("completion", shell).stdout


def test_the_layout_of_new_files_is_set_by_directory(fs3_on: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(3 << 20))
    fs3_command("layout", "set", fs3_on, "--chunk-size", "256KiB", "--stripe", "2")
    fs3_command("cp", str(tmp_path / "file"), f":{fs3_on}/file")
    fs3_command("cp", f":{fs3_on}/file", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()
    told = json.loads(fs3_command("layout", "get", "--json", fs3_on, f"{fs3_on}/file").stdout)
    assert [(r["chunk_bytes"], r["stripe"]) for r in told] == [(256 << 10, 2)] * 2
    fs3_command("layout", "set", fs3_on, "--chunk-size", "default", "--stripe", "default")
    assert fs3_command("layout", "get", fs3_on).stdout.split()[-3:] == ["default", "default", fs3_on]
    for wrong, told_wrong in (
        (["--stripe", "99"], "a stripe of 99: there are"),
        (["--stripe", "many"], "not 'many'"),
        (["--chunk-size", "100KiB"], "not a power of two"),
        ([], "nothing to set"),
    ):
        refused = fs3_command("layout", "set", fs3_on, *wrong, check=False)
        assert refused.returncode == 1
        assert told_wrong in refused.stderr
