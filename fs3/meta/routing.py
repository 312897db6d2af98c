"""The newest routing this server knows, indexed, and a way to wait for a newer one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fs3.core.clock import Clock
from fs3.core.routing import News, RoutingTeller
from fs3.v1.routing_pb2 import Chain, ChainTable, Node, NodeStatus, PublicState, Routing, RoutingDelta


@dataclass(frozen=True)
class RoutingView:
    """One version of the routing. Never changed once made."""

    routing: Routing = field(default_factory=Routing)
    nodes: dict[int, Node] = field(default_factory=dict)
    chains: dict[int, Chain] = field(default_factory=dict)
    tables: dict[tuple[int, int], ChainTable] = field(default_factory=dict)
    node_of_target: dict[int, int] = field(default_factory=dict)
    # By table id; 0: of the first table.
    newest_tables: dict[int, ChainTable] = field(default_factory=dict)

    @classmethod
    def of(cls, routing: Routing) -> RoutingView:
        """Index a routing."""
        return cls(
            routing,
            {node.node_id: node for node in routing.nodes},
            {chain.chain_id: chain for chain in routing.chains},
            {(table.table_id, table.table_version): table for table in routing.tables},
            {target.target_id: target.node_id for target in routing.targets},
            _newest(routing.tables),
        )

    @property
    def version(self) -> int:
        """Version of the routing, 0 for none."""
        return self.routing.version

    def newest_table(self, table_id: int = 0) -> ChainTable | None:
        """The newest version of a table, by default of the first table; None before there is one."""
        return self.newest_tables.get(table_id)

    def serving(self, chain: Chain) -> list[int]:
        """Targets of the chain that serve, head first."""
        return [t.target_id for t in chain.targets if t.state == PublicState.PUBLIC_STATE_SERVING]

    def address_of(self, target_id: int) -> str | None:
        """host:port of the frame protocol of the node that has the target; None when it is not known."""
        node = self.nodes.get(self.node_of_target.get(target_id, 0))
        return f"{node.host}:{node.frame_port}" if node is not None and node.frame_port else None

    def live_metas(self) -> list[int]:
        """Node ids of the metadata services that heartbeat, in order."""
        connected = NodeStatus.NODE_STATUS_CONNECTED
        return sorted(n.node_id for n in self.routing.nodes if n.role == "meta" and n.status == connected)


def _newest(tables: Iterable[ChainTable]) -> dict[int, ChainTable]:
    """The newest version of each table by its id, and under 0 that of the first; without those that have no chains."""
    usable = sorted((t for t in tables if t.chain_ids), key=lambda t: t.table_version)
    newest = {table.table_id: table for table in usable}
    return {0: newest[min(newest)], **newest} if newest else newest


class RoutingHolder:
    """Holds the newest view. Belongs to one event loop."""

    def __init__(self) -> None:
        self.view = RoutingView()
        self.teller = RoutingTeller()
        self._newer: asyncio.Future[None] | None = None

    @property
    def settings(self) -> Mapping[str, str]:
        """Settings of the cluster."""
        return self.view.routing.settings.values

    def take(self, routing: Routing, delta: RoutingDelta | None = None) -> None:
        """Take a routing if it is newer, and wake who waits for it. `delta`: what brought it, unless it came whole."""
        if routing.version <= self.view.version:
            return
        self.teller.advance(News(routing, delta))
        self.view = RoutingView.of(routing)
        if self._newer is not None:
            self._newer.set_result(None)
            self._newer = None

    async def wait_beyond(self, version: int, timeout_s: float) -> RoutingView:
        """The view, as soon as it is newer than `version`, at the latest after `timeout_s`."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        while self.view.version <= version and loop.time() < ends_s:
            if self._newer is None:
                self._newer = loop.create_future()
            try:
                async with asyncio.timeout_at(ends_s):
                    await asyncio.shield(self._newer)
            except TimeoutError:
                break
        return self.view


async def backoff(holder: RoutingHolder, version: int, clock: Clock, seconds: float) -> None:
    """Pause before another try: shorter when a routing beyond `version` arrives."""
    if holder.view.version > version:
        await clock.sleep(min(seconds, 0.01))
    else:
        await holder.wait_beyond(version, seconds)
