"""Talking to the cluster manager: finding the primary, staying registered, following the routing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc

from fs3.core.clock import Clock, RealClock
from fs3.core.errors import Fs3Error, error
from fs3.core.routing import News, known, received
from fs3.rpc.grpc_client import metadata
from fs3.rpc.grpc_common import from_rpc_error
from fs3.rpc.network import GrpcNetwork, Network
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import (
    GetPrimaryRequest,
    GetPrimaryResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ManagerTime,
    RegisterRequest,
    RegisterResponse,
    TargetReport,
    UnregisterRequest,
    WatchRoutingRequest,
)
from fs3.v1.mgmtd_pb2_grpc import MgmtdStub
from fs3.v1.routing_pb2 import Disk, Node, Routing

log = logging.getLogger("fs3.rpc.mgmtd")

ATTEMPT_S: Final = 2.0
PAUSE_S_MIN: Final = 0.05
# Short beside half a node's lease: a node that looks for a new primary must find it before it stops serving.
PAUSE_S_MAX: Final = 0.2
# After a heartbeat that failed the next one follows sooner, by this factor.
HURRY_FACTOR: Final = 4
_ELSEWHERE: Final = frozenset({Code.CODE_UNAVAILABLE, Code.CODE_TIMEOUT, Code.CODE_NOT_PRIMARY})


class MgmtdClient:
    """Calls to whichever manager is primary. Belongs to one event loop; any number of tasks may call."""

    def __init__(
        self, addresses: Sequence[str], token: str, cluster_id: str, *, network: Network | None = None
    ) -> None:
        if not addresses:
            raise error(Code.CODE_INVALID_ARGUMENT, "no address of a cluster manager is given")
        self._addresses = list(addresses)
        self._metadata = metadata(token, cluster_id)
        self._network = network or GrpcNetwork()
        self._channels: dict[str, Any] = {}
        self._stubs: dict[str, Any] = {}
        self._primary = self._addresses[0]

    @property
    def primary(self) -> str:
        """The address that the next call is tried at first."""
        return self._primary

    def _stub(self, address: str) -> Any:
        if address not in self._stubs:
            self._channels[address] = self._network.connect(address)
            self._stubs[address] = MgmtdStub(self._channels[address])
        return self._stubs[address]

    def _look_elsewhere(self, exc: Fs3Error) -> None:
        """Choose where to try next after `exc` at the present choice."""
        if exc.primary and exc.primary != self._primary:
            self._primary = exc.primary
            return
        known = self._addresses
        at = known.index(self._primary) if self._primary in known else -1
        self._primary = known[(at + 1) % len(known)]

    async def call(self, method: str, request: Any, timeout_s: float) -> Any:
        """Call the primary, looking for it until `timeout_s` seconds have passed.

        Raises the primary's Fs3Error, or UNAVAILABLE / TIMEOUT / NOT_PRIMARY when none was found in time.
        """
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        pause_s = PAUSE_S_MIN
        while True:
            left_s = ends_s - loop.time()
            address = self._primary
            try:
                call = getattr(self._stub(address), method)
                return await call(request, timeout=max(0.001, min(ATTEMPT_S, left_s)), metadata=self._metadata)
            except grpc.RpcError as exc:
                failure = from_rpc_error(exc, f"the cluster manager at {address}")
            if failure.code not in _ELSEWHERE:
                raise failure
            if address == self._primary:
                self._look_elsewhere(failure)
            if loop.time() + pause_s >= ends_s:
                raise failure
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    async def register(self, node: Node, disks: Sequence[Disk] = (), *, timeout_s: float = 30.0) -> RegisterResponse:
        """Make the node known (node_id 0: the manager finds it by its uuid, or gives it one)."""
        response: RegisterResponse = await self.call("Register", RegisterRequest(node=node, disks=disks), timeout_s)
        return response

    async def heartbeat(self, request: HeartbeatRequest, *, timeout_s: float) -> HeartbeatResponse:
        """Say that the node lives. Raises STALE_HANDLE when it has to register again."""
        response: HeartbeatResponse = await self.call("Heartbeat", request, timeout_s)
        return response

    async def unregister(self, node_id: int, incarnation: bytes, *, timeout_s: float = 3.0) -> None:
        """Say that the node's process ends in good order."""
        await self.call("Unregister", UnregisterRequest(node_id=node_id, incarnation=incarnation), timeout_s)

    async def get_primary(self, *, timeout_s: float = 5.0) -> GetPrimaryResponse:
        """Ask who is primary."""
        response: GetPrimaryResponse = await self.call("GetPrimary", GetPrimaryRequest(), timeout_s)
        return response

    async def watch_routing(self, routing: Routing) -> AsyncIterator[News]:
        """Yield every routing newer than `routing`, for ever; losses of the manager are waited out."""
        pause_s = PAUSE_S_MIN
        base = routing
        while True:
            address = self._primary
            stream = None
            try:
                request = WatchRoutingRequest(known_version=routing.version, known=known(base))
                stream = self._stub(address).WatchRouting(request, metadata=self._metadata)
                async for response in stream:
                    pause_s = PAUSE_S_MIN
                    news = received(routing, response)
                    if news is not None and news.routing.version > routing.version:
                        base = routing = news.routing
                        yield news
            except Fs3Error as exc:
                log.warning("routing is asked for whole: %s", exc.message)
                base = Routing()
            except grpc.RpcError as exc:
                failure = from_rpc_error(exc, f"the cluster manager at {address}")
                if failure.code not in _ELSEWHERE:
                    log.warning("routing cannot be followed: %s", failure.message)
                if address == self._primary:
                    self._look_elsewhere(failure)
            finally:
                if stream is not None:
                    stream.cancel()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S_MAX)

    async def close(self) -> None:
        """Close every channel."""
        channels, self._channels = list(self._channels.values()), {}
        self._stubs.clear()
        for channel in channels:
            await channel.close(None)


@dataclass
class NodeHooks:
    """What a service adds to its membership; all are called on the event loop and must not block long."""

    report: Callable[[], tuple[list[TargetReport], list[Disk]]] = lambda: ([], [])
    """What to say in a heartbeat."""
    on_routing: Callable[[News], None] = lambda _: None
    """A newer routing."""
    on_accepted: Callable[[int, int], None] = lambda _sent_ns, _lease_ms: None
    """A heartbeat or registration sent at that monotonic time was accepted; T in milliseconds."""


class NodeSession:
    """Keeps one node registered: heartbeats, routing, registering again when the manager forgot it."""

    def __init__(
        self,
        client: MgmtdClient,
        node: Node,
        disks: Sequence[Disk] = (),
        hooks: NodeHooks | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.client = client
        self.clock: Clock = clock or RealClock()
        self.node = node
        self.disks = list(disks)
        self.hooks = hooks or NodeHooks()
        self.routing = Routing()
        # The next heartbeat asks for the whole: what an answer brought did not fit.
        self._misfit = False
        self.heartbeat_ms = 1000
        self._sequence = 0
        self._answered = ManagerTime()
        self._kick = asyncio.Event()

    async def register(self, *, timeout_s: float = 30.0) -> int:
        """Register; returns the node id, which stays the same for a uuid. Raises Fs3Error.

        It brings no lease: the first heartbeat does, when the manager has heard how the targets are.
        """
        response = await self.client.register(self.node, self.disks, timeout_s=timeout_s)
        self.node.node_id = response.node_id
        self.heartbeat_ms = response.heartbeat_ms or self.heartbeat_ms
        self._take(News(response.routing, None))
        return response.node_id

    def _take(self, news: News) -> None:
        if news.routing.version > self.routing.version:
            self.routing = news.routing
            self.hooks.on_routing(news)
            self.kick()

    def kick(self) -> None:
        """Send the next heartbeat now: there is something to report."""
        self._kick.set()

    async def run(self) -> None:
        """Heartbeat and follow the routing until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._heartbeats())
            group.create_task(self._follow())

    async def _follow(self) -> None:
        async for news in self.client.watch_routing(self.routing):
            self._take(news)

    async def _heartbeats(self) -> None:
        warned = False
        while True:
            try:
                if not await self._heartbeat():
                    await self._heartbeat()
                if warned:
                    log.info("the cluster manager answers again")
                warned = False
            except Fs3Error as exc:
                if not warned:
                    log.warning("heartbeat failed: %s", exc.message)
                warned = True
            self._kick.clear()
            try:
                async with asyncio.timeout(self.heartbeat_ms / 1000 / (HURRY_FACTOR if warned else 1)):
                    await self._kick.wait()
                # Kicks that come together make one heartbeat.
                await asyncio.sleep(min(0.01, self.heartbeat_ms / 4000))
            except TimeoutError:
                pass

    async def _heartbeat(self) -> bool:
        """Send one; False when the node had to register again, so that another one is due at once."""
        targets, disks = self.hooks.report()
        self._sequence += 1
        sent_ns = self.clock.monotonic_ns()
        # The stream may bring a newer one before the answer is here, which speaks of this one.
        routing = self.routing
        request = HeartbeatRequest(
            node_id=self.node.node_id,
            incarnation=self.node.incarnation,
            sequence=self._sequence,
            targets=targets,
            disks=disks,
            routing_version=routing.version,
            answered=self._answered,
            known=known(Routing() if self._misfit else routing),
        )
        try:
            response = await self.client.heartbeat(request, timeout_s=max(0.5, 2 * self.heartbeat_ms / 1000))
        except Fs3Error as exc:
            if exc.code != Code.CODE_STALE_HANDLE:
                raise
            log.info("registering again: %s", exc.message)
            await self.register(timeout_s=5.0)
            return False
        self._take_answer(routing, response)
        if (response.sent.epoch, response.sent.ns) > (self._answered.epoch, self._answered.ns):
            self._answered = response.sent
        if not response.no_lease:
            self.hooks.on_accepted(sent_ns, self.routing.lease_ms)
        return True

    def _take_answer(self, routing: Routing, response: HeartbeatResponse) -> None:
        """Take the routing that came with an answer to who had `routing`. Raises PROTOCOL; then there is no lease."""
        self._misfit = True
        news = received(routing, response)
        self._misfit = False
        if news is not None:
            self._take(news)

    async def unregister(self, *, timeout_s: float = 3.0) -> None:
        """Say goodbye; a manager that cannot be reached is not waited for longer than `timeout_s`."""
        try:
            await self.client.unregister(self.node.node_id, self.node.incarnation, timeout_s=timeout_s)
        except Fs3Error as exc:
            log.warning("the cluster manager was not told of the end: %s", exc.message)
