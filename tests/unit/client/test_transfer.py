"""Copies of trees."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from fs3.client import transfer
from fs3.client.filesystem import FileSystem
from fs3.core.errors import Fs3Error

from .fakes import FakeClient, connection


@pytest.fixture
def fs() -> FileSystem:
    return FileSystem(connection(FakeClient()))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of all sizes, an empty directory, symlinks, odd modes and times."""
    root = tmp_path / "tree"
    (root / "a/empty").mkdir(parents=True)
    (root / "small").write_bytes(b"x")
    (root / "none").touch()
    (root / "a/large").write_bytes(os.urandom(100_000))
    (root / "exact").write_bytes(os.urandom(8192))
    (root / "link").symlink_to("a/large")
    (root / "dangling").symlink_to("/no/where")
    (root / "small").chmod(0o640)
    os.utime(root / "small", ns=(5, 1_000_000_007))
    (root / "a").chmod(0o750)
    os.utime(root / "a", ns=(5, 2_000_000_009))
    return root


def facts(root: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Mode, time and content by path."""
    found: dict[str, tuple[int, int, bytes | str]] = {}
    for path in [root, *root.rglob("*")]:
        st = path.lstat()
        content: bytes | str = b""
        if path.is_symlink():
            found[str(path.relative_to(root))] = (0, 0, os.readlink(path))
            continue
        if path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(root))] = (stat.S_IMODE(st.st_mode), st.st_mtime_ns, content)
    return found


@pytest.mark.parametrize("jobs", [1, 8])
def test_a_tree_survives_the_way_there_and_back(
    jobs: int, fs: FileSystem, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    up = transfer.upload(fs, tree, "/t", jobs=jobs)
    copied = transfer.copy(fs, "/t", fs, "/t2", jobs=jobs)
    down = transfer.download(fs, "/t2", tmp_path / "back", jobs=jobs)
    assert facts(tmp_path / "back") == facts(tree)
    counts = (4, 3, 2, 108_193)
    for done in (up, copied, down):
        assert (done.files, done.directories, done.symlinks, done.bytes) == counts


def test_a_single_file_is_copied_to_the_name_given(fs: FileSystem, tree: Path, tmp_path: Path) -> None:
    transfer.upload(fs, tree / "small", "/one")
    transfer.download(fs, "/one", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == b"x"
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o640


def test_existing_files_are_replaced_only_when_told(fs: FileSystem, tree: Path) -> None:
    transfer.upload(fs, tree, "/t")
    transfer.upload(fs, tree, "/t")
    with pytest.raises(FileExistsError):
        transfer.upload(fs, tree, "/t", overwrite=False)


def test_progress_is_told_one_call_at_a_time_and_ends_with_the_totals(
    fs: FileSystem, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PIECE_BYTES", 4096)
    told: list[transfer.Progress] = []
    turn = threading.Lock()

    def progress(now: transfer.Progress) -> None:
        assert turn.acquire(blocking=False)
        told.append(now)
        turn.release()

    total = transfer.upload(fs, tree, "/t", progress=progress)
    assert told[-1] == total
    assert [p.bytes for p in told] == sorted(p.bytes for p in told)


def test_an_error_ends_the_transfer_and_closes_the_files(fs: FileSystem, tree: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(Fs3Error, match="neither file, directory nor symlink"):
        transfer.upload(fs, tree, "/t")
    client = fs.client
    assert isinstance(client, FakeClient)
    assert all(file.closed == 1 for file in client.files)


def test_a_failing_callback_ends_the_transfer(fs: FileSystem, tree: Path) -> None:
    def progress(now: transfer.Progress) -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError):
        transfer.upload(fs, tree, "/t", progress=progress)
