"""Cuts the chunks of truncated files, in the operation itself or, after a crash, in the background.

A cut that arrives late would destroy data written after the truncation was declared done. So one process at a time
owns a pending truncation; its cut ends CUT_S after the owner wrote or renewed the record; another takes over only
after it has seen the record unchanged for TAKEOVER_S on its own monotonic clock.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fs3.core.clock import Clock
from fs3.core.errors import Fs3Error, error
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction
from fs3.meta import chunks, keys, model, scan, tree
from fs3.meta.chunks import ChunkStore
from fs3.meta.clock import monotonic_s
from fs3.meta.context import Cut
from fs3.v1.frame_pb2 import Code

log = logging.getLogger("fs3.meta.truncation")

CUT_S: Final = 8.0
TAKEOVER_S: Final = 12.0
POLL_S: Final = 0.1
STEP_S: Final = 1.0
SCAN_ROWS: Final = 256


class Truncator:
    """Completes pending truncations. Belongs to one event loop."""

    def __init__(self, store: KvStore, chunk_store: ChunkStore, clock: Clock, instance_id: bytes) -> None:
        self._store = store
        self._chunks = chunk_store
        self._clock = clock
        self._instance_id = instance_id
        self._locks: dict[int, tuple[asyncio.Lock, int]] = {}
        # Records of other owners: value and when it was first seen. Emptied as truncations end.
        self._seen: dict[int, tuple[bytes, float]] = {}

    async def complete(self, inode: int, *, ends_s: float) -> None:
        """Return once `inode` has no pending truncation. Raises UNAVAILABLE or TIMEOUT when `ends_s` passes."""
        async with _Turn(self._locks, inode):
            await self._complete(inode, ends_s)

    async def _complete(self, inode: int, ends_s: float) -> None:
        while True:
            started_s = monotonic_s(self._clock)
            cut = await retry.run(self._store, lambda tr: self._claim(tr, inode), idempotent=True)
            if cut is None:
                self._seen.pop(inode, None)
                return
            if isinstance(cut, Cut):
                if await self._execute(cut, started_s, ends_s):
                    return
            elif monotonic_s(self._clock) + POLL_S > ends_s:
                raise error(
                    Code.CODE_UNAVAILABLE,
                    f"inode {inode:#x} is being truncated through another metadata server; try again",
                )
            else:
                await self._clock.sleep(POLL_S)

    async def execute(self, cut: Cut, *, started_s: float, ends_s: float) -> None:
        """Cut what an operation of this process, begun at `started_s`, has just committed."""
        async with _Turn(self._locks, cut.inode):
            if not await self._execute(cut, started_s, ends_s):
                await self._complete(cut.inode, ends_s)

    async def _execute(self, cut: Cut, started_s: float, ends_s: float) -> bool:
        """Cut and clear the record. False: this claim's time is over, the caller's is not."""
        pending = cut.pending
        extent = None if pending.everywhere else pending.extent_bytes
        until_s = min(ends_s, started_s + CUT_S)
        try:
            await chunks.cut(self._chunks, cut.inode, cut.layout, pending.length, extent, ends_s=until_s)
        except Fs3Error as exc:
            if not exc.retryable or monotonic_s(self._clock) + POLL_S > ends_s:
                raise
            await self._clock.sleep(POLL_S)
            return False
        await retry.run(self._store, lambda tr: self._finish(tr, cut), idempotent=True)
        self._seen.pop(cut.inode, None)
        return True

    async def _claim(self, tr: Transaction, inode: int) -> Cut | bool | None:
        """Make the truncation this process's: the Cut; None when there is none; False when another has it."""
        value = await tr.get(keys.truncation(inode))
        if value is None:
            return None
        record = await tree.load(tr, inode)
        if record is None:
            tr.clear(keys.truncation(inode))
            return None
        pending = model.decode_truncation(value)
        if pending.owner != self._instance_id:
            now_s = monotonic_s(self._clock)
            seen_value, since_s = self._seen.get(inode, (b"", now_s))
            if seen_value != value:
                self._seen[inode] = (value, now_s)
                return False
            if now_s - since_s < TAKEOVER_S:
                return False
        pending.owner = self._instance_id
        pending.claim += 1
        tr.set(keys.truncation(inode), pending.SerializeToString())
        return Cut(inode, record.attr.layout, pending)

    async def _finish(self, tr: Transaction, cut: Cut) -> None:
        value = await tr.get(keys.truncation(cut.inode))
        if value is None:
            return
        pending = model.decode_truncation(value)
        if pending.owner != self._instance_id or pending.claim != cut.pending.claim:
            return
        tr.clear(keys.truncation(cut.inode))
        record = await tree.load(tr, cut.inode)
        if record is None:
            return
        record.truncating = False
        record.extent_bytes = pending.length
        if pending.everywhere:
            record.loose = False
        tree.store(tr, record)

    async def step(self) -> int:
        """Finish truncations that crashed processes left; returns how many are still pending."""
        left = 0
        async for rows in scan.pages(self._store, keys.table(keys.TRUNCATION), limit=SCAN_ROWS):
            for key, _ in rows:
                inode = keys.inode_of(key)
                if inode in self._locks:
                    left += 1
                    continue
                try:
                    # Not long: what another server works on is looked at again in the next step.
                    await self.complete(inode, ends_s=monotonic_s(self._clock) + STEP_S)
                except (Fs3Error, KvError) as exc:
                    left += 1
                    log.info("the truncation of inode %#x waits: %s", inode, exc)
        return left


class _Turn:
    """One task at a time per inode; the lock goes with its last user."""

    __slots__ = ("_inode", "_locks")

    def __init__(self, locks: dict[int, tuple[asyncio.Lock, int]], inode: int) -> None:
        self._locks = locks
        self._inode = inode

    async def __aenter__(self) -> None:
        lock, users = self._locks.get(self._inode, (asyncio.Lock(), 0))
        self._locks[self._inode] = (lock, users + 1)
        try:
            await lock.acquire()
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._locks[self._inode][0].release()
        self._leave()

    def _leave(self) -> None:
        lock, users = self._locks[self._inode]
        if users == 1:
            del self._locks[self._inode]
        else:
            self._locks[self._inode] = (lock, users - 1)
