"""The garbage collector: removes chunks of inodes without names, sessions and holds, takes detached directories apart.

The queue is in the order of time, so that a pass reads what is due and no more. Files wait for a while: in it somebody
who has one open may say so, and it is taken off the queue again. That ends at a horizon in the store, which is moved
before the chunks of anything behind it are touched; so it does not hang on clocks. Directories are due at once.

It fails closed: an inode's record and queue entry go only after every chain of its stripe has removed the chunks.
What is done twice, by two servers or after a crash, is harmless: inode ids are never used again.

Files go in batches, two transactions each, and while clients are served the collector rests between batches: removed
names are durable already, so only the space waits, URGENT_S at most before it is worked off at full speed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

from fs3.core import settings
from fs3.core.clock import Clock
from fs3.core.errors import Fs3Error, error
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction
from fs3.meta import chunks, keys, kv_namespaces, model, scan, tree
from fs3.meta.chunks import ChunkStore
from fs3.meta.clock import monotonic_s
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Layout

log = logging.getLogger("fs3.meta.gc")

SCAN_ROWS: Final = 256
CHILDREN_MAX: Final = 256
# After so many transactions a huge directory waits for the next pass, so that others get their turn.
EXPAND_PAGES_MAX: Final = 64
# Files whose records go in one transaction, and files and directories that are worked on at a time.
BATCH_FILES: Final = 64
PARALLEL_MAX: Final = 16
# A batch during which clients were served is followed by a rest of so many times its duration.
REST_FACTOR: Final = 3.0
REST_S_MAX: Final = 0.5
# Entries older than this are not kept waiting for clients.
URGENT_S: Final = 30.0
REMOVE_S: Final = 10.0
BACKOFF_S_MIN: Final = 1.0
BACKOFF_S_MAX: Final = 60.0
# Entries whose back-off is remembered; a forgotten one is tried again at once.
BACKOFF_ENTRIES_MAX: Final = 65_536
# An entry of another server's share is taken once it is older than this.
FOREIGN_S: Final = 30.0
# When there are many, those whose time has not come are counted so often, and up to so many.
COUNT_S: Final = 10.0
COUNT_ROWS: Final = 4096
COUNT_MAX: Final = 100_000

_Queued: TypeAlias = Mapping[int, bytes]
"""Keys of queue entries by inode."""


class _Entry(NamedTuple):
    key: bytes
    inode: int
    time_ns: int
    type: int


class Collector:
    """Works off the gc queue. `owns(inode)`: whether the inode is in this server's share. One event loop."""

    def __init__(
        self,
        store: KvStore,
        chunk_store: ChunkStore,
        clock: Clock,
        new_context: Callable[[], OpContext],
        *,
        delay_ms: int = 0,
    ) -> None:
        self._store = store
        self._chunks = chunk_store
        self._clock = clock
        self._new_context = new_context
        self._delay_ms = delay_ms
        self.settings: Callable[[], Mapping[str, str]] = dict
        self.owns: Callable[[int], bool] = lambda inode: True
        # Counts the requests of clients, so that it can be told whether any came meanwhile.
        self.served: Callable[[], int] = lambda: 0
        self._backoff: dict[int, tuple[float, float]] = {}
        self._event = asyncio.Event()
        self.collected = 0
        # Entries that are still queued after the last pass, and when the oldest of them was queued.
        self.queued = 0
        self._oldest_ns = 0
        # Up to when what is queued is due in this pass, and up to when it is known that nobody takes it off the queue.
        self._due_ns = self._horizon_ns = 0
        # When those whose time has not come were counted, and how many they were.
        self._counted = (-COUNT_S, 0)

    @property
    def _delay_ns(self) -> int:
        return settings.value_of(self.settings(), settings.GC_DELAY, self._delay_ms) * 1_000_000

    def wake(self) -> None:
        """There is new work."""
        self._event.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when woken, or after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            pass
        self._event.clear()

    async def step(self) -> int:
        """One pass over what is due; returns how many entries it finished."""
        await self._adopt_unordered()
        finished = left = 0
        oldest_ns = self._clock.wall_ns()
        self._due_ns = oldest_ns - self._delay_ns
        due, waiting = keys.gc_split(self._due_ns)
        async for rows in scan.pages(self._store, due, limit=SCAN_ROWS):
            entries = list(map(_entry, rows))
            done, staying = await self._page(entries)
            finished += done
            left += len(entries) - done
            oldest_ns = min([oldest_ns, *(entry.time_ns for entry in staying)])
        self.collected += finished
        young, first_ns = await self._look_ahead(waiting)
        self.queued, self._oldest_ns = left + young, min(oldest_ns, first_ns)
        return finished

    async def _page(self, entries: list[_Entry]) -> tuple[int, list[_Entry]]:
        """Work on what is this server's turn; returns how many are finished, and among which the others are."""
        ready: list[_Entry] = []
        staying: list[_Entry] = []
        for entry in entries:
            (ready if self._ready(entry) else staying).append(entry)
        finished = 0
        for at in range(0, len(ready), BATCH_FILES):
            batch = ready[at : at + BATCH_FILES]
            done = await self._batch(batch)
            finished += done
            staying += batch if done < len(batch) else []
        return finished, staying

    async def _look_ahead(self, waiting: tuple[bytes, bytes]) -> tuple[int, int]:
        """How many entries wait for their time, as of a moment ago if they are many, and when the first was queued."""
        rows = await anext(aiter(scan.pages(self._store, waiting, limit=SCAN_ROWS)))
        first_ns = _entry(rows[0]).time_ns if rows else self._clock.wall_ns()
        if len(rows) < SCAN_ROWS:
            return len(rows), first_ns
        now_s = monotonic_s(self._clock)
        if now_s - self._counted[0] >= COUNT_S:
            count = 0
            async for rows in scan.pages(self._store, waiting, limit=COUNT_ROWS):
                count += len(rows)
                if count >= COUNT_MAX:
                    break
            self._counted = now_s, min(count, COUNT_MAX)
        return max(self._counted[1], SCAN_ROWS), first_ns

    async def _adopt_unordered(self) -> None:
        """Put what earlier versions queued into the order of time."""
        async for rows in scan.pages(self._store, keys.table(keys.UNORDERED_GC), limit=SCAN_ROWS):
            if rows:
                await retry.run(self._store, lambda tr, rows=rows: _adopt(tr, rows), idempotent=True)  # type: ignore[misc]

    @property
    def oldest_ms(self) -> int:
        """How long the oldest entry that is still queued after the last pass has waited."""
        return max(0, self._clock.wall_ns() - self._oldest_ns) // 1_000_000 if self.queued else 0

    @property
    def refused(self) -> int:
        """Entries whose removal failed and is tried again."""
        return len(self._backoff)

    def _ready(self, entry: _Entry) -> bool:
        age_ns = self._clock.wall_ns() - entry.time_ns
        if not self.owns(entry.inode) and 0 <= age_ns < self._delay_ns + FOREIGN_S * 1e9:
            return False
        return self._backoff.get(entry.inode, (0.0, 0.0))[0] <= monotonic_s(self._clock)

    async def _batch(self, batch: list[_Entry]) -> int:
        """Work on a few entries, then rest if clients were served meanwhile; returns how many are finished."""
        started_s, served = monotonic_s(self._clock), self.served()
        files = {entry.inode: entry.key for entry in batch if entry.type != model.DIRECTORY}
        done = await self._collect(files) if files else 0
        directories = [entry.inode for entry in batch if entry.type == model.DIRECTORY]
        done += sum(await self._each(directories, self._expand))
        took_s = monotonic_s(self._clock) - started_s
        oldest_ns = min(entry.time_ns for entry in batch)
        urgent = self._clock.wall_ns() - oldest_ns > self._delay_ns + URGENT_S * 1e9
        if took_s > 0 and not urgent and self.served() != served:
            await self._clock.sleep(min(took_s * REST_FACTOR, REST_S_MAX))
        return done

    async def _each(self, inodes: list[int], work: Callable[[int], Awaitable[bool]]) -> list[bool]:
        """`work` on every inode, PARALLEL_MAX at a time; False for those that it is not done with."""
        turns = asyncio.Semaphore(PARALLEL_MAX)

        async def attempt(inode: int) -> bool:
            async with turns:
                try:
                    done = await work(inode)
                except (Fs3Error, KvError) as exc:
                    self._postpone(inode, exc)
                    return False
            self._backoff.pop(inode, None)
            return done

        return await asyncio.gather(*map(attempt, inodes))

    def _postpone(self, inode: int, exc: Exception) -> None:
        log.warning("removing inode %#x waits for the next attempt: %s", inode, exc)
        pause_s = min(max(self._backoff.get(inode, (0.0, 0.0))[1] * 2, BACKOFF_S_MIN), BACKOFF_S_MAX)
        if len(self._backoff) >= BACKOFF_ENTRIES_MAX:
            self._backoff.clear()
        self._backoff[inode] = (monotonic_s(self._clock) + pause_s, pause_s)

    async def _collect(self, files: _Queued) -> int:
        """Remove the chunks of files, then their records; returns how many are gone."""
        ctx = self._new_context()
        try:
            await self._pass_horizon(max(keys.gc_parts(key)[0] for key in files.values()))
            records, refused = await retry.run(self._store, lambda tr: _check(tr, files), idempotent=True)
            cut = await self._each(list(records), lambda inode: self._cut(inode, records[inode]))
            cleared = {inode: files[inode] for inode, done in zip(records, cut, strict=True) if done}
            gone, late = await retry.run(self._store, lambda tr: _finish(tr, ctx, cleared), idempotent=True)
        except KvError as exc:
            for inode in files:
                self._postpone(inode, exc)
            return 0
        for inode, refusal in (refused | late).items():
            self._postpone(inode, refusal)
        return len(gone)

    async def _pass_horizon(self, queued_ns: int) -> None:
        """Return once nothing that was queued up to then is taken off the queue any more."""
        if queued_ns <= self._horizon_ns:
            return
        due_ns = self._due_ns

        async def move(tr: Transaction) -> int:
            horizon_ns = model.decode_count(await tr.get(keys.GC_HORIZON))
            if horizon_ns < due_ns:
                tr.set(keys.GC_HORIZON, model.encode_count(due_ns))
            return max(horizon_ns, due_ns)

        self._horizon_ns = await retry.run(self._store, move, idempotent=True)

    async def _cut(self, inode: int, record: InodeRecord | None) -> bool:
        if record is not None and record.attr.type == model.FILE:
            extent = None if record.loose or record.truncating else record.extent_bytes
            ends_s = monotonic_s(self._clock) + REMOVE_S
            await chunks.cut(self._chunks, inode, record.attr.layout, 0, extent, ends_s=ends_s)
        return True

    async def _cut_entries(self, inode: int) -> None:
        """Remove what the directory has on storage as a namespace of the KV cache."""

        async def find(tr: Transaction) -> Layout | None:
            record = await tree.load(tr, inode)
            return None if record is None else await kv_namespaces.layout(tr, record)

        layout = await retry.run(self._store, find, idempotent=True)
        if layout is not None:
            await chunks.cut_entries(self._chunks, inode, layout, ends_s=monotonic_s(self._clock) + REMOVE_S)

    async def _expand(self, inode: int) -> bool:
        """Take a detached directory apart, CHILDREN_MAX entries in a transaction; True when it is gone."""
        self.wake()
        await self._cut_entries(inode)
        for _ in range(EXPAND_PAGES_MAX):
            ctx = self._new_context()

            async def expand(tr: Transaction, ctx: OpContext = ctx) -> bool:
                ctx.begin()
                return await _expand_page(tr, ctx, inode)

            if await retry.run(self._store, expand, idempotent=True):
                return True
        return False


def _entry(row: tuple[bytes, bytes]) -> _Entry:
    key, value = row
    record = model.decode_gc(value)
    return _Entry(key, keys.gc_parts(key)[1], record.time_ns, record.type)


async def _adopt(tr: Transaction, rows: scan.Rows) -> None:
    for key, value in rows:
        tr.clear(key)
        record = await tree.load(tr, keys.inode_of(key))
        if record is not None:
            entry = model.decode_gc(value)
            record.queued_ns = 0 if entry.type == model.DIRECTORY else entry.time_ns
            tree.store(tr, record)
            tr.set(tree.gc_key(record), value)


async def _check(tr: Transaction, queued: _Queued) -> tuple[dict[int, InodeRecord | None], dict[int, Fs3Error]]:
    """The records of those that may go, None of what is gone already, and why others may not.

    Of one that was taken off the queue meanwhile it says nothing.
    """
    records: dict[int, InodeRecord | None] = {}
    refused: dict[int, Fs3Error] = {}
    for inode, key in queued.items():
        record = await tree.load(tr, inode)
        if record is not None and tree.gc_key(record) != key:
            continue
        if record is not None and (record.attr.nlink or await tree.is_kept(tr, inode)):
            refused[inode] = error(Code.CODE_INTERNAL, f"inode {inode:#x} is queued for removal and in use: it stays")
        else:
            records[inode] = record
    return records, refused


async def _finish(tr: Transaction, ctx: OpContext, queued: _Queued) -> tuple[list[int], dict[int, Fs3Error]]:
    """Erase the records of files whose chunks are gone; returns which, and why the others stay."""
    # What has waited for long enough does not come back, but nothing is taken on trust here.
    records, refused = await _check(tr, queued)
    for inode, record in records.items():
        if record is not None:
            await tree.erase(tr, ctx, record)
            tr.clear(keys.truncation(inode))
        tr.clear(queued[inode])
    return list(records), refused


async def _expand_page(tr: Transaction, ctx: OpContext, inode: int) -> bool:
    """Detach the first entries; True when the directory is gone."""
    directory = await tree.load(tr, inode)
    if directory is None:
        tr.clear(keys.gc(0, inode))
        return True
    begin, end = keys.dirents(inode)
    rows = await tr.get_range(begin, end, limit=CHILDREN_MAX)
    for key, value in rows:
        child_inode, file_type = model.decode_dirent(value)
        child = await tree.load(tr, child_inode)
        tree.remove_entry(tr, inode, keys.dirent_name(key), file_type)
        if child is None:
            continue
        if file_type == model.DIRECTORY:
            await tree.detach(tr, ctx, child)
        else:
            await tree.drop_link(tr, ctx, child, hold_session=b"", client_id=b"")
    if len(rows) == CHILDREN_MAX:
        return False
    # The range was read to its end, so that a creation in the directory conflicts with this.
    await tree.erase(tr, ctx, directory)
    tr.clear(tree.gc_key(directory))
    return True
