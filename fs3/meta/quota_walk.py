"""Restamps what is in a directory that got or lost a quota, in small transactions, and settles the quota afterwards.

A walk lets the children of one directory have the stamp of the directory; each subdirectory that gets another stamp
has a walk of its own from then on. A walk is a record in the store, so that any server goes on with it after a crash;
two that do the same one only conflict.

No child is left out: what is made takes the stamp of its directory, which both transactions read; what is moved is
stamped by the rename. A directory that is restamped during its walk has a new one, from its first name on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fs3.core.errors import Fs3Error
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction
from fs3.meta import keys, model, quotas, scan, tree
from fs3.meta.context import OpContext
from fs3.meta.ops.list import attributes

log = logging.getLogger("fs3.meta.quota_walk")

SCAN_ROWS: Final = 256
# Entries that are looked at, and restamped, in one transaction.
PAGE_ENTRIES: Final = 128
# Walks that are done at a time.
PARALLEL_MAX: Final = 16
# Rounds of one step: each makes the walks that the next one does.
ROUNDS_MAX: Final = 4096


class QuotaWalker:
    """Works off the walks. `owns(inode)`: whether the inode is in this server's share. One event loop."""

    def __init__(self, store: KvStore, new_context: Callable[[], OpContext]) -> None:
        self._store = store
        self._new_context = new_context
        self.owns: Callable[[int], bool] = lambda inode: True

    async def step(self) -> int:
        """Do what there is to do; returns how many walks and settlements were done."""
        done = 0
        for _ in range(ROUNDS_MAX):
            walked = await self._round(settling=False)
            done += walked
            if not walked:
                break
        return done + await self._round(settling=True)

    async def _round(self, *, settling: bool) -> int:
        """One pass over the walks, or over the quotas that are to be settled; returns how many are done."""
        done = 0
        turns = asyncio.Semaphore(PARALLEL_MAX)

        async def attempt(job: int, directory: int) -> bool:
            async with turns:
                return await self._attempt(job, directory)

        async for rows in scan.pages(self._store, keys.table(keys.QUOTA_WALK), limit=SCAN_ROWS):
            todo = [keys.quota_walk_of(key) for key, _ in rows]
            todo = [(job, ino) for job, ino in todo if settling == (ino == keys.NO_INODE) and self.owns(ino or job)]
            done += sum(await asyncio.gather(*(attempt(job, ino) for job, ino in todo)))
        return done

    async def _attempt(self, job: int, directory: int) -> bool:
        try:
            if directory == keys.NO_INODE:
                return await self._run(_settle, job, directory)
            while not await self._run(_page, job, directory):
                pass
        except (Fs3Error, KvError) as exc:
            log.info("restamping directory %#x for quota %#x waits: %s", directory, job, exc)
            return False
        return True

    async def _run(
        self, work: Callable[[Transaction, OpContext, int, int], Awaitable[bool]], job: int, directory: int
    ) -> bool:
        ctx = self._new_context()

        async def attempt(tr: Transaction) -> bool:
            ctx.begin()
            return await work(tr, ctx, job, directory)

        return await retry.run(self._store, attempt, idempotent=True)


async def _page(tr: Transaction, ctx: OpContext, job: int, ino: int) -> bool:
    """Look at the next entries of a directory; True when its walk is done."""
    key = keys.quota_walk(job, ino)
    value = await tr.get(key)
    if value is None:
        return True
    directory = await tree.load(tr, ino)
    if directory is None or directory.detached:
        tr.clear(key)
        return True
    walk = model.decode_quota_walk(value)
    # By the snapshot: entries that are made meanwhile have the right stamp, and records that change are read again.
    rows = await tr.get_range(*keys.dirents(ino, walk.after), limit=PAGE_ENTRIES, snapshot=True)
    records = await attributes(tr, [model.decode_dirent(entry)[0] for _, entry in rows])
    for child in [record.attr.inode for record in records.values() if record.quota != directory.quota]:
        record = await tree.load(tr, child)
        if record is not None and await quotas.adopt(tr, ctx, record, directory.quota):
            tree.store(tr, record)
    if len(rows) < PAGE_ENTRIES:
        tr.clear(key)
        return True
    walk.after = keys.dirent_name(rows[-1][0])
    tr.set(key, walk.SerializeToString())
    return False


async def _settle(tr: Transaction, ctx: OpContext, quota: int, _: int) -> bool:
    """Take a quota to its next state if nothing is left to walk for it; True when there is nothing more to settle."""
    marker = keys.quota_walk(quota, keys.NO_INODE)
    record = await quotas.load(tr, quota)
    if record is None:
        tr.clear(marker)
        return True
    if record.carries:
        await quotas.carry(tr, ctx, record)
    if await tr.get_range(*keys.quota_walks(quota), limit=1):
        return False
    if record.state == quotas.CLEARING:
        if not await quotas.is_unused(tr, record):
            return False
        quotas.erase(tr, record)
    elif record.state == quotas.COUNTING:
        record.state = quotas.ACTIVE
        quotas.store(tr, record)
    # Who has more to settle writes the record, which was read here, and so conflicts.
    tr.clear(marker)
    return True
