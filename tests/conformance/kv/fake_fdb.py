"""A stand-in for the binding ``fdb`` over a store in memory: its names, its threads, its errors, its lifetimes.

As in the real one (7.3.79) every call is posted to the network thread, which makes futures ready and runs their
callbacks; a transaction that nobody refers to is destroyed, which fails what is pending with 1025; the answer to a
range read is a page; errors of writes appear at the next read or commit.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

from fs3.kv import api
from fs3.kv.memory import MemoryKv, MemoryTransaction

PAGE_ROWS = 3
STAMP_AND_OFFSET_BYTES = api.VERSIONSTAMP_BYTES + 4
# The first that fits is the code.
CODES: tuple[tuple[type[Exception], int], ...] = (
    (api.Conflict, 1020),
    (api.TooOld, 1007),
    (api.CommitUnknown, 1021),
    (api.Unavailable, 1037),
    (api.UsedAfterCommit, 2017),
    (api.LimitExceeded, 2101),
    (api.KvError, 1036),
)


class FDBError(Exception):
    def __init__(self, code: int) -> None:
        self.code = code

    @property
    def description(self) -> bytes:
        return b"as injected or as FoundationDB would"


class Network:
    """The thread of the process. ``gate`` is cleared to keep what is posted waiting."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="fdb-network-thread", daemon=True)
            self._thread.start()

    def post(self, work: Callable[[], None]) -> None:
        self._posted.put(work)

    def _run(self) -> None:
        while True:
            work = self._posted.get()
            self.gate.wait()
            work()
            del work


NETWORK = Network()


class Future:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._callbacks: list[Callable[[Any], None]] = []
        self._result: Any = None
        self._code = 0

    def is_ready(self) -> bool:
        return self._ready.is_set()

    def on_ready(self, callback: Callable[[Any], None]) -> None:
        with self._lock:
            if not self._ready.is_set():
                self._callbacks.append(callback)
                return
        callback(self)

    def wait(self) -> Any:
        # Nothing may wait on the event loop's thread.
        assert self._ready.is_set(), "this would block"
        if self._code:
            raise FDBError(self._code)
        return self._result

    def _finish(self, result: Any, code: int) -> None:
        with self._lock:
            if self._ready.is_set():
                return
            self._result, self._code = result, code
            self._ready.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)


class Value(Future):
    """``wait`` returns the future itself; the bytes, or None, are its ``value``."""

    def wait(self) -> Any:
        super().wait()
        return self

    @property
    def value(self) -> Any:
        return super().wait()


class KeyValue:
    def __init__(self, key: bytes, value: bytes) -> None:
        self.key = key
        self.value = value


class KeySelector:
    def __init__(self, key: bytes, or_equal: bool, offset: int) -> None:
        self.key, self.or_equal, self.offset = key, or_equal, offset

    @classmethod
    def first_greater_than(cls, key: bytes) -> KeySelector:
        return cls(key, True, 1)

    @classmethod
    def first_greater_or_equal(cls, key: bytes) -> KeySelector:
        return cls(key, False, 1)

    def boundary(self) -> bytes:
        assert self.offset == 1
        return self.key + b"\x00" if self.or_equal else self.key


def drive(coro: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that only ever gives way."""
    try:
        while True:
            assert coro.send(None) is None
    except StopIteration as stop:
        return stop.value


class Core:
    """What the native transaction is: it goes on after the handle of Python is gone, but fails everything."""

    def __init__(self, module: FakeFdb) -> None:
        self.module = module
        self.memory: MemoryTransaction = module.store.transaction()
        self.timeout_ms = 0
        self.deferred = 0
        self.destroyed = False
        self.cancelled = False
        self.committing = False
        self.wrote = False
        self.unreadable: list[tuple[bytes, bytes]] = []
        self.stamps: list[Future] = []

    def failure(self, kind: str) -> int:
        if self.destroyed or self.cancelled:
            return 1025
        scripted = self.module.failures.get(kind)
        if scripted:
            return scripted.pop(0)
        if self.module.unreachable and self.timeout_ms:
            return 1031
        return self.deferred

    def ask(self, kind: str, future: Future, work: Callable[[], Any]) -> Future:
        in_commit = self.committing

        def run() -> None:
            code = self.failure(kind) or (2017 if in_commit else 0)
            if not code and self.module.unreachable:
                return  # without a timeout it waits for ever
            result = None
            if not code:
                try:
                    result = work()
                except Exception as error:
                    code = self.module.code_of(error)
            future._finish(result, code)

        NETWORK.post(run)
        return future

    def write(self, work: Callable[[], None]) -> None:
        self.wrote = True
        self.post(work)

    def post(self, work: Callable[[], None]) -> None:
        in_commit = self.committing

        def run() -> None:
            try:
                if in_commit:
                    raise FDBError(2017)
                work()
            except Exception as error:
                self.deferred = self.deferred or self.module.code_of(error)

        NETWORK.post(run)

    def range(self, begin: bytes, end: bytes, limit: int, exact: bool, reverse: bool, snapshot: bool) -> Any:
        if exact and not limit:
            raise FDBError(2210)
        if begin > end:
            raise FDBError(2005)
        if any(b < end and begin < e for b, e in self.unreadable):
            raise FDBError(1036)
        most = limit if exact else min(limit or PAGE_ROWS, PAGE_ROWS)
        self.module.pages += 1
        rows = drive(self.memory.get_range(begin, end, limit=most, reverse=reverse, snapshot=snapshot))
        return [KeyValue(*row) for row in rows], len(rows), len(rows) == most

    def commit(self) -> None:
        if not self.wrote:
            for stamp in self.stamps:
                stamp._finish(None, 2021)
            return
        try:
            drive(self.memory.commit())
        except Exception as error:
            for stamp in self.stamps:
                stamp._finish(None, self.module.code_of(error))
            raise
        for stamp in self.stamps:
            stamp._finish(self.memory.versionstamp(), 0)


class TransactionRead:
    def __init__(self, core: Core, snapshot: bool) -> None:
        self._core = core
        self._snapshot = snapshot

    def __del__(self) -> None:
        self._core.destroyed = True

    def get_read_version(self) -> Future:
        core = self._core
        return core.ask("version", Future(), lambda: drive(core.memory.get_read_version()))

    def get(self, key: bytes) -> Value:
        core, snapshot = self._core, self._snapshot
        future = Value()
        core.ask("get", future, lambda: drive(core.memory.get(key, snapshot=snapshot)))
        return future

    def _get_range(
        self, begin: KeySelector, end: KeySelector, limit: int, streaming_mode: int, iteration: int, reverse: bool
    ) -> Future:
        assert iteration > 0
        core, snapshot, exact = self._core, self._snapshot, streaming_mode == FakeFdb.StreamingMode.exact
        assert exact or streaming_mode == FakeFdb.StreamingMode.want_all
        first, last = begin.boundary(), end.boundary()
        return core.ask("range", Future(), lambda: core.range(first, last, limit, exact, reverse, snapshot))


class Options:
    def __init__(self, transaction: Transaction) -> None:
        self._parent = weakref.proxy(transaction)

    def set_timeout(self, param: int) -> None:
        self._parent._core.timeout_ms = param


class Transaction(TransactionRead):
    def __init__(self, core: Core) -> None:
        super().__init__(core, False)
        self.options = Options(self)
        # As in the binding, the native transaction lives as long as this one.
        self.snapshot = TransactionRead(core, True)

    def __del__(self) -> None:
        pass

    def set(self, key: bytes, value: bytes) -> None:
        core = self._core
        core.write(lambda: core.memory.set(key, value))

    def clear(self, key: bytes) -> None:
        core = self._core
        core.write(lambda: core.memory.clear(key))

    def clear_range(self, begin: bytes, end: bytes) -> None:
        core = self._core

        def work() -> None:
            if begin > end:
                raise FDBError(2005)
            core.memory.clear_range(begin, end)

        core.write(work)

    def add(self, key: bytes, param: bytes) -> None:
        assert len(param) == 8
        core = self._core
        core.write(lambda: core.memory.add(key, int.from_bytes(param, "little")))

    def set_versionstamped_key(self, key: bytes, param: bytes) -> None:
        core = self._core

        def work() -> None:
            prefix, suffix = around_stamp(key)
            core.unreadable.append((prefix + b"\x00" * 10 + suffix, prefix + b"\xff" * 10 + suffix + b"\x00"))
            core.memory.set_versionstamped_key(prefix, suffix, param)

        core.write(work)

    def set_versionstamped_value(self, key: bytes, param: bytes) -> None:
        core = self._core
        core.write(lambda: core.memory.set_versionstamped_value(key, *around_stamp(param)))

    def add_read_conflict_range(self, begin: bytes, end: bytes) -> None:
        core = self._core
        core.post(lambda: core.memory.add_read_conflict_range(begin, end))

    def add_write_conflict_range(self, begin: bytes, end: bytes) -> None:
        core = self._core
        core.write(lambda: core.memory.add_write_conflict_range(begin, end))

    def add_write_conflict_key(self, key: bytes) -> None:
        self.add_write_conflict_range(key, key + b"\x00")

    def get_versionstamp(self) -> Value:
        future = Value()
        self._core.stamps.append(future)
        return future

    def commit(self) -> Future:
        core = self._core
        future = core.ask("commit", Future(), core.commit)
        core.committing = True
        return future

    def cancel(self) -> None:
        self._core.cancelled = True


def around_stamp(template: bytes) -> tuple[bytes, bytes]:
    """Split a key or value at its stamp, whose place is a little-endian number at the end."""
    at = int.from_bytes(template[-4:], "little")
    if at + STAMP_AND_OFFSET_BYTES > len(template):
        raise FDBError(2000)
    return template[:at], template[at + api.VERSIONSTAMP_BYTES : -4]


class Database:
    def __init__(self, module: FakeFdb) -> None:
        self._module = module

    def create_transaction(self) -> Transaction:
        return Transaction(Core(self._module))


class FakeFdb:
    """Stands for the module. ``failures``: codes that the next operations of a kind fail with.

    The kinds are get, range, version, commit. ``unreachable``: nothing is answered, except by timeouts, which are
    instant. ``pages`` counts answers to range reads.
    """

    FDBError = FDBError
    KeySelector = KeySelector
    StreamingMode = SimpleNamespace(want_all=-2, iterator=-1, exact=0, small=1, medium=2, large=3, serial=4)

    def __init__(self, store: MemoryKv) -> None:
        self.store = store
        self.failures: dict[str, list[int]] = {}
        self.unreachable = False
        self.pages = 0

    def open(self, cluster_file: str | None = None) -> Database:
        NETWORK.start()
        return Database(self)

    def code_of(self, error: Exception) -> int:
        if isinstance(error, FDBError):
            return error.code
        for kind, code in CODES:
            if isinstance(error, kind):
                return code
        raise error
