"""Requests that wait for a lock: they look again when this server changed the inode's locks, and now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from fs3.core.clock import Clock
from fs3.meta.clock import monotonic_s
from fs3.v1.meta_pb2 import AwaitLockRequest, AwaitLockResponse

WAIT_S_MAX: Final = 20.0
# A rest of the time that is not waited out.
WAIT_S_MIN: Final = 0.001
# Changes through other servers are seen after so long. The pause doubles from the first to the last.
LOOK_S_MIN: Final = 0.02
LOOK_S_MAX: Final = 0.5

Look = Callable[[], Awaitable[AwaitLockResponse]]


class LockWaits:
    """Belongs to one event loop. Holds nothing that matters: who waits has its place in the store."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # Events of those that wait, by inode.
        self._waiting: dict[int, set[asyncio.Event]] = {}

    def changed(self, inode: int) -> None:
        """Locks of the inode changed: whoever waits for one looks again."""
        for event in self._waiting.get(inode, ()):
            event.set()

    async def wait(self, request: AwaitLockRequest, look: Look, *, left_s: float) -> AwaitLockResponse:
        """Look until the lock is free, for the time that the request gives but at most `left_s`."""
        ends_s = monotonic_s(self._clock) + min(request.wait_ms / 1000, WAIT_S_MAX, left_s)
        event = asyncio.Event()
        self._waiting.setdefault(request.inode, set()).add(event)
        try:
            pause_s = LOOK_S_MIN
            while True:
                event.clear()
                response = await look()
                left_s = ends_s - monotonic_s(self._clock)
                if response.free or left_s < WAIT_S_MIN:
                    return response
                await self._pause(event, min(pause_s, left_s))
                pause_s = min(pause_s * 2, LOOK_S_MAX)
        finally:
            self._forget(request.inode, event)

    async def _pause(self, event: asyncio.Event, seconds: float) -> None:
        woken = asyncio.ensure_future(event.wait())
        pause = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait({woken, pause}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
            pause.cancel()

    def _forget(self, inode: int, event: asyncio.Event) -> None:
        events = self._waiting[inode]
        events.discard(event)
        if not events:
            del self._waiting[inode]
