"""What the file system object adds to the native client."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fs3.client.calls import native_reads, native_writes
from fs3.client.filesystem import FileSystem
from fs3.client.records import DirEntry
from fs3.core.errors import Fs3Error
from fs3.v1.frame_pb2 import Code

from .fakes import FakeClient, connection


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def fs(client: FakeClient) -> FileSystem:
    return FileSystem(connection(client))


def test_new_things_get_the_umask(client: FakeClient) -> None:
    fs = FileSystem(connection(client, umask=0o027))
    fs.mkdir("/d")
    fs.makedirs("/a/b")
    fs.open("/f", "w").close()
    assert [client.nodes[p].mode for p in (b"d", b"a/b", b"f")] == [0o750, 0o750, 0o640]


def test_paths_start_at_the_base_of_the_url(client: FakeClient) -> None:
    fs = FileSystem(connection(client, base="x/y"))
    fs.makedirs("/d")
    assert b"x/y/d" in client.nodes
    assert fs.listdir("/") == ["d"]


def test_stat_is_that_of_os(fs: FileSystem, client: FakeClient) -> None:
    with fs.open("/f", "wb") as file:
        file.write(b"x" * 1000)
    client.nodes[b"f"].mtime_ns = 1_234_567_890_123_456_789
    found = fs.stat("/f")
    assert isinstance(found, os.stat_result)
    assert stat.S_ISREG(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o644
    assert (found.st_size, found.st_blocks, found.st_mtime_ns) == (1000, 2, 1_234_567_890_123_456_789)
    assert (int(found.st_mtime), found[stat.ST_MTIME]) == (1_234_567_890, 1_234_567_890)


def test_questions_about_nothing_are_answered_no(fs: FileSystem) -> None:
    fs.symlink("nowhere", "/dangling")
    fs.mkdir("/d")
    assert (fs.exists("/d"), fs.isdir("/d"), fs.isfile("/d"), fs.islink("/d")) == (True, True, False, False)
    assert (fs.exists("/dangling"), fs.lexists("/dangling"), fs.islink("/dangling")) == (False, True, True)
    assert not any(ask("/none") for ask in (fs.exists, fs.lexists, fs.isdir, fs.isfile, fs.islink))


def test_rename_keeps_what_is_there_and_replace_does_not(fs: FileSystem, client: FakeClient) -> None:
    fs.rename("/a", "/b")
    fs.replace("/a", "/b")
    fs.exchange("/a", "/b")
    assert [flags for _, flags in client.calls] == [
        {"no_replace": True, "exchange": False},
        {"no_replace": False, "exchange": False},
        {"no_replace": False, "exchange": True},
    ]


def test_utime_takes_seconds_nanoseconds_or_now(fs: FileSystem, client: FakeClient) -> None:
    fs.open("/f", "w").close()
    client.calls.clear()
    fs.utime("/f", (1.5, 2.5))
    fs.utime("/f", ns=(3, 4), follow_symlinks=False)
    fs.utime("/f")
    assert [changes for _, changes in client.calls] == [
        {"atime_ns": 1_500_000_000, "mtime_ns": 2_500_000_000},
        {"atime_ns": 3, "mtime_ns": 4},
        {"atime_now": True, "mtime_now": True},
    ]
    with pytest.raises(ValueError, match="not both"):
        fs.utime("/f", (1, 2), ns=(1, 2))


def test_chown_leaves_minus_one_as_it_is(fs: FileSystem, client: FakeClient) -> None:
    fs.open("/f", "w").close()
    fs.chown("/f", 7, -1)
    assert (client.nodes[b"f"].uid, client.nodes[b"f"].gid) == (7, 0)


def _tree(fs: FileSystem) -> None:
    fs.makedirs("/t/a/b")
    fs.makedirs("/t/c")
    fs.open("/t/f", "w").close()
    fs.open("/t/a/g", "w").close()
    fs.symlink("/t/c", "/t/l")


@pytest.mark.parametrize("topdown", [True, False])
@pytest.mark.parametrize("followlinks", [True, False])
def test_walk_is_that_of_os(topdown: bool, followlinks: bool, fs: FileSystem, tmp_path: Path) -> None:
    _tree(fs)
    (tmp_path / "t/a/b").mkdir(parents=True)
    (tmp_path / "t/c").mkdir()
    for name in ("t/f", "t/a/g"):
        (tmp_path / name).touch()
    (tmp_path / "t/l").symlink_to(tmp_path / "t/c")
    expected = sorted(
        (d.removeprefix(str(tmp_path)), sorted(ds), sorted(fs_))
        for d, ds, fs_ in os.walk(tmp_path / "t", topdown=topdown, followlinks=followlinks)
    )
    found = list(fs.walk("/t", topdown=topdown, followlinks=followlinks))
    assert sorted(found) == expected
    assert found[0 if topdown else -1][0] == "/t"


def test_walk_leaves_out_what_the_caller_removes_and_reports_errors(fs: FileSystem) -> None:
    _tree(fs)
    seen = []
    for directory, directories, _ in fs.walk("/t"):
        seen.append(directory)
        directories[:] = [name for name in directories if name != "a"]
    assert seen == ["/t", "/t/c"]
    errors: list[OSError] = []
    assert list(fs.walk("/none", onerror=errors.append)) == []
    assert isinstance(errors[0], FileNotFoundError)


def test_entries_answer_from_the_listing(fs: FileSystem, client: FakeClient) -> None:
    _tree(fs)
    with fs.scandir("/t") as scan:
        entries: dict[str, DirEntry] = {entry.name: entry for entry in scan}
    assert list(entries) == ["a", "c", "f", "l"]
    assert entries["a"].is_dir()
    assert entries["f"].is_file()
    assert entries["f"].path == os.fspath(entries["f"]) == "/t/f"
    link = entries["l"]
    assert (link.is_symlink(), link.is_dir(), link.is_dir(follow_symlinks=False)) == (True, True, False)
    assert stat.S_ISLNK(link.stat(follow_symlinks=False).st_mode)
    client.nodes.pop(b"t/c")
    assert not link.is_dir()


def test_readlink_of_a_file_is_an_error(fs: FileSystem) -> None:
    _tree(fs)
    assert fs.readlink("/t/l") == "/t/c"
    with pytest.raises(Fs3Error) as caught:
        fs.readlink("/t/f")
    assert caught.value.code == Code.CODE_INVALID_ARGUMENT


def test_makedirs_of_an_existing_directory_is_an_error_unless_told(fs: FileSystem) -> None:
    fs.makedirs("/d")
    with pytest.raises(FileExistsError):
        fs.makedirs("/d")
    fs.makedirs("/d", exist_ok=True)


def test_stat_many_keeps_order_and_errors(fs: FileSystem) -> None:
    fs.mkdir("/d")
    first, second = fs.stat_many(["/none", "/d"])
    assert isinstance(first, FileNotFoundError)
    assert isinstance(second, os.stat_result)


def test_only_files_of_fs3_are_read_in_batches(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with open(tmp_path / "f", "rb") as file, pytest.raises(TypeError, match="not an open file of fs3"):
        native_reads([(file, 0, bytearray(1))])


def test_only_files_open_for_writing_are_written_in_batches(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with open(tmp_path / "f", "wb") as file, pytest.raises(TypeError, match="not an open file of fs3"):
        native_writes([(file, 0, b"x")])


def test_a_closed_file_system_says_so(client: FakeClient) -> None:
    with FileSystem(connection(client)) as fs:
        fs.mkdir("/d")
    assert client.closed
    fs.close()
    with pytest.raises(Fs3Error, match="closed; connect again"):
        fs.stat("/d")
