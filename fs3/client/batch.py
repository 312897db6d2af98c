"""Batches of reads: ranges of many files into one buffer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from fs3 import native
from fs3.client.buffers import Writable, flat
from fs3.client.calls import native_file
from fs3.client.finish import name_paths
from fs3.client.paths import StrPath


class Batch:
    """What one call reads: (open file or path, offset, length or None) each. The waiting is the caller's."""

    def __init__(self, ranges: Iterable[tuple[Any, int, int | None]]) -> None:
        self._ranges = list(ranges)
        # Each path once, with its place among the opened files.
        self._places: dict[StrPath, int] = {}
        for file, offset, length in self._ranges:
            if offset < 0 or (length is not None and length < 0):
                raise ValueError(f"negative offset or length: {offset}, {length}")
            if isinstance(file, str | bytes | os.PathLike):
                self._places.setdefault(file, len(self._places))

    @property
    def paths(self) -> list[StrPath]:
        """What is to be opened."""
        return list(self._places)

    def reads(
        self, opened: Sequence[native.File | OSError], out: Writable | None, return_errors: bool
    ) -> list[tuple[native.File, int, memoryview]]:
        """The reads to be made, with the files of :attr:`paths`. Raises ValueError when `out` is too small."""
        for path, result in zip(self._places, opened, strict=True):
            if isinstance(result, OSError):
                name_paths(result, path)
                if not return_errors:
                    raise result
        self._files = [
            opened[self._places[file]] if isinstance(file, str | bytes | os.PathLike) else native_file(file)
            for file, _, _ in self._ranges
        ]
        rooms = [self._room(number, fixed=out is not None) for number in range(len(self._files))]
        whole = memoryview(bytearray(sum(rooms))) if out is None else flat(out)
        if sum(rooms) > len(whole):
            raise ValueError(f"the buffer has {len(whole)} bytes, the ranges need {sum(rooms)}")
        self._views, at = [], 0
        for room in rooms:
            self._views.append(whole[at : at + room])
            at += room
        return [
            (file, offset, view)
            for file, (_, offset, _), view in zip(self._files, self._ranges, self._views, strict=True)
            if not isinstance(file, OSError)
        ]

    def _room(self, number: int, fixed: bool) -> int:
        """Bytes kept for a range; `fixed`: as many as were asked for, whether the file has them or not."""
        file, (_, offset, length) = self._files[number], self._ranges[number]
        if fixed and length is not None:
            return length
        there = 0 if isinstance(file, OSError) else max(0, file.length - offset)
        return there if length is None else min(length, there)

    def results(self, counts: Sequence[int | OSError], return_errors: bool) -> list[memoryview]:
        """What was read of each range; errors stand in the list, or the first is raised."""
        done = iter(counts)
        found: list[Any] = []
        for (file, _, _), opened, view in zip(self._ranges, self._files, self._views, strict=True):
            result = opened if isinstance(opened, OSError) else next(done)
            if isinstance(result, OSError):
                name_paths(result, file if isinstance(file, str | bytes | os.PathLike) else file.name)
                if not return_errors:
                    raise result
            found.append(result if isinstance(result, OSError) else view[:result])
        return found
