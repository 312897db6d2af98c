"""What every pass of an audit shares: pages, looks, confirmation and repair."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from fs3.core.clock import Clock
from fs3.core.errors import Fs3Error
from fs3.kv import retry
from fs3.kv.api import Conflict, KvStore, TooOld, Transaction, TransactionFn
from fs3.meta.clock import monotonic_s
from fs3.meta.context import OpContext
from fs3.meta.fsck.report import Finding, Report
from fs3.meta.scan import Rows

T = TypeVar("T")

LOOKS: Final = 3
LOOK_PAUSE_S: Final = 2.0
SUSPECTS_MAX: Final = 10_000
# An audit outlives a restart of the store.
PATIENCE_S: Final = 60.0
PAGE_ROWS: Final = 256
# A page during which clients were served is followed by a rest of so many times its duration.
REST_FACTOR: Final = 1.0


class Unsettled(Exception):
    """What was looked at changed meanwhile, so that the look says nothing."""


# Examines one thing; None when it is right. With a context it repairs in the same transaction what it returns.
Look = Callable[[Transaction, OpContext | None], Awaitable[Finding | None]]


@dataclass(frozen=True, slots=True)
class Options:
    """What an audit does. `orphan_age_s`: how long an inode has to be gone before its chunks are removed.

    ``look_pause_s``: time between two looks at the same thing.
    """

    repair: bool = False
    repair_chunks: bool = False
    chunks: bool = True
    orphan_age_s: float = 300.0
    look_pause_s: float = LOOK_PAUSE_S


class Audit:
    """One run. Belongs to one event loop. `served` counts requests of clients."""

    def __init__(
        self,
        store: KvStore,
        clock: Clock,
        new_context: Callable[[], OpContext],
        options: Options,
        report: Report,
        *,
        served: Callable[[], int] = lambda: 0,
    ) -> None:
        self.store = store
        self.clock = clock
        self.options = options
        self.report = report
        self.started_ns = clock.wall_ns()
        self._new_context = new_context
        self._served = served

    async def read(self, fn: TransactionFn[T]) -> T:
        """Run a transaction that may be repeated. Raises KvError when the store is not there for PATIENCE_S."""
        return await retry.run(self.store, fn, idempotent=True, deadline_ms=PATIENCE_S * 1000)

    async def pages(
        self, span: tuple[bytes, bytes], visit: Callable[[Transaction, Rows], Awaitable[T]], *, limit: int | None = None
    ) -> AsyncIterator[T]:
        """What `visit` makes of each page of a key range; it reads what else it needs from the page's snapshot."""
        begin, end = span
        limit = PAGE_ROWS if limit is None else limit
        while begin < end:

            async def page(tr: Transaction, begin: bytes = begin) -> tuple[Rows, T]:
                rows = await tr.get_range(begin, end, limit=limit, snapshot=True)
                return rows, await visit(tr, rows)

            started_s, served = monotonic_s(self.clock), self._served()
            rows, result = await self.read(page)
            self.report.looked_at += len(rows)
            yield result
            begin = rows[-1][0] + b"\x00" if len(rows) == limit else end
            took_s = monotonic_s(self.clock) - started_s
            await asyncio.sleep(0)
            if took_s > 0 and self._served() != served:
                await self.clock.sleep(took_s * REST_FACTOR)

    async def pause(self) -> None:
        """Let time pass before the next look."""
        if self.options.look_pause_s:
            await self.clock.sleep(self.options.look_pause_s)
        else:
            await asyncio.sleep(0)

    async def look(self, look: Look, *, repair: bool) -> Finding | None:
        """One look, in a transaction of its own. Raises Unsettled."""
        ctx = self._new_context() if repair else None

        async def attempt(tr: Transaction) -> Finding | None:
            if ctx is not None:
                ctx.begin()
            return await look(tr, ctx)

        try:
            return await retry.run(self.store, attempt, idempotent=True)
        except (Conflict, TooOld):
            # Too much to be seen at once, or too busy to be changed.
            raise Unsettled from None

    async def confirm(self, suspects: list[Look]) -> None:
        """Look again at `suspects`; report and, if told to, repair what is wrong every time. Empties the list."""
        looks = suspects[:]
        suspects.clear()
        for turn in range(1, LOOKS):
            if not looks:
                return
            await self.pause()
            last = turn == LOOKS - 1
            looks = [look for look in looks if await self._again(look, last)]

    async def _again(self, look: Look, last: bool) -> bool:
        try:
            finding = await self.look(look, repair=False)
            if finding is not None and last:
                await self.settle(look, finding)
        except Unsettled:
            self.report.unsettled += last
            return True
        return finding is not None

    async def settle(self, look: Look, finding: Finding) -> None:
        """Repair what a finding is about if that is wanted and possible, and report it."""
        repaired = False
        if self.options.repair and finding.repair:
            try:
                await self.look(look, repair=True)
                repaired = True
            except Unsettled:
                finding = replace(finding, repair="not done: it changed meanwhile; repair again")
            except Fs3Error as exc:
                finding = replace(finding, repair=f"not possible: {exc.message}")
        self.report.add(finding, repaired=repaired)
