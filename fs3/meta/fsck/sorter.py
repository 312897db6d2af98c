"""Counting the same number among any amount of them, in bounded memory: sorted runs in a temporary file, merged."""

from __future__ import annotations

import heapq
import itertools
import tempfile
from array import array
from collections.abc import Iterator
from typing import Final

RUN_NUMBERS: Final = 1 << 20
READ_NUMBERS: Final = 8192
_U64: Final = "Q"
_BYTES: Final = array(_U64).itemsize


class Sorter:
    """Takes 64-bit numbers in any order and gives them back counted, in order. Takes 8 bytes of disk for each."""

    def __init__(self, *, run_numbers: int = RUN_NUMBERS) -> None:
        self._run_numbers = run_numbers
        self._numbers = array(_U64)
        self._file = tempfile.TemporaryFile(prefix="fs3-fsck-")  # noqa: SIM115  # closed by close()
        self._runs: list[tuple[int, int]] = []
        self._end = 0

    def close(self) -> None:
        """Free the disk space."""
        self._file.close()

    def add(self, number: int) -> None:
        """Take one number. Raises OSError when the disk is full."""
        self._numbers.append(number)
        if len(self._numbers) >= self._run_numbers:
            self._spill()

    def _spill(self) -> None:
        run = array(_U64, sorted(self._numbers))
        self._file.seek(self._end)
        self._file.write(run.tobytes())
        self._runs.append((self._end, len(run)))
        self._end += len(run) * _BYTES
        self._numbers = array(_U64)

    def counts(self) -> Iterator[tuple[int, int]]:
        """(number, how often it was added), ascending. Nothing may be added any more."""
        runs: list[Iterator[int]] = [self._run(*run) for run in self._runs]
        runs.append(iter(sorted(self._numbers)))
        for number, same in itertools.groupby(heapq.merge(*runs)):
            yield number, sum(1 for _ in same)

    def _run(self, begin: int, length: int) -> Iterator[int]:
        for at in range(0, length, READ_NUMBERS):
            numbers = array(_U64)
            self._file.seek(begin + at * _BYTES)
            numbers.frombytes(self._file.read(min(READ_NUMBERS, length - at) * _BYTES))
            yield from numbers
