"""Files behave as those of builtins.open."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from fs3.client.file import RawFile
from fs3.client.filesystem import FileSystem
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

from .fakes import FakeClient, connection


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def fs(client: FakeClient) -> FileSystem:
    return FileSystem(connection(client))


def script(file: Any, text: bool) -> list[Any]:
    """The same steps on any file; what each returned or raised."""
    piece = "abc" if text else b"abc"
    steps: list[Any] = [
        lambda: file.write(piece * 3),
        lambda: file.seek(2),
        lambda: file.read(4),
        lambda: file.tell(),
        lambda: file.write(piece),
        lambda: file.seek(0),
        lambda: file.read(),
        lambda: file.read(),
        lambda: file.seek(0, os.SEEK_END),
        lambda: file.truncate(5),
        lambda: file.seek(0),
        lambda: file.readline(),
        lambda: file.readable(),
        lambda: file.writable(),
        lambda: file.seekable(),
        lambda: file.flush(),
        lambda: file.close(),
        lambda: file.closed,
        lambda: file.read(),
    ]
    results = []
    for step in steps:
        try:
            results.append(step())
        except Exception as e:
            results.append(type(e))
    return results


BINARY = ["wb", "wb+", "rb", "rb+", "ab", "ab+", "xb"]
TEXT = ["w", "w+", "r", "r+", "a", "a+"]


@pytest.mark.parametrize(
    ("mode", "buffering"),
    [(mode, buffering) for mode in BINARY for buffering in (-1, 0, 7)]
    + [(mode, buffering) for mode in TEXT for buffering in (-1, 1, 7)],
)
def test_files_do_what_local_ones_do(mode: str, buffering: int, fs: FileSystem, tmp_path: Path) -> None:
    local = tmp_path / "f"
    if "x" not in mode:
        local.write_bytes(b"0123456789")
        with fs.open("/f", "wb") as file:
            file.write(b"0123456789")
    with open(local, mode, buffering) as theirs, fs.open("/f", mode, buffering) as ours:
        assert script(ours, "b" not in mode) == script(theirs, "b" not in mode)
    with fs.open("/f", "rb") as file:
        assert file.read() == local.read_bytes()


def test_the_classes_are_those_of_open(fs: FileSystem) -> None:
    fs.open("/f", "x").close()
    kinds = {
        ("rb", 0): RawFile,
        ("rb", -1): io.BufferedReader,
        ("wb", -1): io.BufferedWriter,
        ("rb+", -1): io.BufferedRandom,
        ("r", -1): io.TextIOWrapper,
    }
    for (mode, buffering), kind in kinds.items():
        with fs.open("/f", mode, buffering) as file:
            assert type(file) is kind
            assert isinstance(file, io.IOBase)


def test_closing_is_done_once_and_also_after_a_failed_flush(fs: FileSystem, client: FakeClient) -> None:
    file = fs.open("/f", "wb")
    file.write(b"x")
    client.files[0].fail_with = error(Code.CODE_NO_SPACE, "full")
    with pytest.raises(OSError, match="full"):
        file.close()
    assert file.closed
    file.close()
    assert client.files[0].closed == 1


def test_positioned_calls_leave_the_position(fs: FileSystem) -> None:
    with fs.open("/f", "wb+", buffering=0) as file:
        assert file.write(b"0123456789") == 10
        assert file.pwrite(b"AB", 3) == 2
        assert file.pread(4, 2) == b"2AB5"
        assert file.pread(100, 8) == b"89"
        assert file.pread(100, 50) == b""
        buffer = bytearray(4)
        assert file.pread_into(buffer, 8) == 2
        assert file.tell() == 10
        with pytest.raises(ValueError, match="negative offset"):
            file.pread(1, -1)
        with pytest.raises(ValueError, match="negative offset"):
            file.seek(-1)


def test_appends_go_to_the_end_wherever_the_position_is(fs: FileSystem) -> None:
    with fs.open("/f", "wb") as file:
        file.write(b"start")
    with fs.open("/f", "ab", buffering=0) as raw:
        raw.seek(0)
        raw.write(b"1")
        raw.seek(0)
        raw.write(b"2")
    with fs.open("/f", "rb") as reader:
        assert reader.read() == b"start12"


def test_arguments_are_checked_before_anything_is_created(fs: FileSystem, client: FakeClient) -> None:
    with pytest.raises(ValueError, match="unbuffered text"):
        fs.open("/f", "w", 0)
    with pytest.raises(ValueError, match="encoding"):
        fs.open("/f", "wb", encoding="utf-8")
    assert not fs.exists("/f")
    with pytest.raises(LookupError):
        fs.open("/f", "w", encoding="no such encoding")
    assert [file.closed for file in client.files] == [1]


def test_sync_reaches_the_native_file(fs: FileSystem, client: FakeClient) -> None:
    with fs.open("/f", "wb") as file:
        file.write(b"x")
        file.flush()
        file.raw.sync()  # type: ignore[attr-defined]
    assert client.files[0].synced == 1
    with fs.open("/f", "rb", buffering=0) as raw, pytest.raises(io.UnsupportedOperation):
        raw.sync()
