"""The embedded engine: an LMDB directory that several processes of one machine open at the same time.

Reads come from an LMDB read transaction, held for the life of the transaction. Commits are validated as
FoundationDB's resolver does, against a log of recent writes kept in the same tree, and written in groups by
one thread per process (:mod:`fs3.kv.lmdb_commit`). A version is the id of the LMDB write transaction.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import lmdb

from fs3.kv import lmdb_records as records
from fs3.kv import lmdb_wal
from fs3.kv.api import TRANSACTION_MS_MAX, KvError, TooOld, Unavailable
from fs3.kv.buffer import FIRST_KEY, KEYS_END, BufferedTransaction, State
from fs3.kv.lmdb_commit import QUEUED_TRANSACTIONS_MAX, Committer, Request

MAP_BYTES = 64 << 30
READERS_MAX = 8_192
SPARE_READERS = 256
SWEEP_INTERVAL_S = 1.0
# How long an unhurried commit waits for another one, and how many of them wait at most.
COMPANY_S_MAX = 0.002
COMPANY_WAITING_MAX = 8
# After waits in vain as many unhurried commits do not wait, doubled from 1 up to this.
COMPANY_SKIPS_MAX = 256


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class _Environment:
    """One directory opened by this process; shared by every LmdbKv on it, because LMDB permits only one."""

    _open: ClassVar[dict[str, _Environment]] = {}
    _lock = threading.Lock()

    def __init__(self, path: str, durable: bool, map_bytes: int, now_ms: Callable[[], int]) -> None:
        self.path = path
        self.durable = durable
        self.users = 0

        def open_tree(directory: Path, sync: bool) -> Any:
            return _open_lmdb(str(directory), sync, map_bytes)

        try:
            self._users_fd = lmdb_wal.prepare(Path(path), durable, open_tree)
        except (OSError, lmdb.Error) as error:
            raise KvError(f"cannot prepare the key-value store {path}: {error}") from error
        try:
            self.env = _open_lmdb(path, False, map_bytes)
        except BaseException:
            os.close(self._users_fd)
            raise
        try:
            self.env.reader_check()
            self.base = _prepare(self.env, path)
            self.snapshots = lmdb_wal.Snapshots(Path(path), self.env)
            self.wal = lmdb_wal.Wal(Path(path)) if durable else None
            self.committer = Committer(self.env, self.base, now_ms, self.wal, self.snapshots)
        except BaseException:
            self.env.close()
            os.close(self._users_fd)
            raise

    @classmethod
    def acquire(cls, path: Path, durable: bool, map_bytes: int, now_ms: Callable[[], int]) -> _Environment:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise KvError(f"cannot make the directory of the key-value store {path}: {error.strerror}") from error
        name = os.path.realpath(path)
        with cls._lock:
            shared = cls._open.get(name)
            if shared is None:
                shared = cls._open[name] = _Environment(name, durable, map_bytes, now_ms)
            elif shared.durable != durable:
                raise KvError(f"{name} is already open in this process with durable={shared.durable}")
            shared.users += 1
            return shared

    def release(self) -> None:
        """Blocks until queued commits are done when this was the last user."""
        with self._lock:
            self.users -= 1
            if self.users:
                return
            del self._open[self.path]
            self.committer.stop()
            self.snapshots.wait()
            if self.wal is not None:
                self.wal.close()
            self.env.close()
            os.close(self._users_fd)


def _open_lmdb(path: str, sync: bool, map_bytes: int) -> Any:
    try:
        return lmdb.open(
            path,
            map_size=map_bytes,
            sync=sync,
            metasync=sync,
            max_readers=READERS_MAX,
            max_spare_txns=SPARE_READERS,
            readahead=False,
            meminit=False,
        )
    except (lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.CorruptedError) as error:
        raise KvError(f"{path} is not an fs3 key-value store, or is damaged: {error}") from error
    except (lmdb.Error, OSError) as error:
        raise KvError(f"cannot open the key-value store {path}: {error}") from error


def _prepare(env: Any, path: str) -> int:
    """Check or write the format record; returns what is added to LMDB transaction ids to make versions."""
    with env.begin() as txn:
        record = txn.get(records.FORMAT_KEY)
        if record is not None and _checked_format(record, path) == records.FORMAT:
            base = int.from_bytes(txn.get(records.BASE_KEY) or b"", "big")
            if _newest_logged(txn) <= base + txn.id():
                return base
        elif record is None and txn.stat()["entries"]:
            raise KvError(f"{path} is an LMDB directory of another program: choose another path")
    with env.begin(write=True) as txn:
        record = txn.get(records.FORMAT_KEY)
        if record is not None:
            _checked_format(record, path)
        txn.put(records.FORMAT_KEY, records.encode_format(records.FORMAT))
        base = int.from_bytes(txn.get(records.BASE_KEY) or b"", "big")
        newest = _newest_logged(txn)
        if newest > base + txn.id():
            # A compacting copy starts LMDB's ids over; versions and stamps must go on from where they were.
            base = newest
            txn.put(records.BASE_KEY, base.to_bytes(8, "big"))
        return base


def _checked_format(record: bytes, path: str) -> int:
    version = records.decode_format(record)
    if version > records.FORMAT:
        raise KvError(
            f"{path} has key-value format {version}, this fs3 knows {records.FORMAT}: upgrade fs3 on this machine"
        )
    if version < 1:
        raise KvError(f"{path} is not an fs3 key-value store: its format record is damaged")
    return version


def _newest_logged(txn: Any) -> int:
    cursor = txn.cursor()
    found = cursor.set_range(records.LOG_END)
    found = cursor.prev() if found else cursor.last()
    if not found or not cursor.key().startswith(records.LOG_PREFIX):
        return 0
    return records.log_version(cursor.key())


class _Company:
    """Learns whether unhurried commits find others to share a write to the disk with.

    A single writer that waits for its own commit before it goes on never meets anybody: its commits soon stop waiting.
    """

    def __init__(self) -> None:
        self._skips = 0
        self._next_skips = 1

    def worth_waiting(self) -> bool:
        """Whether the next unhurried commit should wait."""
        self._skips = max(0, self._skips - 1)
        return self._skips == 0

    def found(self, company: bool) -> None:
        """A wait has ended."""
        if company:
            self._next_skips = 1
        else:
            self._skips = self._next_skips + 1
            self._next_skips = min(2 * self._next_skips, COMPANY_SKIPS_MAX)


class LmdbKv:
    """A store in a directory; see :class:`fs3.kv.api.KvStore`.

    ``durable``: a commit returns when it is in a log on the disk and survives a power loss (:mod:`fs3.kv.lmdb_wal`).
    Without it a commit survives the end of every process, but a crash of the machine may lose or damage the whole
    store. All processes that have the directory open choose the same. ``map_bytes`` bounds the size of the
    data file, which is sparse; processes that share the directory should use the same. ``now_ms`` is a
    monotonic clock in milliseconds, common to all processes of the machine.

    Used from one event loop. Opening waits for the disk, and raises KvError when the directory cannot be used.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        durable: bool = True,
        map_bytes: int = MAP_BYTES,
        now_ms: Callable[[], int] = _monotonic_ms,
    ) -> None:
        self._shared = _Environment.acquire(Path(path), durable, map_bytes, now_ms)
        self._env = self._shared.env
        self._base = self._shared.base
        self._now_ms = now_ms
        self._closed = False
        self._pending: list[Request] = []
        self._turn_commits = 0
        self._one_at_a_time = False
        self._unhurried: list[Request] = []
        self._company = _Company()
        self._company_timer: asyncio.TimerHandle | None = None
        self._in_flight = 0
        self._live: dict[LmdbTransaction, None] = {}  # those that hold a snapshot, oldest first
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def path(self) -> str:
        """Return the directory."""
        return self._shared.path

    @property
    def batches(self) -> int:
        """Count the LMDB write transactions made by this process since the directory was opened."""
        return self._shared.committer.batches

    def transaction(self) -> LmdbTransaction:
        """Make a new transaction."""
        return LmdbTransaction(self)

    async def close(self) -> None:
        """Finish the commits that are queued, then release the directory. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for transaction in list(self._live):
            transaction._release()
        self._flush()
        await asyncio.get_running_loop().run_in_executor(None, self._shared.release)

    def _begin(self) -> Any:
        if self._closed:
            raise Unavailable("the store is closed")
        try:
            return self._env.begin()
        except lmdb.ReadersFullError:
            self._env.reader_check()  # frees the slots of processes that died
        except lmdb.MapResizedError as error:
            raise Unavailable(
                f"another process opened {self.path} with a larger map: use the same map_bytes ({error})"
            ) from error
        try:
            return self._env.begin()
        except lmdb.ReadersFullError as error:
            raise Unavailable(f"more than {READERS_MAX} transactions are open on {self.path}") from error

    def _enqueue(self, transaction: LmdbTransaction) -> asyncio.Future[bytes]:
        if self._closed:
            raise Unavailable("the store is closed")
        if self._in_flight >= QUEUED_TRANSACTIONS_MAX:
            raise Unavailable(f"more than {QUEUED_TRANSACTIONS_MAX} commits are waiting")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not (transaction._hurried or self._pending) and self._shared.durable and self._company.worth_waiting():
            self._unhurried.append((transaction, future))
            if len(self._unhurried) == 1:
                self._company_timer = loop.call_later(COMPANY_S_MAX, self._flush)
            elif len(self._unhurried) >= COMPANY_WAITING_MAX:
                self._flush()
            return future
        self._pending.append((transaction, future))
        self._turn_commits += 1
        if self._turn_commits == 1:
            # Everything that commits in this turn of the loop goes to the committer in one piece; but when commits
            # came one at a time in the last turn, the first does not wait for the end of this one.
            loop.call_soon(self._end_turn)
            if self._one_at_a_time:
                self._flush()
        return future

    def _end_turn(self) -> None:
        self._one_at_a_time = self._turn_commits == 1
        self._turn_commits = 0
        self._flush()

    def _flush(self) -> None:
        if self._unhurried:
            if self._company_timer is not None:
                self._company_timer.cancel()
            self._company.found(len(self._unhurried) + len(self._pending) > 1)
            self._pending = self._unhurried + self._pending
            self._unhurried = []
        if self._pending:
            pending, self._pending = self._pending, []
            committer = self._shared.committer
            if not committer.commit_here(pending):
                committer.submit(pending)

    def _track(self, transaction: LmdbTransaction) -> None:
        self._live[transaction] = None
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, self._sweep)

    def _sweep(self) -> None:
        """Take the snapshot from transactions over their time: it keeps LMDB from reusing pages."""
        self._sweeper = None
        now_ms = self._now_ms()
        for transaction in list(self._live):
            if now_ms - transaction._started_ms <= TRANSACTION_MS_MAX:
                break
            transaction._release()
        if self._live:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_INTERVAL_S, self._sweep)


class LmdbTransaction(BufferedTransaction):
    """A transaction of :class:`LmdbKv`."""

    __slots__ = ("__weakref__", "_reader", "_started_ms", "_store", "_version")

    def __init__(self, store: LmdbKv) -> None:
        super().__init__()
        self._store = store
        self._version: int | None = None
        self._started_ms = 0
        # LMDB's read transaction. None while `_version` is set: the snapshot was taken away or given back.
        self._reader: Any = None

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """Read one key; see the protocol."""
        if self._writes or self._clears or len(key) > records.SHORT_KEY_BYTES_MAX:
            return await super().get(key, snapshot=snapshot)
        # The short way for the common case; its checks are those of the long one.
        if self._state is not State.OPEN or not FIRST_KEY <= key < KEYS_END:
            return await super().get(key, snapshot=snapshot)
        self._snapshot()
        if not snapshot:
            self._read_keys.append(key)
        value: bytes | None = self._reader.get(key)
        return value

    def _snapshot(self) -> int:
        store = self._store
        if self._version is None:
            reader = store._begin()
            self._reader = reader
            self._version = store._base + int(reader.id())
            self._started_ms = store._now_ms()
            store._track(self)
        elif store._closed:
            raise Unavailable("the store is closed")
        elif self._reader is None or store._now_ms() - self._started_ms > TRANSACTION_MS_MAX:
            raise TooOld("the snapshot is older than a transaction may be: run the transaction again")
        return self._version

    def _base_get(self, key: bytes) -> bytes | None:
        return records.get(self._reader, key)

    def _base_iter(self, begin: bytes, end: bytes, reverse: bool) -> Iterator[tuple[bytes, bytes]]:
        return records.iterate(self._reader, begin, end, reverse)

    def _base_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[tuple[bytes, bytes]]:
        return list(islice(records.iterate(self._reader, begin, end, reverse), limit or None))

    async def _commit(self) -> bytes:
        # Given back before the wait: a snapshot that is held keeps LMDB from reusing pages.
        self._release()
        store = self._store
        future = store._enqueue(self)
        store._in_flight += 1
        try:
            return await future
        finally:
            store._in_flight -= 1

    def _release(self) -> None:
        reader = self._reader
        if reader is not None:
            self._reader = None
            reader.abort()
            self._store._live.pop(self, None)
