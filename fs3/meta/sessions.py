"""The reaper: ends write sessions, holds and locks of clients that have been silent, and settles the length they left.

Silence is judged on this server's monotonic clock: the client's keepalive record has not changed for the whole
session time. The reaping transaction reads that record again, so that a client which comes back in time wins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from fs3.core.clock import Clock
from fs3.core.errors import Fs3Error
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction, TransactionFn
from fs3.meta import chunks, keys, model, reports, scan, tree
from fs3.meta.chunks import ChunkStore
from fs3.meta.clock import monotonic_s
from fs3.meta.context import LengthUnknown, OpContext, TruncationPending
from fs3.meta.gc import Collector
from fs3.meta.truncation import Truncator
from fs3.v1.disk_meta_pb2 import InodeRecord

log = logging.getLogger("fs3.meta.sessions")

SCAN_ROWS: Final = 1000
REAP_S: Final = 10.0
ROUNDS_MAX: Final = 8
# Holds that are ended in one transaction.
HOLDS_AT_ONCE: Final = 256
# Keepalive records of clients without sessions go after this many session times.
FORGET_FACTOR: Final = 10


class Reaper:
    """Watches the sessions of all clients. Belongs to one event loop; several servers may reap at once."""

    def __init__(
        self,
        store: KvStore,
        chunk_store: ChunkStore,
        clock: Clock,
        new_context: Callable[[], OpContext],
        truncator: Truncator,
        collector: Collector,
        *,
        session_ms: int,
    ) -> None:
        self._store = store
        self._chunks = chunk_store
        self._clock = clock
        self._new_context = new_context
        self._truncator = truncator
        self._collector = collector
        self._session_s = session_ms / 1000
        # Told of inodes whose locks went.
        self.unlocked: Callable[[int], None] = lambda inode: None
        # Clients with sessions or a keepalive record: the record's value and since when it has been that.
        self._seen: dict[bytes, tuple[bytes | None, float]] = {}
        # Silent clients whose holds were ended, with their keepalive record: a new hold comes with a new one.
        self._without_holds: dict[bytes, bytes] = {}

    async def step(self) -> int:
        """Look at every session once; returns how many were reaped."""
        alive = await self._clients()
        now_s = monotonic_s(self._clock)
        silence_s: dict[bytes, float] = {}
        reaped = 0

        def is_silent(client_id: bytes) -> bool:
            if client_id not in silence_s:
                silence_s[client_id] = self._silent_s(client_id, alive.get(client_id), now_s)
            return silence_s[client_id] >= self._session_s

        async for rows in scan.pages(self._store, keys.table(keys.SESSION), limit=SCAN_ROWS):
            for key, value in rows:
                client_id = model.decode_session(value).client_id
                if is_silent(client_id):
                    session = keys.session_id(key)
                    reaped += await self._attempt(keys.inode_of(key), session, client_id, alive.get(client_id))
        async for rows in scan.pages(self._store, keys.table(keys.LOCK), limit=SCAN_ROWS):
            for key, _ in rows:
                client_id = keys.lock_client(key)
                if is_silent(client_id):
                    await self._unlock(key, client_id, alive.get(client_id))
        reaped += await self._reap_holds(alive, now_s)
        await self._forget(alive, set(silence_s), now_s)
        return reaped

    def _silent_s(self, client_id: bytes, value: bytes | None, now_s: float) -> float:
        seen = self._seen.get(client_id)
        if seen is None or seen[0] != value:
            self._seen[client_id] = (value, now_s)
            return 0.0
        return now_s - seen[1]

    async def _clients(self) -> dict[bytes, bytes]:
        """The keepalive record of every client."""
        alive: dict[bytes, bytes] = {}
        async for rows in scan.pages(self._store, keys.table(keys.KEEPALIVE), limit=SCAN_ROWS):
            alive.update((key[len(keys.KEEPALIVE) :], value) for key, value in rows)
        return alive

    async def _forget(self, alive: dict[bytes, bytes], with_sessions: set[bytes], now_s: float) -> None:
        """Drop records of clients that are long gone, and what is remembered of clients that left nothing."""
        for client_id in [
            client_id for client_id in self._seen if client_id not in alive | dict.fromkeys(with_sessions)
        ]:
            del self._seen[client_id]
        for client_id, value in alive.items():
            if client_id in with_sessions or self._without_holds.get(client_id) != value:
                continue
            if self._silent_s(client_id, value, now_s) >= self._session_s * FORGET_FACTOR:
                await retry.run(self._store, _clearer(keys.keepalive(client_id), value), idempotent=True)

    async def _reap_holds(self, alive: dict[bytes, bytes], now_s: float) -> int:
        """End the holds of clients that have become silent; returns how many. When none has, no hold is read."""
        done = self._without_holds = {c: v for c, v in self._without_holds.items() if alive.get(c) == v}
        silent = {
            client_id
            for client_id, value in alive.items()
            if self._silent_s(client_id, value, now_s) >= self._session_s and client_id not in done
        }
        if not silent:
            return 0
        ended = 0
        stay: set[bytes] = set()
        async for rows in scan.pages(self._store, keys.table(keys.HOLD), limit=SCAN_ROWS):
            held: dict[bytes, list[int]] = {}
            for key, _ in rows:
                held.setdefault(keys.hold_client(key), []).append(keys.inode_of(key))
            for client_id in silent & held.keys():
                inodes = held[client_id]
                for at in range(0, len(inodes), HOLDS_AT_ONCE):
                    batch = inodes[at : at + HOLDS_AT_ONCE]
                    if await self._end_holds(batch, client_id, alive[client_id]):
                        ended += len(batch)
                    else:
                        stay.add(client_id)
        done |= {client_id: alive[client_id] for client_id in silent - stay}
        return ended

    async def _end_holds(self, inodes: list[int], client_id: bytes, keepalive: bytes) -> bool:
        """False when the client came back, or the store does not answer."""
        ctx = self._new_context()

        async def end(tr: Transaction) -> bool:
            ctx.begin()
            if await tr.get(keys.keepalive(client_id)) != keepalive:
                return False
            for inode in inodes:
                await tree.end_hold(tr, ctx, inode, client_id)
            return True

        try:
            done = await retry.run(self._store, end, idempotent=True)
        except KvError as exc:
            log.warning("%d holds of a silent client stay for now: %s", len(inodes), exc)
            return False
        if done:
            log.info("ended %d holds of client %s", len(inodes), client_id.hex())
        if ctx.collect:
            self._collector.wake()
        return done

    async def _unlock(self, key: bytes, client_id: bytes, keepalive: bytes | None) -> None:
        """End what a silent client holds of an inode, and waits for."""

        async def unlock(tr: Transaction) -> bool:
            if await tr.get(keys.keepalive(client_id)) != keepalive:
                return False
            tr.clear(key)
            return True

        inode = keys.inode_of(key)
        try:
            done = await retry.run(self._store, unlock, idempotent=True)
        except KvError as exc:
            log.warning("the locks of a silent client on inode %#x stay for now: %s", inode, exc)
            return
        if done:
            log.info("ended the locks of client %s on inode %#x", client_id.hex(), inode)
            self.unlocked(inode)

    async def _attempt(self, inode: int, session: bytes, client_id: bytes, keepalive: bytes | None) -> bool:
        try:
            return await self._reap(inode, session, client_id, keepalive)
        except (Fs3Error, KvError) as exc:
            log.warning("the session of a silent client on inode %#x stays for now: %s", inode, exc)
            return False

    async def _reap(self, inode: int, session: bytes, client_id: bytes, keepalive: bytes | None) -> bool:
        ctx = self._new_context()

        async def reap(tr: Transaction) -> bool:
            ctx.begin()
            if await tr.get(keys.keepalive(client_id)) != keepalive:
                return False
            key = keys.session(inode, session)
            value = await tr.get(key)
            if value is None:
                return False
            tr.clear(key)
            record = await tree.load(tr, inode)
            if record is not None:
                await _settle(tr, ctx, record, held=model.decode_session(value).held)
            return True

        ends_s = monotonic_s(self._clock) + REAP_S
        for _ in range(ROUNDS_MAX):
            try:
                done = await retry.run(self._store, reap, idempotent=True)
            except TruncationPending as exc:
                await self._truncator.complete(exc.inode, ends_s=ends_s)
            except LengthUnknown as exc:
                length = await chunks.end(self._chunks, exc.inode, exc.layout, ends_s=ends_s)
                ctx.measured[exc.inode, exc.truncate_version] = length
            else:
                if done:
                    log.info("reaped a session of client %s on inode %#x", client_id.hex(), inode)
                if ctx.collect:
                    self._collector.wake()
                return done
        return False


async def _settle(tr: Transaction, ctx: OpContext, record: InodeRecord, *, held: bool) -> None:
    """Adopt what the dead client wrote, which nobody reported; let the inode go when nothing else keeps it."""
    attr = record.attr
    last = attr.nlink == 0 and not await tree.is_kept(tr, attr.inode)
    if attr.type == model.FILE and not held:
        record.loose = True
        if attr.nlink:
            if record.truncating:
                raise TruncationPending(attr.inode)
            length = ctx.measured.get((attr.inode, attr.truncate_version))
            if length is None:
                raise LengthUnknown(attr.inode, attr.layout, attr.truncate_version)
            if length > attr.length:
                await reports.grow(tr, ctx, record, length)
                attr.mtime_ns = attr.ctime_ns = ctx.now_ns
            record.extent_bytes = max(record.extent_bytes, length)
        tree.store(tr, record)
    if last:
        await tree.release(tr, ctx, record)


def _clearer(key: bytes, value: bytes) -> TransactionFn[None]:
    async def clear(tr: Transaction) -> None:
        if await tr.get(key) == value:
            tr.clear(key)

    return clear
