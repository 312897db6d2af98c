"""What was written lately, and whether it collides with what a transaction has read.

The memory engine and the LMDB engine both decide with this class, as FoundationDB's resolver does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from fs3.kv.api import TRANSACTION_MS_MAX

WINDOW_MS = TRANSACTION_MS_MAX + 1_000
ENTRIES_MAX = 200_000

KeyRange = tuple[bytes, bytes]


class Entry(NamedTuple):
    """What one commit wrote. ``at_ms`` is a monotonic time, used only to forget the entry."""

    version: int
    at_ms: int
    keys: Sequence[bytes]
    ranges: Sequence[KeyRange]


class ConflictLog:
    """The writes of the last WINDOW_MS, newest last.

    Invariant: every committed write with a version above ``floor`` is here, so a snapshot older than
    ``floor`` cannot be judged.
    """

    def __init__(self, floor: int) -> None:
        self.floor = floor
        self._entries: deque[Entry] = deque()
        self._ranges: deque[tuple[int, bytes, bytes]] = deque()
        self._key_version: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, entry: Entry) -> None:
        """Remember a commit; versions never go down."""
        self._entries.append(entry)
        version = entry.version
        key_version = self._key_version
        for key in entry.keys:
            key_version[key] = version
        for begin, end in entry.ranges:
            self._ranges.append((version, begin, end))

    def conflicts(self, read_version: int, keys: Iterable[bytes], ranges: Sequence[KeyRange]) -> bool:
        """Whether a key or range was written after `read_version`, which must not be below ``floor``."""
        key_version = self._key_version
        for key in keys:
            if key_version.get(key, 0) > read_version:
                return True
        written = self._ranges
        if written and written[-1][0] > read_version and self._range_written(read_version, keys, ranges):
            return True
        return bool(ranges) and self._key_written_in(read_version, ranges)

    def _range_written(self, read_version: int, keys: Iterable[bytes], ranges: Sequence[KeyRange]) -> bool:
        for version, begin, end in reversed(self._ranges):
            if version <= read_version:
                break
            if any(begin <= key < end for key in keys) or any(b < end and begin < e for b, e in ranges):
                return True
        return False

    def _key_written_in(self, read_version: int, ranges: Sequence[KeyRange]) -> bool:
        entries = self._entries
        if not entries or entries[-1].version <= read_version:
            return False
        # A transaction may have read thousands of ranges: a key is looked up in them, not compared with each.
        begins = sorted(begin for begin, _ in ranges)
        # The furthest end of all ranges that begin at or before each of `begins`.
        ends = list(accumulate((end for _, end in sorted(ranges)), max))
        for entry in reversed(entries):
            if entry.version <= read_version:
                break
            for key in entry.keys:
                before = bisect_right(begins, key)
                if before and key < ends[before - 1]:
                    return True
        return False

    def prune(self, now_ms: int) -> list[Entry]:
        """Forget what is older than WINDOW_MS or beyond ENTRIES_MAX; returns it, oldest first."""
        dropped: list[Entry] = []
        entries = self._entries
        while entries and (now_ms - entries[0].at_ms > WINDOW_MS or len(entries) > ENTRIES_MAX):
            entry = entries.popleft()
            dropped.append(entry)
            self.floor = max(self.floor, entry.version)
            for key in entry.keys:
                if self._key_version.get(key) == entry.version:
                    del self._key_version[key]
        while self._ranges and self._ranges[0][0] <= self.floor:
            self._ranges.popleft()
        return dropped

    def forget_before(self, version: int) -> None:
        """Declare that writes up to `version` may be missing: snapshots older than it are too old."""
        self.floor = max(self.floor, version)
