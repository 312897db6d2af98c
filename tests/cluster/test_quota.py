"""Quotas as users meet them: the commands, and programs at a mount."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fs3
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import LocalCluster
from tests.cluster.command import fs3_command
from tests.cluster.mounts import mounted

MIB = 1 << 20
DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def mount(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(shared_cluster, tmp_path_factory.mktemp("mnt") / "a") as mountpoint:
        yield mountpoint


@pytest.fixture
def directory(shared_cluster: LocalCluster, mount: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh directory at the mount; the module's cluster is the default one of commands."""
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    path = mount / f"t{os.urandom(4).hex()}"
    path.mkdir()
    return path


def quota(command: str, directory: Path, *arguments: str) -> Any:
    """Run `fs3 quota`; returns what it prints."""
    result = fs3_command("quota", command, f":/{directory.name}", *arguments)
    return json.loads(result.stdout) if "--json" in arguments else result.stdout


def active(directory: Path, *limits: str) -> None:
    """Set a quota and wait until it is enforced."""
    quota("set", directory, *limits)
    eventually(lambda: quota("get", directory, "--json")[0]["state"] == "active")


def eventually(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < ends_s
        time.sleep(0.1)


def dd(path: Path, count: int) -> subprocess.CompletedProcess[str]:
    """Write `count` MiB."""
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=1M", f"count={count}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_dd_ends_at_the_limit_and_goes_on_after_rm(directory: Path) -> None:
    active(directory, "--bytes", "20MiB")
    refused = dd(directory / "a", 64)
    assert refused.returncode == 1
    assert "Disk quota exceeded" in refused.stderr
    assert (directory / "a").stat().st_size == 20 * MIB
    assert quota("get", directory, "--json")[0]["bytes"] == 20 * MIB
    # What is there can be written over.
    with open(directory / "a", "r+b") as file:
        file.write(bytes(MIB))
    (directory / "a").unlink()
    assert dd(directory / "b", 20).returncode == 0
    assert dd(directory / "c", 1).returncode == 1
    quota("set", directory, "--bytes", "30MiB")
    assert dd(directory / "c", 10).returncode == 0
    assert quota("get", directory, "--json")[0]["bytes_percent"] == 100.0


def test_every_way_to_grow_is_refused(directory: Path) -> None:
    active(directory, "--bytes", "8MiB", "--files", "3")
    with open(directory / "f", "wb", buffering=0) as file:
        file.write(bytes(3 * MIB))
        with pytest.raises(OSError, match="quota") as refused:
            os.truncate(directory / "f", 9 * MIB)
        assert refused.value.errno == errno.EDQUOT
        with pytest.raises(OSError, match="quota") as refused:
            os.posix_fallocate(file.fileno(), 0, 9 * MIB)
        assert refused.value.errno == errno.EDQUOT
        with pytest.raises(OSError, match="quota") as refused:
            os.pwrite(file.fileno(), b"x", 8 * MIB)
        assert refused.value.errno == errno.EDQUOT
        os.pwrite(file.fileno(), b"x", 8 * MIB - 1)
    assert (directory / "f").stat().st_size == 8 * MIB
    (directory / "g").touch()
    with pytest.raises(OSError, match="quota") as refused:
        (directory / "h").mkdir()
    assert refused.value.errno == errno.EDQUOT
    assert quota("get", directory, "--json")[0]["files"] == 3


def test_several_writers_exceed_a_limit_by_little(directory: Path) -> None:
    active(directory, "--bytes", "32MiB")
    writers = [
        subprocess.Popen(["dd", "if=/dev/zero", f"of={directory}/{i}", "bs=1M"], stderr=subprocess.DEVNULL)
        for i in range(3)
    ]
    assert [writer.wait() for writer in writers] == [1, 1, 1]
    sizes = sum(path.stat().st_size for path in directory.iterdir())
    assert 32 * MIB - 3 * MIB <= sizes <= (32 + 3 * 8) * MIB
    assert quota("get", directory, "--json")[0]["bytes"] == sizes


def test_the_client_library_is_held_to_the_limit(directory: Path, shared_cluster: LocalCluster) -> None:
    active(directory, "--bytes", "5MiB")
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
        with fs.open(f"/{directory.name}/f", "wb", buffering=0) as file:
            file.write(bytes(5 * MIB))
            with pytest.raises(Fs3Error) as refused:
                file.write(b"x")
            assert refused.value.errno == errno.EDQUOT
        assert fs.statvfs(f"/{directory.name}").f_bavail == 0
        assert fs.stat(f"/{directory.name}/f").st_size == 5 * MIB


def test_mv_across_quotas_moves_files_and_copies_directories(directory: Path, mount: Path) -> None:
    inner, outer = directory / "inner", directory / "outer"
    for path in (inner / "d", outer):
        path.mkdir(parents=True)
    active(directory)
    fs3_command("quota", "set", f":/{directory.name}/inner")
    eventually(
        lambda: (
            [q["state"] for q in json.loads(fs3_command("quota", "get", f":/{directory.name}/inner", "--json").stdout)]
            == ["active"] * 2
        )
    )
    (inner / "d" / "f").write_bytes(bytes(100))
    (inner / "g").write_bytes(bytes(1000))
    with pytest.raises(OSError, match="cross-device") as refused:
        os.rename(inner / "d", outer / "d")
    assert refused.value.errno == errno.EXDEV
    with pytest.raises(OSError, match="cross-device"):
        os.link(inner / "g", outer / "g")
    subprocess.run(["mv", str(inner / "d"), str(inner / "g"), str(outer)], check=True)
    assert (outer / "d" / "f").stat().st_size == 100
    assert sorted(path.name for path in inner.iterdir()) == []
    (own, above) = json.loads(fs3_command("quota", "get", f":/{directory.name}/inner", "--json").stdout)
    assert (own["files"], own["bytes"]) == (1, 0)
    assert (above["files"], above["bytes"]) == (6, 1100)


def test_df_shows_what_is_left(directory: Path, mount: Path) -> None:
    (directory / "d").mkdir()
    active(directory, "--bytes", "12MiB", "--files", "10")
    (directory / "d" / "f").write_bytes(bytes(4 * MIB))
    space = os.statvfs(directory / "d")
    assert (space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize) == (12 * MIB, 8 * MIB)
    assert (space.f_files, space.f_ffree) == (10, 7)
    out = subprocess.run(
        ["df", "-B1M", "--output=size,used,avail", directory], capture_output=True, text=True, check=True
    )
    assert out.stdout.split()[-3:] == ["12", "4", "8"]
    whole = os.statvfs(mount)
    assert whole.f_blocks * whole.f_frsize > 12 * MIB


def test_what_is_there_is_counted_and_a_cleared_quota_forgets_it(directory: Path) -> None:
    for path in ("a/b/c", "a/d"):
        (directory / path).mkdir(parents=True)
        (directory / path / "f").write_bytes(bytes(1000))
    walked = json.loads(fs3_command("du", "--json", f"/{directory.name}").stdout)
    assert (walked[0]["bytes"], walked[0]["inodes"], walked[0]["files"]) == (2000, 7, 2)
    active(directory)
    counted = json.loads(fs3_command("du", "--json", f"/{directory.name}").stdout)
    assert (counted[0]["bytes"], counted[0]["inodes"], counted[0]["files"]) == (2000, 7, None)
    listed = json.loads(fs3_command("quota", "ls", "--json").stdout)
    assert [row for row in listed if row["path"] == f"/{directory.name}"] == quota("get", directory, "--json")
    assert f"/{directory.name}" in fs3_command("quota", "ls").stdout
    quota("clear", directory)
    eventually(lambda: f"/{directory.name}" not in fs3_command("quota", "ls").stdout)
    assert fs3_command("quota", "get", f"/{directory.name}", check=False).returncode == 1
    shutil.rmtree(directory)
    assert fs3_command("admin", "fsck", os.environ["FS3_CLUSTER"]).stdout == "nothing is wrong\n"


def test_what_is_wrong_is_said(directory: Path) -> None:
    wrong = fs3_command("quota", "set", f":/{directory.name}", "--bytes", "lots", check=False)
    assert (wrong.returncode, "is not a size" in wrong.stderr) == (1, True)
    wrong = fs3_command("quota", "set", f":/{directory.name}", "--files", "-1", check=False)
    assert wrong.returncode == 1
    wrong = fs3_command("quota", "clear", f":/{directory.name}", check=False)
    assert "has no quota" in wrong.stderr
