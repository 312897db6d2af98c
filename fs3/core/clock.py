"""Time as a dependency: the real clocks, and a virtual one that jumps when everybody sleeps."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """What code that measures or waits is given."""

    def monotonic_ns(self) -> int:
        """Nanoseconds of CLOCK_MONOTONIC; leases and deadlines are judged by it."""

    def wall_ns(self) -> int:
        """Nanoseconds since 1970; only ever shown or stored, never compared between machines."""

    async def sleep(self, seconds: float) -> None:
        """Wait."""


class RealClock:
    """The clocks of the machine."""

    def monotonic_ns(self) -> int:
        """See Clock."""
        return time.monotonic_ns()

    def wall_ns(self) -> int:
        """See Clock."""
        return time.time_ns()

    async def sleep(self, seconds: float) -> None:
        """See Clock."""
        await asyncio.sleep(seconds)


class VirtualClock:
    """Time that moves only by :meth:`advance`. Belongs to one event loop."""

    def __init__(self, start_ns: int = 1_000_000_000) -> None:
        self._now_ns = start_ns
        self._sleepers: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def monotonic_ns(self) -> int:
        """See Clock."""
        return self._now_ns

    def wall_ns(self) -> int:
        """See Clock; the same as monotonic_ns."""
        return self._now_ns

    async def sleep(self, seconds: float) -> None:
        """See Clock."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_ns + int(seconds * 1e9), next(self._order), future))
        await future

    async def advance(self, seconds: float, *, settle_turns: int = 50) -> None:
        """Move time forward, waking sleepers in order; between two wakings the loop turns `settle_turns` times."""
        ends_ns = self._now_ns + int(seconds * 1e9)
        await self._settle(settle_turns)
        while self._sleepers and self._sleepers[0][0] <= ends_ns:
            wakes_ns, _, future = heapq.heappop(self._sleepers)
            self._now_ns = max(self._now_ns, wakes_ns)
            if not future.done():
                future.set_result(None)
            await self._settle(settle_turns)
        self._now_ns = ends_ns

    @staticmethod
    async def _settle(turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
