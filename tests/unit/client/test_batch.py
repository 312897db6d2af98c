"""Batches put what they read where it belongs, also when some of it fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from fs3.client import batch as batch_module
from fs3.client.batch import Batch
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code


@dataclass
class Opened:
    length: int
    name: str = "open"


@pytest.fixture(autouse=True)
def any_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_module, "native_file", lambda file: file)


def run(
    ranges: list[Any], opened: list[Any], out: bytearray | None = None, *, return_errors: bool = False
) -> tuple[list[tuple[int, int]], list[Any]]:
    """(offset, length) of the reads, and the results when each fills its range with its number."""
    batch = Batch(ranges)
    reads = batch.reads(opened, out, return_errors)
    counts = []
    for number, (file, offset, view) in enumerate(reads, 1):
        count = min(len(view), max(0, file.length - offset))
        view[:count] = bytes([number]) * count
        counts.append(count)
    return [(offset, len(view)) for _, offset, view in reads], batch.results(counts, return_errors)


def test_each_path_is_opened_once_and_open_files_not_at_all() -> None:
    batch = Batch([("a", 0, 1), (Opened(9), 0, 1), ("b", 0, 1), ("a", 5, 1)])
    assert batch.paths == ["a", "b"]


def test_places_in_the_callers_buffer_follow_from_the_lengths() -> None:
    out = bytearray(12)
    file = Opened(10)
    reads, views = run([(file, 8, 4), (file, 0, 4), (file, 2, 4)], [], out)
    assert reads == [(8, 4), (0, 4), (2, 4)]
    assert bytes(out) == b"\1\1\0\0" + b"\2" * 4 + b"\3" * 4
    assert [bytes(view) for view in views] == [b"\1\1", b"\2" * 4, b"\3" * 4]


def test_memory_of_its_own_has_only_what_is_there() -> None:
    reads, views = run([("a", 0, None), ("a", 7, 1 << 50), ("a", 20, None)], [Opened(10)])
    assert reads == [(0, 10), (7, 3), (20, 0)]
    assert [len(view) for view in views] == [10, 3, 0]
    assert len(views[0].obj) == 13


def test_a_buffer_that_is_too_small_is_refused_before_reading() -> None:
    with pytest.raises(ValueError, match="the buffer has 7 bytes, the ranges need 8"):
        run([("a", 0, 4), ("a", 4, 4)], [Opened(1)], bytearray(7))
    with pytest.raises(ValueError, match="negative"):
        Batch([("a", 0, -1)])


def test_errors_stand_in_their_places_and_name_their_files() -> None:
    missing = error(Code.CODE_NOT_FOUND, "gone")
    file = Opened(4)
    _, found = run([("no", 0, 4), (file, 0, 4), ("no", 0, None)], [missing], return_errors=True)
    assert found[0] is found[2] is missing
    assert missing.filename == "no"
    assert bytes(found[1]) == b"\1" * 4
    with pytest.raises(FileNotFoundError, match="gone: 'no'"):
        run([(file, 0, 4), ("no", 0, 4)], [missing])


def test_a_failed_read_is_raised_or_returned() -> None:
    damaged = error(Code.CODE_CHECKSUM_MISMATCH, "damaged")
    batch = Batch([("a", 0, 1), ("b", 0, 1)])
    batch.reads([Opened(1), Opened(1)], None, True)
    assert batch.results([1, damaged], True)[1] is damaged
    with pytest.raises(OSError, match="damaged: 'b'"):
        batch.results([1, damaged], False)
