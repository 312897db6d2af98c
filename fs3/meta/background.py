"""The workers of a metadata server: garbage collector, truncations, sessions, quotas, stored answers, trash."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from fs3.core.errors import Fs3Error
from fs3.kv.api import KvError
from fs3.meta import keys
from fs3.meta.engine import Engine
from fs3.meta.routing import RoutingHolder

log = logging.getLogger("fs3.meta.background")

GC_IDLE_S: Final = 5.0
GC_RETRY_S: Final = 0.5
# The first removed file waits this long for others, so that they go together.
GC_GATHER_S: Final = 0.1
TRUNCATION_S: Final = 3.0
SWEEP_S: Final = 300.0
EXPIRE_S: Final = 30.0
QUOTA_WALK_S: Final = 1.0
REPORT_S: Final = 60.0
ERROR_PAUSE_S: Final = 1.0

_HASH = 0x9E37_79B9_7F4A_7C15


def owner_of(inode: int, metas: list[int]) -> int:
    """The metadata server that collects an inode, by rendezvous hash; 0 when there is none. Pure."""

    def weight(node_id: int) -> int:
        mixed = (inode ^ node_id * _HASH) * _HASH & 0xFFFF_FFFF_FFFF_FFFF
        return (mixed ^ mixed >> 32) * _HASH & 0xFFFF_FFFF_FFFF_FFFF

    return max(metas, key=weight, default=0)


class Background:
    """Runs the workers until stopped. Belongs to one event loop."""

    def __init__(self, engine: Engine, holder: RoutingHolder) -> None:
        self._engine = engine
        self._holder = holder
        self._tasks: list[asyncio.Task[None]] = []
        self.node_id = 0
        engine.collector.owns = self._owns
        engine.collector.settings = lambda: holder.settings
        engine.quota_walker.owns = self._owns

    def _owns(self, inode: int) -> bool:
        metas = self._holder.view.live_metas()
        return self.node_id not in metas or owner_of(inode, metas) == self.node_id

    def start(self) -> None:
        """Start every worker."""
        engine = self._engine
        self._tasks = [
            asyncio.create_task(self._collect(), name="fs3-meta-gc"),
            asyncio.create_task(_every(TRUNCATION_S, engine.truncator.step), name="fs3-meta-truncation"),
            asyncio.create_task(_every(engine.session_ms / 4000, engine.reaper.step), name="fs3-meta-reaper"),
            asyncio.create_task(_every(QUOTA_WALK_S, engine.quota_walker.step), name="fs3-meta-quotas"),
            asyncio.create_task(_every(SWEEP_S, engine.sweeper.step), name="fs3-meta-sweeper"),
            asyncio.create_task(_every(EXPIRE_S, self._expire), name="fs3-meta-expirer"),
        ]

    async def stop(self) -> None:
        """Stop them; what they were at is taken up again by whoever comes next."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _expire(self) -> None:
        if self._owns(keys.TRASH_INODE):
            await self._engine.expirer.step()

    async def _collect(self) -> None:
        collector = self._engine.collector
        loop = asyncio.get_running_loop()
        reported_s = loop.time()
        reported = 0
        while True:
            await _guarded(collector.step)
            if loop.time() - reported_s > REPORT_S and (collector.queued or collector.collected > reported):
                log.info("gc: %d removed in all, %d waiting", collector.collected, collector.queued)
                reported_s, reported = loop.time(), collector.collected
            await collector.wait(GC_RETRY_S if collector.queued else GC_IDLE_S)
            await asyncio.sleep(GC_GATHER_S)


async def _every(seconds: float, step: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        await _guarded(step)


async def _guarded(step: Callable[[], Awaitable[object]]) -> None:
    """One step; a worker outlives whatever goes wrong in it."""
    with contextlib.suppress(TimeoutError):
        try:
            await step()
            return
        except (Fs3Error, KvError) as exc:
            log.warning("a background step failed and is tried again: %s", exc)
        except Exception:
            log.exception("a background step failed by a bug and is tried again")
        await asyncio.sleep(ERROR_PAUSE_S)
