"""What is written: slots of files, each filled with cells that say whose they are and which version.

A read proves what it saw: every cell carries its slot, version and place, and a mix of them, so that wrong bytes,
misplaced bytes and versions that do not belong together are told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

CELL_BYTES = 32
CHUNK_BYTES = 256 << 10
PAGE_BYTES = 4096

# (number, bytes) of slots per file: smaller than a checksum block and across two of them, small overwrites, and
# slots that lie on several chunks.
SHAPE = ((24, 4000), (8, 40_000), (3, 400_000))

Cells = npt.NDArray[np.uint64]
Pieces = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Slot:
    """A range of a file that is always written as a whole."""

    file: int
    number: int
    offset: int
    length: int

    @property
    def key(self) -> int:
        """Which slot of all."""
        return self.file << 16 | self.number

    @cached_property
    def pieces(self) -> Pieces:
        """(begin, end) within the slot of what lies on one chunk: a chunk's part is written and read atomically."""
        return self._split(CHUNK_BYTES)

    @property
    def whole(self) -> Pieces:
        """All of it, as one piece."""
        return ((0, self.length),)

    @cached_property
    def pages(self) -> Pieces:
        """The same by page: a mount may hold pages of different age, and write them at different times."""
        return self._split(PAGE_BYTES)

    def _split(self, unit: int) -> Pieces:
        found, at = [], 0
        while at < self.length:
            end = min(self.length, at + unit - (self.offset + at) % unit)
            found.append((at, end))
            at = end
        return tuple(found)


def slots_of(file: int) -> list[Slot]:
    """The slots of a file, one behind the other."""
    found, offset = [], 0
    for count, length in SHAPE:
        for _ in range(count):
            found.append(Slot(file, len(found), offset, length))
            offset += length
    return found


SLOTS_PER_FILE = sum(count for count, _ in SHAPE)
FILE_BYTES = sum(count * length for count, length in SHAPE)


def _cells(key: int, version: int, first: int, count: int) -> Cells:
    cells = np.empty((count, CELL_BYTES // 8), np.uint64)
    index = np.arange(first, first + count, dtype=np.uint64)
    cells[:, 0], cells[:, 1], cells[:, 2] = key, version, index
    mixed = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    cells[:, 3] = mixed ^ np.uint64((version * 0xBF58476D1CE4E5B9 + key) & (1 << 64) - 1)
    return cells


def fill(slot: Slot, version: int) -> bytes:
    """The bytes of a slot at a version."""
    return _cells(slot.key, version, 0, slot.length // CELL_BYTES).tobytes()


class WrongBytes(AssertionError):
    """Bytes were read that nobody wrote there."""


def versions(slot: Slot, data: bytes, pieces: Pieces) -> list[int]:
    """The version of each of `pieces` of a slot that was read as a whole. Raises WrongBytes."""
    if len(data) != slot.length:
        raise WrongBytes(f"{slot}: {len(data)} bytes were read")
    found = []
    for begin, end in pieces:
        cells = np.frombuffer(data[begin:end], np.uint64).reshape(-1, CELL_BYTES // 8)
        version = int(cells[0, 1])
        wrong = np.nonzero((cells != _cells(slot.key, version, begin // CELL_BYTES, len(cells))).any(axis=1))[0]
        if len(wrong):
            seen = [hex(int(v)) for v in cells[wrong[0]]]
            raise WrongBytes(
                f"{slot}, piece at {begin}: {len(wrong)} of {len(cells)} cells do not belong to version {version}, "
                f"the first at byte {begin + int(wrong[0]) * CELL_BYTES}: {seen}"
            )
        found.append(version)
    return found
