"""The transaction interface of the key-value store: FoundationDB's model, the same limits on every engine.

Transactions are optimistic and strictly serializable. Reads come from one snapshot, taken at the first read;
a transaction sees its own writes. At commit every key and range that was read (without ``snapshot=True``) or
declared with ``add_read_conflict_*`` is checked against what was committed since the snapshot; blind writes
and atomic adds never conflict. Source of the model: https://apple.github.io/foundationdb/developer-guide.html

A transaction belongs to one task. After an error from :meth:`Transaction.commit` it is finished; take a new
one, or let :func:`fs3.kv.retry.run` do all of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

KEY_BYTES_MAX = 10_000
VALUE_BYTES_MAX = 100_000
TRANSACTION_BYTES_MAX = 10_000_000
TRANSACTION_MS_MAX = 5_000
VERSIONSTAMP_BYTES = 10

T = TypeVar("T")


class KvError(Exception):
    """An error of the store. ``retryable``: running the whole transaction again may succeed.

    ``maybe_committed``: the transaction may or may not have taken effect.
    """

    retryable = False
    maybe_committed = False


class Conflict(KvError):
    """Something that was read has changed since; nothing was written (FoundationDB 1020)."""

    retryable = True


class TooOld(KvError):
    """The snapshot is older than TRANSACTION_MS_MAX; nothing was written (1007)."""

    retryable = True


class CommitUnknown(KvError):
    """The outcome of the commit is not known (1021, 1039)."""

    retryable = True
    maybe_committed = True


class Unavailable(KvError):
    """The store cannot be reached or cannot make progress now."""

    retryable = True


class LimitExceeded(KvError):
    """A key, value or transaction is over its limit (2101, 2102, 2103). A bug of the caller."""


class UsedAfterCommit(KvError):
    """The transaction is finished (2017)."""


class StoreFull(KvError):
    """The disk or the map of the store is full; nothing was written."""


class Transaction(Protocol):
    """One transaction. Keys and values are bytes; ranges are ``[begin, end)``.

    A key is not empty and does not begin with 0xff (LimitExceeded): that space belongs to the store. So the
    range of all keys is from ``b""`` to the one byte 0xff.

    Where a transaction wrote a versionstamp it must not read: engines may raise KvError, also for ranges that could
    hold a stamped key.
    """

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """Return the value of `key`, or None. Raises TooOld, Unavailable."""

    async def get_range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = 0,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        """Return pairs in key order (or the reverse), at most `limit` when it is not 0.

        With a limit the conflict range ends at the last key returned.
        """

    async def get_read_version(self) -> int:
        """Return the version of the snapshot. Versions grow with every commit that writes."""

    def set(self, key: bytes, value: bytes) -> None:
        """Write. Raises LimitExceeded."""

    def clear(self, key: bytes) -> None:
        """Remove `key` if it is there."""

    def clear_range(self, begin: bytes, end: bytes) -> None:
        """Remove every key of the range."""

    def add(self, key: bytes, delta: int) -> None:
        """Atomically add to a little-endian signed 64-bit value (absent: 0), wrapping; no read conflict."""

    def set_versionstamped_key(self, prefix: bytes, suffix: bytes, value: bytes) -> None:
        """Write ``prefix + versionstamp + suffix``; the 10-byte stamp is that of this commit."""

    def set_versionstamped_value(self, key: bytes, prefix: bytes, suffix: bytes = b"") -> None:
        """Write ``prefix + versionstamp + suffix`` as the value of `key`."""

    def add_read_conflict_key(self, key: bytes) -> None:
        """Conflict as if `key` had been read at the snapshot."""

    def add_read_conflict_range(self, begin: bytes, end: bytes) -> None:
        """Conflict as if the range had been read at the snapshot."""

    def add_write_conflict_key(self, key: bytes) -> None:
        """Make others that read `key` conflict, without writing it."""

    def add_write_conflict_range(self, begin: bytes, end: bytes) -> None:
        """Make others that read in the range conflict, without writing it."""

    def unhurried(self) -> None:
        """Say that nothing waits for this commit alone: it may wait some milliseconds to share another one's cost."""

    async def commit(self) -> None:
        """Commit; returns when the effect is durable (by the engine's setting) and visible to all.

        Raises Conflict, TooOld, CommitUnknown, LimitExceeded, StoreFull, Unavailable.
        """

    def versionstamp(self) -> bytes:
        """Return the 10-byte stamp of this committed transaction (big-endian version and order within it)."""

    def cancel(self) -> None:
        """Give up; releases the snapshot. Harmless after the end."""


class KvStore(Protocol):
    """A store. Safe for use from the tasks of one event loop."""

    def transaction(self) -> Transaction:
        """Make a new transaction; nothing is read until its first read."""

    async def close(self) -> None:
        """Release everything. Transactions that are still open fail."""


TransactionFn = Callable[[Transaction], Awaitable[T]]


def strinc(prefix: bytes) -> bytes:
    """Return the first key after every key that starts with `prefix` (which must not be all 0xff)."""
    stripped = prefix.rstrip(b"\xff")
    if not stripped:
        raise ValueError("a prefix of 0xff bytes has no end")
    return stripped[:-1] + bytes([stripped[-1] + 1])
