"""WatchRouting: the routing now and at every change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from fs3.mgmtd.manager import Manager
from fs3.v1.mgmtd_pb2 import WatchRoutingRequest
from fs3.v1.routing_pb2 import GetRoutingResponse, RoutingKnown

# The first change of a burst goes out at once; the others wait until so long after it.
COALESCE_S: Final = 0.05


async def watch_routing(manager: Manager, request: WatchRoutingRequest) -> AsyncIterator[GetRoutingResponse]:
    """Yield the routing whenever it is newer than what was sent; ends when the manager loses its lease.

    A caller that takes deltas gets each to what was sent before, the first to what it says that it knows.
    """
    loop = asyncio.get_running_loop()
    known, takes = request.known, request.known.delta_format
    version = request.known_version
    sent_s = 0.0
    while True:
        await manager.wait_newer(version)
        if manager.lost.is_set():
            return
        early_s = sent_s + COALESCE_S - loop.time()
        if early_s > 0:
            await asyncio.sleep(early_s)
        sent, sent_s = manager.routing, loop.time()
        response = manager.teller.tell(known)
        version = sent.version
        known = RoutingKnown(version=version, history=sent.history, delta_format=takes)
        yield response
