"""The LMDB engine's committer: validates and writes in groups, one group at a time per directory and process.

The event loop commits a group itself while the disk is quick: a change of threads costs more than such a commit. When
the disk, or another process's commit, has kept the loop waiting, a thread of the committer takes over for a while.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lmdb

from fs3.kv import lmdb_records as records
from fs3.kv.api import (
    TRANSACTION_MS_MAX,
    CommitUnknown,
    Conflict,
    KvError,
    StoreFull,
    TooOld,
    Unavailable,
)
from fs3.kv.buffer import add_wrapping
from fs3.kv.conflicts import ENTRIES_MAX, WINDOW_MS, ConflictLog, Entry, KeyRange
from fs3.kv.lmdb_wal import Record, Snapshots, Wal

if TYPE_CHECKING:
    from fs3.kv.lmdb import LmdbTransaction

BATCH_TRANSACTIONS_MAX = 1024
BATCH_BYTES_MAX = 32_000_000
QUEUED_TRANSACTIONS_MAX = 20_000
LOG_PRUNE_INTERVAL_MS = 1_000
LOG_PRUNE_ENTRIES_MAX = 20_000
READER_CHECK_INTERVAL_S = 10.0
# A commit that took longer is the last one for some time that an event loop waits for itself.
INLINE_COMMIT_S_MAX = 0.003
INLINE_PAUSE_S = 0.5
INLINE_TRANSACTIONS_MAX = 64
# py-lmdb gives up the interpreter's lock at every write of a key. By Python's default of 5 ms a busy event loop
# would hand it back so late that a batch takes hundreds of milliseconds; 50 µs measured best of 10 µs to 5 ms.
SWITCH_INTERVAL_S = 0.00005

_log = logging.getLogger(__name__)

Future = asyncio.Future[bytes]
Request = tuple["LmdbTransaction", Future]
Outcome = tuple[Future, bytes | KvError]


def _full(error: Exception) -> StoreFull:
    return StoreFull(
        f"the store is full, nothing was written: free disk space or open it with more map_bytes ({error})"
    )


def _is_full(error: Exception) -> bool:
    # py-lmdb gives operating-system errors no number, only the text of strerror.
    return isinstance(error, lmdb.MapFullError) or os.strerror(errno.ENOSPC) in str(error)


class _OutcomeUnknown(Exception):
    """LMDB's commit failed in a way that does not say whether it took effect."""


class Committer:
    """Owns the writer side of one LMDB environment. ``commit_here`` and ``submit`` are thread-safe.

    Making one lowers the interpreter's thread switch interval to SWITCH_INTERVAL_S, for the whole process.
    """

    def __init__(
        self,
        env: Any,
        base: int,
        now_ms: Callable[[], int],
        wal: Wal | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.batches = 0
        self.transactions = 0
        self._env = env
        self._wal = wal
        self._snapshots = snapshots
        self._base = base
        self._now_ms = now_ms
        self._known = base + int(env.info()["last_txnid"])  # the log below holds every commit up to this one
        self._log = ConflictLog(self._known)
        self._broken: str | None = None
        self._next_reader_check_s = 0.0
        self._next_prune_ms = 0
        # Held by whoever commits.
        self._turn = threading.Lock()
        self._inline_after_s = 0.0
        self._queue: queue.SimpleQueue[list[Request] | None] = queue.SimpleQueue()
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_INTERVAL_S))
        self._thread = threading.Thread(target=self._run, name="fs3-kv-committer", daemon=True)
        self._thread.start()

    def commit_here(self, requests: list[Request]) -> bool:
        """Commit on the calling thread, that of the futures' loop, if it should be quick; returns whether it did."""
        started_s = time.monotonic()
        if started_s < self._inline_after_s or len(requests) > INLINE_TRANSACTIONS_MAX:
            return False
        if not self._turn.acquire(blocking=False):
            return False
        try:
            # What is queued for the thread comes first.
            if not self._queue.empty():
                return False
            batch, rest = _split(requests)
            if rest:
                return False
            outcomes = self._commit_safely(batch)
        finally:
            self._turn.release()
        ended_s = time.monotonic()
        if ended_s - started_s > INLINE_COMMIT_S_MAX:
            self._inline_after_s = ended_s + INLINE_PAUSE_S
        _deliver(outcomes)
        return True

    def submit(self, requests: list[Request]) -> None:
        """Queue transactions for commit, in order; their futures are completed in their own loops."""
        self._queue.put(requests)

    def stop(self) -> None:
        """Finish what is queued, then end the thread. Blocks for as long as the last commit takes."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        waiting: list[Request] = []
        stopping = False
        while not (stopping and not waiting):
            self._check_readers()
            for requests in self._take(block=not waiting):
                stopping = stopping or requests is None
                waiting.extend(requests or ())
            batch, waiting = _split(waiting)
            if batch:
                with self._turn:
                    outcomes = self._commit_safely(batch)
                self._complete(outcomes)

    def _take(self, *, block: bool) -> list[list[Request] | None]:
        """Return everything that is queued; with `block`, wait up to READER_CHECK_INTERVAL_S for the first."""
        taken: list[list[Request] | None] = []
        try:
            if block:
                taken.append(self._queue.get(timeout=READER_CHECK_INTERVAL_S))
            while True:
                taken.append(self._queue.get_nowait())
        except queue.Empty:
            return taken

    def _check_readers(self) -> None:
        """Free the slots of dead processes' readers: their snapshots keep LMDB from reusing pages."""
        now_s = time.monotonic()
        if now_s < self._next_reader_check_s:
            return
        self._next_reader_check_s = now_s + READER_CHECK_INTERVAL_S
        try:
            self._env.reader_check()
        except lmdb.Error as error:
            _log.warning("cannot check for dead readers of the store: %s", error)

    @staticmethod
    def _complete(outcomes: list[Outcome]) -> None:
        """One wake-up per loop and batch."""
        by_loop: dict[asyncio.AbstractEventLoop, list[Outcome]] = {}
        for outcome in outcomes:
            by_loop.setdefault(outcome[0].get_loop(), []).append(outcome)
        for loop, own in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, own)
            except RuntimeError:
                continue  # the loop was closed: nobody waits for these any more

    def _commit_safely(self, batch: list[Request]) -> list[Outcome]:
        if self._broken is not None:
            return [(future, Unavailable(self._broken)) for _, future in batch]
        try:
            return self._commit(batch)
        except _OutcomeUnknown as error:
            return self._fail(batch, error)
        except Exception as error:
            if len(batch) > 1:
                # One bad transaction must not fail its neighbours; and alone, small ones may still fit.
                return [outcome for request in batch for outcome in self._commit_safely([request])]
            refusal = _full(error) if _is_full(error) else KvError(f"the store refused the transaction: {error!r}")
            refusal.__cause__ = error
            return [(batch[0][1], refusal)]

    def _fail(self, batch: list[Request], error: Exception) -> list[Outcome]:
        """Give up the store: after a failed sync the page cache can no longer be trusted."""
        self._broken = f"the store failed and must be reopened: {error.__cause__}"
        outcomes: list[Outcome] = []
        for _, future in batch:
            unknown = CommitUnknown(self._broken)
            unknown.__cause__ = error
            outcomes.append((future, unknown))
        return outcomes

    def _commit(self, batch: list[Request]) -> list[Outcome]:
        now_ms = self._now_ms()
        txn = self._begin()
        if isinstance(txn, KvError):
            return [(future, txn) for _, future in batch]
        try:
            version = self._base + int(txn.id())
            self._catch_up(txn, version - 1)
            self._log.prune(now_ms)
            outcomes, staged = self._stage_all(batch, txn, version, now_ms)
            if staged is None:
                txn.abort()
                return outcomes
            staged.flush()
            if now_ms >= self._next_prune_ms:
                self._next_prune_ms = now_ms + LOG_PRUNE_INTERVAL_MS
                self._prune_stored(txn, version, now_ms)
            txn.put(records.log_key(version), records.encode_log(now_ms, staged.keys, staged.ranges))
            begun = self._log_durably(txn, version, staged)
        except BaseException:
            txn.abort()
            raise
        try:
            txn.commit()
        except lmdb.Error as error:
            self._retract(error)
            if _is_full(error):
                raise  # pages did not fit, so the new root was not written
            raise _OutcomeUnknown from error
        if begun and self._snapshots is not None:
            self._snapshots.consider()
        self._log.append(Entry(version, now_ms, staged.keys, staged.ranges))
        self._known = version
        self.batches += 1
        self.transactions += len(batch)
        return outcomes

    def _log_durably(self, txn: Any, version: int, staged: _Staged) -> bool:
        """Write the batch to the log; returns whether a new segment began."""
        if self._wal is None:
            return False
        try:
            return self._wal.append(txn, Record(version, staged.removed, staged.changes))
        except OSError as error:
            if _is_full(error):
                raise
            raise _OutcomeUnknown from error

    def _retract(self, error: Exception) -> None:
        if self._wal is None:
            return
        try:
            self._wal.retract()
        except OSError:
            raise _OutcomeUnknown from error

    def _begin(self) -> Any:
        try:
            return self._env.begin(write=True)
        except lmdb.MapResizedError as error:
            return Unavailable(f"another process opened the store with a larger map: use the same map_bytes ({error})")

    def _stage_all(
        self, batch: list[Request], txn: Any, version: int, now_ms: int
    ) -> tuple[list[Outcome], _Staged | None]:
        outcomes: list[Outcome] = []
        staged: _Staged | None = None
        head = version.to_bytes(8, "big")
        # What this batch writes. It joins the log only once it is committed: a phantom entry of a batch that
        # failed would refuse later transactions for something that never happened.
        earlier = ConflictLog(version - 1)
        for order, (request, future) in enumerate(batch):
            refusal = self._judge(request, earlier, now_ms)
            if refusal is not None:
                outcomes.append((future, refusal))
                continue
            staged = staged or _Staged(txn)
            stamp = head + order.to_bytes(2, "big")
            staged.stage(request, stamp)
            keys, ranges = request._written(stamp)
            earlier.append(Entry(version, now_ms, keys, ranges))
            staged.keys += keys
            staged.ranges += ranges
            outcomes.append((future, stamp))
        return outcomes, staged

    def _judge(self, request: LmdbTransaction, earlier: ConflictLog, now_ms: int) -> KvError | None:
        read_version = request._version
        if read_version is None:
            return None
        log = self._log
        if read_version < log.floor or now_ms - request._started_ms > TRANSACTION_MS_MAX:
            return TooOld("the snapshot is older than a transaction may be: run the transaction again")
        keys, ranges = request._read_keys, request._read_ranges
        if log.conflicts(read_version, keys, ranges) or (
            len(earlier) and earlier.conflicts(read_version, keys, ranges)
        ):
            return Conflict("something this transaction read has changed: run it again")
        return None

    def _catch_up(self, txn: Any, newest: int) -> None:
        """Load what other processes have committed since the last batch."""
        if self._known >= newest:
            return
        cursor = txn.cursor()
        if cursor.set_range(records.LOG_PREFIX) and cursor.key() < records.LOG_END:
            # Entries before the first one may have been pruned.
            first = records.log_version(cursor.key())
            if first > self._known + 1:
                self._log.forget_before(first - 1)
            found = cursor.set_range(records.log_key(self._known + 1))
            while found and cursor.key() < records.LOG_END:
                self._log.append(records.decode_log(records.log_version(cursor.key()), cursor.value()))
                found = cursor.next()
        cursor.close()
        self._known = newest

    def _prune_stored(self, txn: Any, version: int, now_ms: int) -> None:
        cursor = txn.cursor()
        found = cursor.set_range(records.LOG_PREFIX)
        for _ in range(LOG_PRUNE_ENTRIES_MAX):
            if not found or cursor.key() >= records.LOG_END:
                break
            at_ms = records.log_at_ms(cursor.value())
            # A time ahead of the clock is from before a reboot.
            expired = not 0 <= now_ms - at_ms <= WINDOW_MS
            if not expired and version - records.log_version(cursor.key()) <= ENTRIES_MAX:
                break
            cursor.delete()
            found = bool(cursor.key())
        cursor.close()


class _Staged:
    """The merged effect of a batch's accepted transactions on one LMDB write transaction."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn
        self.changes: dict[bytes, bytes | None] = {}
        # Ranges that went before the changes.
        self.removed: list[KeyRange] = []
        self.keys: list[bytes] = []
        self.ranges: list[KeyRange] = []

    def stage(self, request: LmdbTransaction, stamp: bytes) -> None:
        changes = self.changes
        for begin, end in request._clears:
            # What is below the changes can go at once: nothing staged depends on it any more.
            for key in [key for key in changes if begin <= key < end]:
                del changes[key]
            records.delete_range(self._txn, begin, end)
            self.removed.append((begin, end))
        for key, write in request._writes.items():
            if isinstance(write, int):
                current = changes[key] if key in changes else records.get(self._txn, key)
                write = add_wrapping(current, write)
            elif isinstance(write, tuple):
                write = write[0] + stamp + write[1]
            changes[key] = write
        for prefix, suffix, value in request._stamped_keys:
            changes[prefix + stamp + suffix] = value

    def flush(self) -> None:
        puts: list[tuple[bytes, bytes]] = []
        for key in sorted(self.changes):
            value = self.changes[key]
            if value is not None and len(key) <= records.SHORT_KEY_BYTES_MAX:
                puts.append((key, value))
            else:
                records.put(self._txn, key, value)
        if puts:
            cursor = self._txn.cursor()
            cursor.putmulti(puts)
            cursor.close()


def _split(waiting: list[Request]) -> tuple[list[Request], list[Request]]:
    """Return the next batch and the rest."""
    size = 0
    for taken, (request, _) in enumerate(waiting):
        size += request._write_bytes
        if taken == BATCH_TRANSACTIONS_MAX or (taken and size > BATCH_BYTES_MAX):
            return waiting[:taken], waiting[taken:]
    return waiting, []


def _deliver(outcomes: list[Outcome]) -> None:
    for future, outcome in outcomes:
        if future.done():
            continue  # its task was cancelled
        if isinstance(outcome, bytes):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)
