from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fs3.core.process import start_ticks
from fs3.fuse.table import Daemon, Mounted, default_file, mounted_at, parse_mountinfo, real_path

TABLE = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
90 22 0:51 / /mnt/a\\040b rw,nosuid,nodev - fuse.fs3 fs3 rw,user_id=0
91 22 0:52 / /mnt/other rw - fuse.sshfs host:/x rw
garbage
"""


def test_the_mount_table_is_read_with_its_escapes() -> None:
    mounts = parse_mountinfo(TABLE)
    assert mounts[1] == Mounted("/mnt/a b", "fuse.fs3", "fs3", ("rw", "nosuid", "nodev"))
    assert [m.is_fs3 for m in mounts] == [False, True, False]


def test_the_root_directory_is_mounted_and_a_new_one_is_not(tmp_path: Path) -> None:
    assert mounted_at("/") is not None
    assert mounted_at(str(tmp_path)) is None


def test_a_mountpoint_is_named_as_the_mount_table_would(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert real_path(str(tmp_path / "link")) == os.path.realpath(tmp_path / "real")


def test_pid_files_of_different_mountpoints_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FS3_RUN_DIR", str(tmp_path))
    files = {default_file(path, ".pid") for path in ("/a/b", "/a-b", "/a", "/")}
    assert len(files) == 4
    assert all(f.parent == tmp_path and f.suffix == ".pid" for f in files)


def test_a_pid_file_names_only_the_very_process_that_wrote_it(tmp_path: Path) -> None:
    path = tmp_path / "run" / "x.pid"
    assert Daemon.load(path) is None
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    ticks = start_ticks(child.pid)
    assert ticks is not None
    Daemon(child.pid, ticks + 1, "log").save(path)
    assert Daemon.load(path) is None
    Daemon(child.pid, ticks, "log").save(path)
    assert Daemon.load(path) == Daemon(child.pid, ticks, "log")
    child.communicate()
    assert Daemon.load(path) is None
    path.write_text("{")
    assert Daemon.load(path) is None
