"""The in-memory engine: for tests and simulation. Multi-version, one process, nothing is durable."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator

from fs3.kv.api import TRANSACTION_MS_MAX, CommitUnknown, Conflict, TooOld, Unavailable
from fs3.kv.buffer import BufferedTransaction, add_wrapping
from fs3.kv.conflicts import ConflictLog, Entry
from fs3.kv.faults import CommitFault, KvFaults

_ORDER_ZERO = (0).to_bytes(2, "big")


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class MemoryKv:
    """A store in this process's memory; see :class:`fs3.kv.api.KvStore`.

    ``now_ms`` is a monotonic clock in milliseconds; old versions are kept for the conflict window of it.
    ``faults`` makes reads and commits fail as a remote store's do.
    """

    def __init__(self, *, now_ms: Callable[[], int] = _monotonic_ms, faults: KvFaults | None = None) -> None:
        self.faults = faults
        self._now_ms = now_ms
        self._version = 0
        self._closed = False
        self._log = ConflictLog(0)
        # Per key: (version, value) in order of version; value None is a clear. `_keys` is sorted and holds
        # exactly the keys of `_history`.
        self._history: dict[bytes, list[tuple[int, bytes | None]]] = {}
        self._keys: list[bytes] = []

    def transaction(self) -> MemoryTransaction:
        """Make a new transaction."""
        return MemoryTransaction(self)

    async def close(self) -> None:
        """Make every later operation raise Unavailable."""
        self._closed = True

    def _check_usable(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")

    def _newest(self, key: bytes) -> bytes | None:
        history = self._history.get(key)
        return history[-1][1] if history else None

    def _at(self, key: bytes, version: int) -> bytes | None:
        for written, value in reversed(self._history.get(key, ())):
            if written <= version:
                return value
        return None

    def _put(self, key: bytes, version: int, value: bytes | None) -> None:
        history = self._history.get(key)
        if history is None:
            if value is None:
                return
            history = self._history[key] = []
            insort(self._keys, key)
        if history and history[-1][0] == version:
            history.pop()
        history.append((version, value))

    def _apply(self, txn: MemoryTransaction) -> bytes:
        now_ms = self._now_ms()
        self._forget(now_ms)
        if txn._version is not None:
            if txn._version < self._log.floor or now_ms - txn._started_ms > TRANSACTION_MS_MAX:
                raise TooOld("the snapshot is older than a transaction may be: run the transaction again")
            if self._log.conflicts(txn._version, txn._read_keys, txn._read_ranges):
                raise Conflict("something this transaction read has changed: run it again")
        self._version = version = self._version + 1
        stamp = version.to_bytes(8, "big") + _ORDER_ZERO
        for begin, end in txn._clears:
            for key in self._keys[bisect_left(self._keys, begin) : bisect_left(self._keys, end)]:
                self._put(key, version, None)
        for key, write in txn._writes.items():
            if isinstance(write, int):
                write = add_wrapping(self._newest(key), write)
            elif isinstance(write, tuple):
                write = write[0] + stamp + write[1]
            self._put(key, version, write)
        for prefix, suffix, value in txn._stamped_keys:
            self._put(prefix + stamp + suffix, version, value)
        keys, ranges = txn._written(stamp)
        self._log.append(Entry(version, now_ms, keys, list(ranges)))
        return stamp

    def _forget(self, now_ms: int) -> None:
        """Drop versions that no permitted snapshot can see."""
        touched: set[bytes] = set()
        for entry in self._log.prune(now_ms):
            touched.update(entry.keys)
            for begin, end in entry.ranges:
                touched.update(self._keys[bisect_left(self._keys, begin) : bisect_left(self._keys, end)])
        for key in touched:
            history = self._history.get(key)
            if history is None:
                continue
            while len(history) > 1 and history[1][0] <= self._log.floor:
                del history[0]
            if len(history) == 1 and history[0][1] is None and history[0][0] <= self._log.floor:
                del self._history[key]
                del self._keys[bisect_left(self._keys, key)]


class MemoryTransaction(BufferedTransaction):
    """A transaction of :class:`MemoryKv`."""

    __slots__ = ("_started_ms", "_store", "_version")

    def __init__(self, store: MemoryKv) -> None:
        super().__init__()
        self._store = store
        self._version: int | None = None
        self._started_ms = 0

    async def _before_read(self) -> None:
        faults = self._store.faults
        if faults is not None:
            await faults.delay()
            faults.on_read()

    def _snapshot(self) -> int:
        store = self._store
        store._check_usable()
        if self._version is None:
            self._version = store._version
            self._started_ms = store._now_ms()
        elif self._version < store._log.floor or store._now_ms() - self._started_ms > TRANSACTION_MS_MAX:
            raise TooOld("the snapshot is older than a transaction may be: run the transaction again")
        return self._version

    def _base_get(self, key: bytes) -> bytes | None:
        assert self._version is not None
        return self._store._at(key, self._version)

    def _base_iter(self, begin: bytes, end: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        assert self._version is not None
        store = self._store
        keys = store._keys[bisect_left(store._keys, begin) : bisect_left(store._keys, end)]
        for key in reversed(keys) if reverse else keys:
            value = store._at(key, self._version)
            if value is not None:
                yield key, value

    def _base_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[tuple[bytes, bytes]]:
        rows: list[tuple[bytes, bytes]] = []
        for row in self._base_iter(begin, end, reverse):
            rows.append(row)
            if len(rows) == limit:
                break
        return rows

    async def _commit(self) -> bytes:
        # Every engine gives way to other tasks here; callers must not rely on a commit without a pause.
        await asyncio.sleep(0)
        faults = self._store.faults
        if faults is not None:
            await faults.delay()
        self._store._check_usable()
        fault = None if faults is None else faults.on_commit()
        if fault is CommitFault.UNKNOWN_NOT_APPLIED:
            raise CommitUnknown("injected: the outcome is not known")
        stamp = self._store._apply(self)
        if faults is not None:
            await faults.delay()
        if fault is CommitFault.UNKNOWN_APPLIED:
            raise CommitUnknown("injected: the outcome is not known")
        return stamp

    def _release(self) -> None:
        pass
