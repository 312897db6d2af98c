"""The FoundationDB engine, on the official binding (package ``foundationdb``, module ``fdb``).

The binding's futures become ready on its network thread, which is started once per process. They are handed to the
event loop in bunches; nothing here waits in a thread. Reads, own writes and conflicts are FoundationDB's.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter, methodcaller
from pathlib import Path
from typing import Any, TypeVar

from fs3.kv.api import (
    KEY_BYTES_MAX,
    TRANSACTION_MS_MAX,
    VALUE_BYTES_MAX,
    VERSIONSTAMP_BYTES,
    KvError,
    LimitExceeded,
    Unavailable,
    UsedAfterCommit,
)
from fs3.kv.buffer import FIRST_KEY, KEYS_END, NO_STAMP, State, check_range, key_refused
from fs3.kv.fdb_errors import commit_error, describe, read_error

API_VERSION = 730
DEFAULT_CLUSTER_FILE = "/etc/foundationdb/fdb.cluster"
# What a transaction read is worthless after this time, so nothing is won by waiting longer for its answers.
TIMEOUT_MS = TRANSACTION_MS_MAX
_STAMP_OFFSET_BYTES = 4

T = TypeVar("T")

_VALUE: Callable[[Any], Any] = attrgetter("value")
_WAIT: Callable[[Any], Any] = methodcaller("wait")


class _Process:
    """What this process has of FoundationDB: its network thread does not survive a fork."""

    used = False
    forked = False


def _after_fork() -> None:
    _Process.forked = _Process.used


os.register_at_fork(after_in_child=_after_fork)


def _check_not_forked() -> None:
    if _Process.forked:
        raise KvError(
            "this process was forked from one that uses FoundationDB, whose client does not survive that: "
            "start it by exec (multiprocessing: the spawn method)"
        )


def load_binding() -> Any:
    """Return the official binding with the API version selected. Raises KvError that says what to install."""
    try:
        import fdb
    except ImportError as error:
        raise KvError("the Python package foundationdb is missing: pip install 'foundationdb>=7.3,<7.4'") from error
    try:
        fdb.api_version(API_VERSION)
    except Exception as error:  # the binding raises bare Exception and RuntimeError here
        raise KvError(
            f"FoundationDB's client library (libfdb_c.so) cannot be used: {error} Install the package "
            "foundationdb-clients, 7.3 or newer: https://github.com/apple/foundationdb/releases"
        ) from error
    return fdb


def find_cluster_file(path: str | os.PathLike[str] | None = None) -> str:
    """Return `path`, else $FDB_CLUSTER_FILE, else the default one. Raises KvError when it cannot be read."""
    chosen = os.fspath(path or os.environ.get("FDB_CLUSTER_FILE") or DEFAULT_CLUSTER_FILE)
    try:
        Path(chosen).read_bytes()
    except OSError as error:
        hint = "" if path else "; name it as fdb:/path or in FDB_CLUSTER_FILE"
        raise KvError(f"cannot read the FoundationDB cluster file {chosen}: {error.strerror}{hint}") from error
    return chosen


class _Completions:
    """Hands futures from the network thread to the event loop, as many per wake-up as have come."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ready: deque[tuple[asyncio.Future[None], Any]] = deque()
        self._woken = False
        self._pending = 0
        self._idle: asyncio.Future[None] | None = None

    def watch(self, native: Any, transaction: Any) -> asyncio.Future[None]:
        """Return a future that is done once `native` is ready; `transaction` is kept until then.

        The binding lets a transaction go, which fails its futures, when nobody refers to it.
        """
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._pending += 1
        native.on_ready(lambda _: self._put(waiter, transaction))
        return waiter

    def _put(self, waiter: asyncio.Future[None], transaction: Any) -> None:
        """Runs on the network thread, or on the caller's when the future is ready already."""
        self._ready.append((waiter, transaction))
        if not self._woken:
            self._woken = True
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        # Before the queue is emptied: what comes later makes a wake-up of its own.
        self._woken = False
        while self._ready:
            waiter, _ = self._ready.popleft()
            self._pending -= 1
            if not waiter.done():
                waiter.set_result(None)
        if not self._pending and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def wait_idle(self) -> None:
        """Return when no future is pending. Timeouts bound it."""
        if self._pending:
            self._idle = self._loop.create_future()
            await self._idle


class FdbKv:
    """A store in a FoundationDB cluster, whose whole key space it uses; see :class:`fs3.kv.api.KvStore`.

    ``cluster_file``: None for $FDB_CLUSTER_FILE or the default. ``timeout_ms``: a transaction that is older fails with
    Unavailable, or with CommitUnknown during its commit, so that nothing waits for ever for a cluster that is
    away. ``binding`` is the module ``fdb``, or what stands for it in tests.

    Opening does not connect. Used from one event loop; not usable in a forked child.
    """

    def __init__(
        self,
        cluster_file: str | os.PathLike[str] | None = None,
        *,
        timeout_ms: int = TIMEOUT_MS,
        binding: Any = None,
    ) -> None:
        _check_not_forked()
        self.cluster_file = find_cluster_file(cluster_file)
        self._fdb = load_binding() if binding is None else binding
        self._timeout_ms = timeout_ms
        self._closed = False
        self._completions: _Completions | None = None
        try:
            self._database = self._fdb.open(self.cluster_file)
        except self._fdb.FDBError as error:
            raise KvError(f"cannot open {self.cluster_file}: {describe(error)}") from error
        _Process.used = True

    def transaction(self) -> FdbTransaction:
        """Make a new transaction. Raises Unavailable once the store is closed."""
        return FdbTransaction(self)

    async def close(self) -> None:
        """Let commits that are under way end, at most for the timeout. Harmless when repeated."""
        self._closed = True
        if self._completions is not None:
            await self._completions.wait_idle()

    def _check_usable(self) -> None:
        if self._closed:
            raise Unavailable("the store is closed")

    def _create(self) -> Any:
        _check_not_forked()
        self._check_usable()
        try:
            native = self._database.create_transaction()
            native.options.set_timeout(self._timeout_ms)
        except self._fdb.FDBError as error:
            raise read_error(error) from error
        return native

    def _watch(self, future: Any, native: Any) -> asyncio.Future[None]:
        completions = self._completions
        if completions is None:
            completions = self._completions = _Completions(asyncio.get_running_loop())
        return completions.watch(future, native)


class FdbTransaction:
    """A transaction of :class:`FdbKv`; see :class:`fs3.kv.api.Transaction`."""

    __slots__ = ("_native", "_read_version", "_stamp", "_state", "_store", "_written")

    def __init__(self, store: FdbKv) -> None:
        self._store = store
        self._native = store._create()
        self._state = State.OPEN
        self._written = False
        self._read_version: Any = None
        # The binding's future of the versionstamp; set by a commit that wrote.
        self._stamp: Any = None

    # Reads.

    async def get(self, key: bytes, *, snapshot: bool = False) -> bytes | None:
        """Read one key; see the protocol."""
        self._check_open()
        if not FIRST_KEY <= key < KEYS_END or len(key) > KEY_BYTES_MAX:
            raise key_refused(key)
        reader = self._native.snapshot if snapshot else self._native
        value: bytes | None = await self._result(reader.get(key), _VALUE)
        return value

    async def get_range(
        self,
        begin: bytes,
        end: bytes,
        *,
        limit: int = 0,
        reverse: bool = False,
        snapshot: bool = False,
    ) -> list[tuple[bytes, bytes]]:
        """Read a range; see the protocol. With a limit it comes in one answer, else in answers as large as may be."""
        self._check_open()
        check_range(begin, end)
        if limit < 0:
            raise ValueError("limit must not be negative")
        rows: list[tuple[bytes, bytes]] = []
        if begin >= end:
            return rows
        fdb = self._store._fdb
        reader = self._native.snapshot if snapshot else self._native
        mode = fdb.StreamingMode.exact if limit else fdb.StreamingMode.want_all
        first = fdb.KeySelector.first_greater_or_equal(begin)
        last = fdb.KeySelector.first_greater_or_equal(end)
        iteration = 0
        while True:
            iteration += 1
            rest = limit - len(rows) if limit else 0
            future = reader._get_range(first, last, rest, mode, iteration, reverse)
            page, _, more = await self._result(future, _WAIT)
            rows.extend((pair.key, pair.value) for pair in page)
            if not page or not more or len(rows) == limit:
                return rows
            if reverse:
                last = fdb.KeySelector.first_greater_or_equal(page[-1].key)
            else:
                first = fdb.KeySelector.first_greater_than(page[-1].key)

    async def get_read_version(self) -> int:
        """Take the snapshot if there is none."""
        self._check_open()
        version: int = await self._result(self._native.get_read_version(), _WAIT)
        return version

    async def _result(self, future: Any, take: Callable[[Any], T]) -> T:
        self._store._check_usable()
        await self._store._watch(future, self._native)
        try:
            return take(future)
        except self._store._fdb.FDBError as error:
            raise read_error(error) from error

    # Writes.

    def set(self, key: bytes, value: bytes) -> None:
        """Write."""
        if type(value) is not bytes:
            raise TypeError(f"a value must be bytes, not {type(value).__name__}")
        self._check_write(key, len(value))
        self._native.set(key, value)

    def clear(self, key: bytes) -> None:
        """Remove."""
        self._check_write(key, 0)
        self._native.clear(key)

    def clear_range(self, begin: bytes, end: bytes) -> None:
        """Remove a range."""
        self._check_open()
        check_range(begin, end)
        if begin < end:
            self._written = True
            self._native.clear_range(begin, end)

    def add(self, key: bytes, delta: int) -> None:
        """Add atomically."""
        self._check_write(key, 8)
        self._native.add(key, (delta & 0xFFFF_FFFF_FFFF_FFFF).to_bytes(8, "little"))

    def set_versionstamped_key(self, prefix: bytes, suffix: bytes, value: bytes) -> None:
        """Write under a key with the stamp of the commit."""
        key = prefix + NO_STAMP + suffix
        self._check_write(key, len(value))
        self._native.set_versionstamped_key(key + _stamp_offset(prefix), value)

    def set_versionstamped_value(self, key: bytes, prefix: bytes, suffix: bytes = b"") -> None:
        """Write a value with the stamp of the commit; reading it in the same transaction raises KvError."""
        self._check_write(key, len(prefix) + VERSIONSTAMP_BYTES + len(suffix))
        self._native.set_versionstamped_value(key, prefix + NO_STAMP + suffix + _stamp_offset(prefix))

    # Conflicts declared by the caller.

    def add_read_conflict_key(self, key: bytes) -> None:
        """Declare `key` as read."""
        self.add_read_conflict_range(key, key + b"\x00")

    def add_read_conflict_range(self, begin: bytes, end: bytes) -> None:
        """Declare the range as read."""
        self._check_open()
        check_range(begin, end)
        if self._read_version is None:
            # FoundationDB takes the snapshot at the first read, which would be the commit's when there is none.
            self._read_version = self._native.get_read_version()
        if begin < end:
            self._native.add_read_conflict_range(begin, end)

    def add_write_conflict_key(self, key: bytes) -> None:
        """Declare `key` as written."""
        self._check_write(key, 0)
        self._native.add_write_conflict_key(key)

    def add_write_conflict_range(self, begin: bytes, end: bytes) -> None:
        """Declare the range as written."""
        self._check_open()
        check_range(begin, end)
        if begin < end:
            self._written = True
            self._native.add_write_conflict_range(begin, end)

    # The end.

    def unhurried(self) -> None:
        """Do nothing: FoundationDB's proxies gather commits by themselves."""

    async def commit(self) -> None:
        """Commit; see the protocol. Always succeeds when nothing was written."""
        self._check_open()
        if not self._written:
            self._state = State.COMMITTED
            return
        self._store._check_usable()
        # Failed until it is known to have succeeded: also when the task is cancelled meanwhile.
        self._state = State.FAILED
        stamp = self._native.get_versionstamp()
        future = self._native.commit()
        await self._store._watch(future, self._native)
        try:
            future.wait()
        except self._store._fdb.FDBError as error:
            raise commit_error(error) from error
        self._stamp = stamp
        self._state = State.COMMITTED

    def versionstamp(self) -> bytes:
        """Return the stamp; raises KvError before the commit or when nothing was written."""
        if self._state is not State.COMMITTED:
            raise KvError("only a committed transaction has a versionstamp")
        if self._stamp is None:
            raise KvError("a transaction that wrote nothing has no versionstamp")
        try:
            stamp: bytes = self._stamp.value
        except self._store._fdb.FDBError as error:
            raise read_error(error) from error
        return stamp

    def cancel(self) -> None:
        """Give up; reads that are under way fail."""
        if self._state is State.OPEN:
            self._state = State.CANCELLED
            self._native.cancel()

    # Helpers.

    def _check_open(self) -> None:
        if self._state is not State.OPEN:
            raise UsedAfterCommit(f"the transaction is {self._state.name.lower()}: take a new one")

    def _check_write(self, key: bytes, value_bytes: int) -> None:
        self._check_open()
        if not FIRST_KEY <= key < KEYS_END or len(key) > KEY_BYTES_MAX:
            raise key_refused(key)
        if value_bytes > VALUE_BYTES_MAX:
            raise LimitExceeded(f"value of {value_bytes} bytes: the limit is {VALUE_BYTES_MAX}")
        self._written = True


def _stamp_offset(prefix: bytes) -> bytes:
    """Where the stamp goes, as API versions from 520 on want it: at the end of the key or value."""
    return len(prefix).to_bytes(_STAMP_OFFSET_BYTES, "little")
