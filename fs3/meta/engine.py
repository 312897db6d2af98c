"""Runs operations: the one retry loop, stored answers, and what has to happen outside the transaction."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import OrderedDict
from typing import Any, Final

from google.protobuf.message import Message

from fs3.core.clock import Clock, RealClock
from fs3.core.errors import Fs3Error, error
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, LimitExceeded, StoreFull, Transaction, TransactionFn
from fs3.meta import chunks, keys, model, tree
from fs3.meta.batches import Batches
from fs3.meta.chunks import ChunkStore
from fs3.meta.clock import monotonic_s
from fs3.meta.context import LengthUnknown, OpContext, Placement, TruncationPending
from fs3.meta.gc import Collector
from fs3.meta.ids import IdAllocator
from fs3.meta.lock_waits import LockWaits
from fs3.meta.quota_walk import QuotaWalker
from fs3.meta.registry import AWAIT_LOCK, Operation, Prepare
from fs3.meta.sessions import Reaper
from fs3.meta.sweeper import Sweeper
from fs3.meta.trash import Expirer
from fs3.meta.truncation import Truncator
from fs3.v1.disk_meta_pb2 import IdempotencyRecord, InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Attr, AwaitLockRequest, AwaitLockResponse, MetaStatus
from fs3.v1.routing_pb2 import RoutingSent

# How often one request may stop for a truncation or a length before the server gives up.
ROUNDS_MAX: Final = 16
REQUEST_S_MAX: Final = 30.0
CLIENTS_MAX: Final = 65_536


class Engine:
    """Metadata operations over a store. Belongs to one event loop; any number of tasks may call at once.

    `session_ms`: how long a silent client keeps its sessions. `gc_delay_ms`: how long removed files wait.
    """

    def __init__(
        self,
        store: KvStore,
        chunk_store: ChunkStore,
        placement: Placement,
        *,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        session_ms: int = 60_000,
        gc_delay_ms: int = 10_000,
        idempotency_ms: int = 3_600_000,
    ) -> None:
        self.store = store
        self.clock = clock = clock or RealClock()
        self.session_ms = session_ms
        self._chunks = chunk_store
        self._placement = placement
        self._new_bytes = secrets.token_bytes if rng is None else rng.randbytes
        self.instance_id = self._new_bytes(16)
        self._counter_shard = self.instance_id[0] % keys.COUNTER_SHARDS
        self._ids = IdAllocator(store)
        self._sequence = 0
        self._served = 0
        # Clients whose keepalive record this server has written lately, with the monotonic time.
        self._alive: OrderedDict[bytes, float] = OrderedDict()
        self._batches = Batches(store, clock)
        self.lock_waits = LockWaits(clock)
        self.truncator = Truncator(store, chunk_store, clock, self.instance_id)
        self.collector = Collector(store, chunk_store, clock, self.context, delay_ms=gc_delay_ms)
        self.collector.served = lambda: self._served
        self.reaper = Reaper(
            store, chunk_store, clock, self.context, self.truncator, self.collector, session_ms=session_ms
        )
        self.quota_walker = QuotaWalker(store, self.context)
        self.reaper.unlocked = self.lock_waits.changed
        self.sweeper = Sweeper(store, clock, keep_ms=idempotency_ms)
        self.expirer = Expirer(store, clock, self.context)

    def context(self) -> OpContext:
        """A context for one request, or one step of a background worker."""
        return OpContext(
            now_ns=self.clock.wall_ns(),
            ids=self._ids,
            placement=self._placement,
            instance_id=self.instance_id,
            counter_shard=self._counter_shard,
            new_session=self._new_session,
            session_ms=self.session_ms,
        )

    def _new_session(self) -> bytes:
        return self._new_bytes(tree.SESSION_BYTES)

    async def bootstrap(self) -> None:
        """Make the root directory if there is none. Safe to run from several servers at once."""

        async def make(tr: Transaction) -> None:
            if await tree.load(tr, keys.ROOT_INODE) is not None:
                return
            now_ns = self.clock.wall_ns()
            attr = Attr(
                inode=keys.ROOT_INODE,
                type=model.DIRECTORY,
                mode=0o755,
                nlink=2,
                atime_ns=now_ns,
                mtime_ns=now_ns,
                ctime_ns=now_ns,
                parent=keys.ROOT_INODE,
            )
            tree.store(tr, InodeRecord(format=model.FORMAT, attr=attr))
            tree.touch_directory(tr, keys.ROOT_INODE, now_ns)
            tr.add(keys.counter(self._counter_shard), 1)

        await retry.run(self.store, make, idempotent=True, deadline_ms=REQUEST_S_MAX * 1000)

    async def call(self, operation: Operation, request: Any, *, ends_s: float | None = None) -> Any:
        """Run one operation until `ends_s` on the monotonic clock; returns its response.

        Durable when it returns. A repeated OpId gets the first answer; the refusal of one that was sent before is
        final for every copy. Raises Fs3Error.
        """
        self._served += 1
        try:
            if operation.mutates and not (operation.only_reads and operation.only_reads(request)):
                return await self._mutate(operation, request, self._limit(ends_s))
            return await self._read(operation, request, ends_s)
        except KvError as exc:
            raise _translated(exc) from exc

    def status(self, routing_version: int, routing_sent: RoutingSent) -> MetaStatus:
        """What this service says of itself."""
        return MetaStatus(
            served=self._served,
            routing_version=routing_version,
            gc_waiting=self.collector.queued,
            gc_oldest_ms=self.collector.oldest_ms,
            gc_refused=self.collector.refused,
            gc_collected=self.collector.collected,
            routing_sent=routing_sent,
        )

    async def await_lock(self, request: AwaitLockRequest, *, left_s: float) -> AwaitLockResponse:
        """Wait at most `left_s` for a lock to come free. Raises Fs3Error."""
        return await self.lock_waits.wait(request, lambda: self.call(AWAIT_LOCK, request), left_s=left_s)

    def _limit(self, ends_s: float | None) -> float:
        latest_s = monotonic_s(self.clock) + REQUEST_S_MAX
        return latest_s if ends_s is None else min(ends_s, latest_s)

    async def _read(self, operation: Operation, request: Any, ends_s: float | None) -> Any:
        ctx = self.context()
        transaction = self.store.transaction()
        try:
            # What only reads is done at its first try, except under faults; so it is worth a shorter path.
            response = await operation.run(transaction, request, ctx)
            await transaction.commit()
            return response
        except KvError as exc:
            if not exc.retryable:
                raise
        finally:
            transaction.cancel()
        left_ms = (self._limit(ends_s) - monotonic_s(self.clock)) * 1000
        return await retry.run(
            self.store, lambda tr: operation.run(tr, request, ctx), idempotent=True, deadline_ms=left_ms
        )

    async def _mutate(self, operation: Operation, request: Any, ends_s: float) -> Any:
        key = self._op_key(request.op)
        client_id = request.op.client_id
        ctx = self.context()
        started_s = monotonic_s(self.clock)
        ctx.renew = started_s - self._alive.get(client_id, -1e9) > self.session_ms / 4000
        replayed = False

        async def attempt(tr: Transaction) -> Any:
            nonlocal replayed
            ctx.begin()
            if operation.unhurried:
                tr.unhurried()
            value = await tr.get(key)
            if value is not None:
                replayed = True
                return _replay(operation, value)
            response = await operation.run(tr, request, ctx)
            record = IdempotencyRecord(
                format=model.FORMAT,
                time_ns=ctx.now_ns,
                method=operation.method,
                response=response.SerializeToString(),
            )
            tr.set(key, record.SerializeToString())
            return response

        try:
            if operation.prepare is not None and not await self._answered(key):
                await self._prepare(operation.prepare, request, ends_s)
            inode = request.inode if operation.batched else None
            response, started_s = await self._rounds(attempt, ctx, ends_s, inode)
        except Fs3Error as refusal:
            if refusal.retryable or not request.op.resent:
                raise
            ctx.begin()
            response, replayed = await self._refuse(operation, key, refusal, ctx.now_ns, ends_s), True
        await self._afterwards(operation, ctx, response, replayed, started_s, ends_s)
        return response

    async def _rounds(
        self, attempt: TransactionFn[Any], ctx: OpContext, ends_s: float, inode: int | None
    ) -> tuple[Any, float]:
        """Run `attempt` until it need not stop for anything; returns its response and when its last run began.

        `inode`: changes of it may go together.
        """
        for _ in range(ROUNDS_MAX):
            started_s = monotonic_s(self.clock)
            try:
                if inode is not None:
                    return await self._batches.run(inode, attempt, ends_s=ends_s), started_s
                left_ms = (ends_s - started_s) * 1000
                return await retry.run(self.store, attempt, idempotent=True, deadline_ms=left_ms), started_s
            except TruncationPending as exc:
                await self.truncator.complete(exc.inode, ends_s=ends_s)
            except LengthUnknown as exc:
                length = await chunks.end(self._chunks, exc.inode, exc.layout, ends_s=ends_s)
                ctx.measured[exc.inode, exc.truncate_version] = length
        raise error(Code.CODE_BUSY, "the file is truncated again and again by others; try later")

    async def _refuse(self, operation: Operation, key: bytes, refusal: Fs3Error, now_ns: int, ends_s: float) -> Any:
        """Record a refusal and raise it, unless an earlier copy of the request has succeeded: then its response.

        That copy may still be at work in another server. Once the record is there it cannot take effect any more.
        """

        async def settle(tr: Transaction) -> Any:
            value = await tr.get(key)
            if value is not None:
                return _replay(operation, value)
            record = IdempotencyRecord(
                format=model.FORMAT,
                time_ns=now_ns,
                method=operation.method,
                code=refusal.code,
                message=refusal.message,
            )
            tr.set(key, record.SerializeToString())
            return None

        left_ms = (ends_s - monotonic_s(self.clock)) * 1000
        response = await retry.run(self.store, settle, idempotent=True, deadline_ms=left_ms)
        if response is None:
            raise refusal
        return response

    async def _afterwards(
        self, operation: Operation, ctx: OpContext, response: Any, replayed: bool, started_s: float, ends_s: float
    ) -> None:
        """What the committed operation leaves to do: chunks to cut, inodes to collect."""
        if ctx.renewed_client:
            self._remember_alive(ctx.renewed_client, started_s)
        if ctx.collect:
            self.collector.wake()
        if ctx.relocked:
            self.lock_waits.changed(ctx.relocked)
        if replayed and operation.cuts:
            await self.truncator.complete(response.attr.inode, ends_s=ends_s)
        elif ctx.cut is not None:
            await self.truncator.execute(ctx.cut, started_s=started_s, ends_s=ends_s)

    def _remember_alive(self, client_id: bytes, now_s: float) -> None:
        self._alive[client_id] = now_s
        self._alive.move_to_end(client_id)
        if len(self._alive) > CLIENTS_MAX:
            self._alive.popitem(last=False)

    def _op_key(self, op: Any) -> bytes:
        """Key of the stored answer. A request without OpId gets one that survives only this call's own retries."""
        client_id: bytes = op.client_id
        if not client_id:
            self._sequence += 1
            return keys.idempotency(self.instance_id, self._sequence)
        if len(client_id) != 16:
            raise error(Code.CODE_INVALID_ARGUMENT, f"a client id has 16 bytes, not {len(client_id)}")
        return keys.idempotency(client_id, op.sequence)

    async def _prepare(self, prepare: Prepare, request: Any, ends_s: float) -> None:
        try:
            async with asyncio.timeout(ends_s - monotonic_s(self.clock)):
                await prepare(self.store, request)
        except Fs3Error:
            raise
        except TimeoutError:
            message = "checking the permissions of the whole tree took too long: remove its parts one by one"
            raise error(Code.CODE_TIMEOUT, message) from None

    async def _answered(self, key: bytes) -> bool:
        async def read(tr: Transaction) -> bool:
            return await tr.get(key) is not None

        return await retry.run(self.store, read, idempotent=True)


def _replay(operation: Operation, value: bytes) -> Message:
    record = model.decode_idempotency(value)
    if record.method != operation.method:
        raise error(Code.CODE_INVALID_ARGUMENT, "this OpId belongs to another operation: sequence numbers are unique")
    if record.code:
        raise error(record.code, record.message)
    return operation.response.FromString(record.response)


def _translated(exc: KvError) -> Fs3Error:
    if isinstance(exc, StoreFull):
        return error(Code.CODE_NO_SPACE, "the key-value store is full: enlarge it or remove files")
    if isinstance(exc, LimitExceeded):
        return error(Code.CODE_INTERNAL, f"a transaction is over a limit of the key-value store: {exc}")
    code = Code.CODE_UNAVAILABLE if exc.retryable else Code.CODE_INTERNAL
    return error(code, f"the key-value store did not finish the operation: {exc}", maybe_applied=exc.maybe_committed)
