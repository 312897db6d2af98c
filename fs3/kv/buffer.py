"""The part of a transaction that is the same on every embedded engine: its own writes, and what it has read.

An engine supplies the snapshot (``_snapshot``, ``_base_*``) and ``_commit``.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Iterator

from fs3.kv.api import (
    KEY_BYTES_MAX,
    TRANSACTION_BYTES_MAX,
    VALUE_BYTES_MAX,
    VERSIONSTAMP_BYTES,
    KvError,
    LimitExceeded,
    UsedAfterCommit,
)
from fs3.kv.conflicts import KeyRange

KEYS_END = b"\xff"
FIRST_KEY = b"\x00"
NO_STAMP = b"\x00" * VERSIONSTAMP_BYTES
_LAST_STAMP = b"\xff" * VERSIONSTAMP_BYTES

# A buffered write: a value; None for a clear; an int for an add to a value not read yet; a pair
# (prefix, suffix) for a value that gets the versionstamp of the commit.
Write = bytes | None | int | tuple[bytes, bytes]


class State(enum.IntEnum):
    """Where a transaction is; only OPEN takes operations."""

    OPEN = 0
    COMMITTING = 1
    COMMITTED = 2
    FAILED = 3
    CANCELLED = 4


class _Absent(enum.Enum):
    ABSENT = 0


_ABSENT = _Absent.ABSENT


def _range_begin(key_range: KeyRange) -> bytes:
    return key_range[0]


def add_wrapping(value: bytes | None, delta: int) -> bytes:
    """`value` as a little-endian 64-bit integer (absent: 0; cut or zero-extended to 8 bytes) plus `delta`."""
    base = int.from_bytes(value[:8], "little") if value else 0
    return ((base + delta) & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little")


def key_refused(key: bytes) -> LimitExceeded:
    """Return the error for a key that is empty, too long, or in the space of the store."""
    if len(key) > KEY_BYTES_MAX:
        return LimitExceeded(f"key of {len(key)} bytes: the limit is {KEY_BYTES_MAX}")
    if not key:
        return LimitExceeded("a key must not be empty")
    return LimitExceeded("a key must not begin with 0xff: that space belongs to the store")


def check_range(begin: bytes, end: bytes) -> None:
    """Refuse boundaries that no key can have. Raises LimitExceeded."""
    if begin > KEYS_END or end > KEYS_END:
        raise LimitExceeded("a range must not reach beyond 0xff: that space belongs to the store")
    if len(begin) > KEY_BYTES_MAX + 1 or len(end) > KEY_BYTES_MAX + 1:
        raise LimitExceeded(f"a range boundary is longer than {KEY_BYTES_MAX} bytes")


class BufferedTransaction(ABC):
    """See :class:`fs3.kv.api.Transaction`. Not thread-safe: it belongs to one task."""

    __slots__ = (
        "_clears",
        "_hurried",
        "_order",
        "_read_keys",
        "_read_ranges",
        "_stamp",
        "_stamped_keys",
        "_state",
        "_write_bytes",
        "_write_keys",
        "_write_ranges",
        "_writes",
    )

    def __init__(self) -> None:
        self._state = State.OPEN
        self._hurried = True
        self._read_keys: list[bytes] = []
        self._read_ranges: list[KeyRange] = []
        # Applied in this order at commit: _clears, then _writes, then _stamped_keys. clear_range keeps that
        # equal to program order by dropping the earlier writes that it covers.
        self._clears: list[KeyRange] = []  # sorted, disjoint
        self._writes: dict[bytes, Write] = {}
        self._stamped_keys: list[tuple[bytes, bytes, bytes]] = []
        self._order: list[bytes] | None = None  # sorted keys of _writes; None when stale
        self._write_keys: list[bytes] = []
        self._write_ranges: list[KeyRange] = []
        self._write_bytes = 0
        self._stamp: bytes | None = None

    # The engine's part.

    @abstractmethod
    def _snapshot(self) -> int:
        """Take the snapshot if there is none; returns its version. Raises TooOld."""

    @abstractmethod
    def _base_get(self, key: bytes) -> bytes | None:
        """Read from the snapshot, which exists."""

    @abstractmethod
    def _base_iter(self, begin: bytes, end: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        """Walk the pairs of the snapshot, which exists, in ``[begin, end)``."""

    @abstractmethod
    def _base_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[tuple[bytes, bytes]]:
        """Read as _base_iter does, at most `limit` pairs when it is not 0."""

    @abstractmethod
    async def _commit(self) -> bytes:
        """Commit what is buffered; returns the versionstamp."""

    @abstractmethod
    def _release(self) -> None:
        """Let go of the snapshot. Called at the end, perhaps more than once."""

    async def _before_read(self) -> None:
        """Give faults a place to happen."""
        return

    # Reads.

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """Read one key; see the protocol."""
        self._check_open()
        if not FIRST_KEY <= key < KEYS_END or len(key) > KEY_BYTES_MAX:
            raise key_refused(key)
        own = self._own(key)
        if own is None or isinstance(own, bytes):
            return own
        if isinstance(own, tuple):
            raise KvError("the value gets its versionstamp at commit: it cannot be read in the same transaction")
        await self._before_read()
        self._snapshot()
        if not snapshot:
            self._read_keys.append(key)
        value = self._base_get(key)
        return value if own is _ABSENT else add_wrapping(value, own)

    async def get_range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = 0,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        """Read a range; see the protocol. Keys with a versionstamp of this transaction are not seen."""
        self._check_open()
        check_range(begin, end)
        if limit < 0:
            raise ValueError("limit must not be negative")
        if begin >= end:
            return []
        await self._before_read()
        self._snapshot()
        if self._writes or self._clears:
            rows = self._merged_range(begin, end, limit, reverse)
        else:
            rows = self._base_range(begin, end, limit, reverse)
        if not snapshot:
            if not limit or len(rows) < limit:
                self._read_ranges.append((begin, end))
            elif reverse:
                self._read_ranges.append((rows[-1][0], end))
            else:
                self._read_ranges.append((begin, rows[-1][0] + b"\x00"))
        return rows

    async def get_read_version(self) -> int:
        """Take the snapshot if there is none."""
        self._check_open()
        await self._before_read()
        return self._snapshot()

    # Writes.

    def set(self, key: bytes, value: bytes) -> None:
        """Buffer a write."""
        if type(value) is not bytes:
            raise TypeError(f"a value must be bytes, not {type(value).__name__}")
        self._check_write(key, len(value))
        if key not in self._writes:
            self._order = None
        self._writes[key] = value

    def clear(self, key: bytes) -> None:
        """Buffer a removal."""
        self._check_write(key, 0)
        if key not in self._writes:
            self._order = None
        self._writes[key] = None

    def clear_range(self, begin: bytes, end: bytes) -> None:
        """Buffer the removal of a range."""
        self._check_open()
        check_range(begin, end)
        if begin >= end:
            return
        self._write_bytes += len(begin) + len(end)
        for key in [key for key in self._writes if begin <= key < end]:
            del self._writes[key]
        self._order = None
        self._stamped_keys = [
            (prefix, suffix, value)
            for prefix, suffix, value in self._stamped_keys
            if not (begin <= prefix + NO_STAMP + suffix and prefix + _LAST_STAMP + suffix < end)
        ]
        kept: list[KeyRange] = []
        for b, e in self._clears:
            if e < begin or end < b:
                kept.append((b, e))
            else:
                begin, end = min(begin, b), max(end, e)
        kept.append((begin, end))
        kept.sort()
        self._clears = kept

    def add(self, key: bytes, delta: int) -> None:
        """Buffer an atomic addition."""
        self._check_write(key, 8)
        own = self._own(key)
        if isinstance(own, tuple):
            raise KvError("the value gets its versionstamp at commit: it cannot be added to")
        if own is _ABSENT:
            self._order = None
            self._writes[key] = delta
        elif isinstance(own, int):
            self._writes[key] = own + delta
        else:
            if key not in self._writes:
                self._order = None
            self._writes[key] = add_wrapping(own, delta)

    def set_versionstamped_key(self, prefix: bytes, suffix: bytes, value: bytes) -> None:
        """Buffer a write under a key with the stamp of the commit."""
        self._check_write(prefix + NO_STAMP + suffix, len(value))
        self._stamped_keys.append((prefix, suffix, value))

    def set_versionstamped_value(self, key: bytes, prefix: bytes, suffix: bytes = b"") -> None:
        """Buffer a value with the stamp of the commit; reading it in the same transaction raises KvError."""
        self._check_write(key, len(prefix) + VERSIONSTAMP_BYTES + len(suffix))
        if key not in self._writes:
            self._order = None
        self._writes[key] = (prefix, suffix)

    # Conflicts declared by the caller.

    def add_read_conflict_key(self, key: bytes) -> None:
        """Take the snapshot if there is none, and declare `key` as read."""
        self._check_open()
        check_range(key, key)
        self._snapshot()
        self._read_keys.append(key)

    def add_read_conflict_range(self, begin: bytes, end: bytes) -> None:
        """Take the snapshot if there is none, and declare the range as read."""
        self._check_open()
        check_range(begin, end)
        self._snapshot()
        if begin < end:
            self._read_ranges.append((begin, end))

    def add_write_conflict_key(self, key: bytes) -> None:
        """Declare `key` as written."""
        self._check_write(key, 0)
        self._write_keys.append(key)

    def add_write_conflict_range(self, begin: bytes, end: bytes) -> None:
        """Declare the range as written."""
        self._check_open()
        check_range(begin, end)
        if begin < end:
            self._write_ranges.append((begin, end))

    # The end.

    def unhurried(self) -> None:
        """Let the commit wait for company, where the engine profits from it."""
        self._hurried = False

    async def commit(self) -> None:
        """Commit; see the protocol. Always succeeds when nothing was written."""
        self._check_open()
        if not (self._writes or self._clears or self._stamped_keys or self._write_keys or self._write_ranges):
            self._state = State.COMMITTED
            self._release()
            return
        self._state = State.COMMITTING
        try:
            self._check_bytes()
            self._stamp = await self._commit()
            self._state = State.COMMITTED
        finally:
            if self._state is State.COMMITTING:
                self._state = State.FAILED
            self._release()

    def versionstamp(self) -> bytes:
        """Return the stamp; raises KvError before the commit or when nothing was written."""
        if self._state is not State.COMMITTED:
            raise KvError("only a committed transaction has a versionstamp")
        if self._stamp is None:
            raise KvError("a transaction that wrote nothing has no versionstamp")
        return self._stamp

    def cancel(self) -> None:
        """Give up."""
        if self._state is State.OPEN:
            self._state = State.CANCELLED
            self._release()

    # Helpers.

    def _check_open(self) -> None:
        if self._state is not State.OPEN:
            raise UsedAfterCommit(f"the transaction is {self._state.name.lower()}: take a new one")

    def _check_write(self, key: bytes, value_bytes: int) -> None:
        if self._state is not State.OPEN:
            self._check_open()
        if not FIRST_KEY <= key < KEYS_END or len(key) > KEY_BYTES_MAX:
            raise key_refused(key)
        if value_bytes > VALUE_BYTES_MAX:
            raise LimitExceeded(f"value of {value_bytes} bytes: the limit is {VALUE_BYTES_MAX}")
        self._write_bytes += len(key) + value_bytes

    def _check_bytes(self) -> None:
        """Conflict keys count too, as in FoundationDB; they are summed only when they could matter."""
        total = self._write_bytes
        declared = len(self._read_keys) + 2 * len(self._read_ranges) + len(self._write_keys)
        declared += 2 * len(self._write_ranges)
        if total + declared * (KEY_BYTES_MAX + 1) > TRANSACTION_BYTES_MAX:
            total += sum(map(len, self._read_keys)) + sum(map(len, self._write_keys))
            total += sum(len(b) + len(e) for b, e in self._read_ranges)
            total += sum(len(b) + len(e) for b, e in self._write_ranges)
            if total > TRANSACTION_BYTES_MAX:
                raise LimitExceeded(f"transaction of {total} bytes: the limit is {TRANSACTION_BYTES_MAX}")

    def _cleared(self, key: bytes) -> bool:
        at = bisect_right(self._clears, key, key=_range_begin) - 1
        return at >= 0 and key < self._clears[at][1]

    def _own(self, key: bytes) -> Write | _Absent:
        own: Write | _Absent = self._writes.get(key, _ABSENT)
        if own is _ABSENT and self._clears and self._cleared(key):
            return None
        return own

    def _merged_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[tuple[bytes, bytes]]:
        if self._order is None:
            self._order = sorted(self._writes)
        own = self._order[bisect_left(self._order, begin) : bisect_left(self._order, end)]
        if not own and not any(b < end and begin < e for b, e in self._clears):
            return self._base_range(begin, end, limit, reverse)
        rows: list[tuple[bytes, bytes]] = []
        for row in self._merge(own, begin, end, reverse):
            rows.append(row)
            if len(rows) == limit:
                break
        return rows

    def _merge(self, own: list[bytes], begin: bytes, end: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        """Walk the snapshot's pairs with `own` (sorted keys of this transaction's writes) laid over them."""
        own = own[::-1] if reverse else own
        at = 0
        for key, value in self._base_iter(begin, end, reverse):
            while at < len(own) and (own[at] > key if reverse else own[at] < key):
                mine = self._visible(own[at], None)
                if mine is not None:
                    yield own[at], mine
                at += 1
            if at < len(own) and own[at] == key:
                mine = self._visible(key, value)
                if mine is not None:
                    yield key, mine
                at += 1
            elif not self._cleared(key):
                yield key, value
        for key in own[at:]:
            mine = self._visible(key, None)
            if mine is not None:
                yield key, mine

    def _visible(self, key: bytes, base: bytes | None) -> bytes | None:
        """Return what this transaction sees at a key that it wrote."""
        own = self._writes[key]
        if isinstance(own, int):
            return add_wrapping(base, own)
        if isinstance(own, tuple):
            raise KvError("a value in the range gets its versionstamp at commit: it cannot be read before")
        return own

    def _written(self, stamp: bytes) -> tuple[list[bytes], list[KeyRange]]:
        """Return the write conflict keys and ranges of a commit with this versionstamp."""
        keys = list(self._writes)
        if self._stamped_keys:
            keys.extend(prefix + stamp + suffix for prefix, suffix, _ in self._stamped_keys)
        if self._write_keys:
            keys.extend(self._write_keys)
        if self._write_ranges:
            return keys, self._clears + self._write_ranges
        return keys, self._clears
