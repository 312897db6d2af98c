"""What all processes of a campaign share: epochs, orders to pause, and what is known of every slot. A mapped file.

Every number has one writer, so nothing needs a lock. Facts carry the epoch in which they were learned, because a power
cut may take back what was acknowledged and not synced, and the end of all replicas may take back an unacknowledged
write that a reader has seen already:

- `power` is even while the power is on; a fact of an earlier epoch no longer holds, except that what was synced stays.
- `chains` is even while at most one storage service is disturbed; only then, and only within one such epoch, must a
  later read not see less than an earlier one.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from tests.torture.content import SLOTS_PER_FILE, slots_of

_PIECES = [len(slot.pieces) for slot in slots_of(0)]
PIECES_PER_FILE = sum(_PIECES)
_PIECE_AT = [sum(_PIECES[:i]) for i in range(len(_PIECES))]
_EPOCH_SHIFT = 40
_HEADER = 64
_POWER, _CHAINS, _PAUSE, _STOP = range(4)
_WORKERS_MAX = 16
_PER_SLOT = 3
_ISSUED, _ACKNOWLEDGED, _SYNCED = range(_PER_SLOT)


def pack(epoch: int, version: int) -> int:
    """A version as a fact of an epoch."""
    return epoch << _EPOCH_SHIFT | version


def unpack(fact: int, epoch: int) -> int:
    """The version of a fact of `epoch`, else 0."""
    return fact & (1 << _EPOCH_SHIFT) - 1 if fact >> _EPOCH_SHIFT == epoch else 0


class Board:
    """The mapped file. `files` slotted files; up to 16 worker processes, readers among them."""

    def __init__(self, path: Path, files: int) -> None:
        self._files = files
        slots, seen = files * SLOTS_PER_FILE * _PER_SLOT, _WORKERS_MAX * files * PIECES_PER_FILE
        self._slots_at = _HEADER
        self._seen_at = self._slots_at + slots
        size = (self._seen_at + seen) * 8
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, size)
        self._map = mmap.mmap(descriptor, size)
        os.close(descriptor)
        self._words = memoryview(self._map).cast("Q")

    def close(self) -> None:
        """Unmap it."""
        self._words.release()
        self._map.close()

    # ---- the campaign's

    @property
    def power(self) -> int:
        """Epoch of the power."""
        return self._words[_POWER]

    @power.setter
    def power(self, value: int) -> None:
        self._words[_POWER] = value

    @property
    def chains(self) -> int:
        """Epoch of the chains."""
        return self._words[_CHAINS]

    @chains.setter
    def chains(self, value: int) -> None:
        self._words[_CHAINS] = value

    @property
    def pause(self) -> bool:
        """Whether workers are to rest."""
        return bool(self._words[_PAUSE])

    @pause.setter
    def pause(self, value: bool) -> None:
        self._words[_PAUSE] = value

    @property
    def stop(self) -> bool:
        """Whether workers are to end."""
        return bool(self._words[_STOP])

    @stop.setter
    def stop(self, value: bool) -> None:
        self._words[_STOP] = value

    # ---- per worker

    def rest(self, worker: int, resting: bool) -> None:
        """A worker says whether it rests."""
        self._words[8 + worker] = resting

    def rests(self, worker: int) -> bool:
        """Whether it does."""
        return bool(self._words[8 + worker])

    def count(self, worker: int, operations: int) -> None:
        """A worker says how many operations were acknowledged to it."""
        self._words[8 + _WORKERS_MAX + worker] = operations

    def counted(self, worker: int) -> int:
        """How many."""
        return self._words[8 + _WORKERS_MAX + worker]

    # ---- per slot; the writer's

    def _slot(self, file: int, slot: int) -> int:
        return self._slots_at + (file * SLOTS_PER_FILE + slot) * _PER_SLOT

    def issued(self, file: int, slot: int) -> int:
        """The newest version that may be there."""
        return self._words[self._slot(file, slot) + _ISSUED]

    def issue(self, file: int, slot: int, version: int) -> None:
        """Say so before writing it."""
        self._words[self._slot(file, slot) + _ISSUED] = version

    def acknowledge(self, file: int, slot: int, epoch: int, version: int) -> None:
        """It was acknowledged in this epoch of the power."""
        self._words[self._slot(file, slot) + _ACKNOWLEDGED] = pack(epoch, version)

    def sync(self, file: int, slot: int, version: int) -> None:
        """It survives everything."""
        self._words[self._slot(file, slot) + _SYNCED] = version

    def floor(self, file: int, slot: int, epoch: int) -> int:
        """The oldest version that may be there in this epoch of the power."""
        at = self._slot(file, slot)
        return max(self._words[at + _SYNCED], unpack(self._words[at + _ACKNOWLEDGED], epoch))

    def synced(self, file: int, slot: int) -> int:
        """The oldest version that may be there whatever happens to the power."""
        return self._words[self._slot(file, slot) + _SYNCED]

    # ---- per piece; each reader's

    def _seen(self, worker: int, file: int, slot: int, piece: int) -> int:
        return self._seen_at + (worker * self._files + file) * PIECES_PER_FILE + _PIECE_AT[slot] + piece

    def see(self, worker: int, file: int, slot: int, piece: int, epoch: int, version: int) -> None:
        """A reader saw it in this epoch of the chains."""
        self._words[self._seen(worker, file, slot, piece)] = pack(epoch, version)

    def seen(self, file: int, slot: int, piece: int, epoch: int) -> int:
        """The newest version that any reader saw in this epoch of the chains."""
        return max(unpack(self._words[self._seen(w, file, slot, piece)], epoch) for w in range(_WORKERS_MAX))
