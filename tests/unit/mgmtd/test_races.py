"""What happens between a decision and its commit, in virtual time with a store that takes its time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from fs3.core.clock import Clock
from fs3.core.errors import Fs3Error
from fs3.kv.faults import KvFaults
from fs3.kv.memory import MemoryKv
from fs3.mgmtd.manager import Manager
from fs3.mgmtd.service import MgmtdService
from fs3.rpc.mgmtd_client import MgmtdClient, NodeSession
from fs3.testing.virtual_loop import LoopClock, Process, VirtualLoop
from fs3.testing.virtual_network import VirtualNetwork
from fs3.v1.mgmtd_pb2 import HeartbeatRequest, ManagerTime
from fs3.v1.routing_pb2 import Disk, Node, PublicState
from tests.unit.mgmtd.harness import CLUSTER, TOKEN, config

LEASE_S = 6.0
ADDRESS = "mgmtd0:7000"
SERVING = PublicState.PUBLIC_STATE_SERVING


class SlowStore(MemoryKv):
    """A store whose commits wait while `held` is set, with everything in it."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__(now_ms=lambda: loop.now_ns // 1_000_000, faults=self.Gate(random.Random(1)))
        self.faults: SlowStore.Gate

    class Gate(KvFaults):
        open_s = 0.0

        async def delay(self) -> None:
            await asyncio.sleep(self.open_s)


class World:
    def __init__(self) -> None:
        self.loop = VirtualLoop()
        self.network = VirtualNetwork(self.loop, lambda origin, to: (1_000_000,))
        self.clock: Clock = LoopClock(self.loop)
        self.store = SlowStore(self.loop)
        self.service = MgmtdService(
            config(lease_ms=int(LEASE_S * 1000), heartbeat_ms=1000, replicas=2, primary_lease_ms=20_000, host="mgmtd0"),
            store=self.store,
            clock=self.clock,
            network=self.network.at("mgmtd0"),
            rng=random.Random(1),
        )
        Process(self.loop, "mgmtd0").start(self.service.run(asyncio.Event()))

    @property
    def manager(self) -> Manager:
        assert self.service.manager is not None
        return self.service.manager

    def node(self, name: str) -> tuple[MgmtdClient, NodeSession]:
        client = MgmtdClient([ADDRESS], TOKEN, CLUSTER, network=self.network.at(name))
        uuid = name.encode().ljust(16, b"\0")
        node = Node(uuid=uuid, role="storage", host=name, frame_port=1, incarnation=uuid)
        return client, NodeSession(client, node, [Disk(uuid=uuid, path="/d")], clock=self.clock)


def run(body: Callable[[World], Awaitable[None]]) -> None:
    world = World()

    async def main() -> None:
        await asyncio.sleep(1)
        await Process(world.loop, "nodes").start(body(world))

    try:
        world.loop.run_until_complete(main())
    finally:
        world.loop.close()


def request(session: NodeSession, sequence: int, answered: ManagerTime | None = None) -> HeartbeatRequest:
    return HeartbeatRequest(
        node_id=session.node.node_id,
        incarnation=session.node.incarnation,
        sequence=sequence,
        routing_version=session.routing.version,
        answered=answered,
    )


def test_no_lease_is_renewed_on_old_routing_while_the_node_is_being_taken_out_of_service() -> None:
    async def body(world: World) -> None:
        client, quiet = world.node("quiet")
        _, loud = world.node("loud")
        for session in (quiet, loud):
            await session.register()
        await asyncio.sleep(1)
        loop = asyncio.get_running_loop()
        await client.heartbeat(request(quiet, 1), timeout_s=1)
        sequence, answered = 0, None
        while not world.manager._in_flight:
            sequence += 1
            answered = (await client.heartbeat(request(loud, sequence, answered), timeout_s=1)).sent
            # From here on the decision to fail the silent node takes a second to become durable.
            world.store.faults.open_s = 0.5 if sequence > LEASE_S - 2 else 0.0
            await asyncio.sleep(0.3 if sequence > LEASE_S - 2 else 1)
        version = world.manager.records.chains[1].chain.version
        sent_s = loop.time()
        response = await client.heartbeat(request(quiet, 2), timeout_s=5)
        assert loop.time() > sent_s + 0.1
        (chain,) = [c for c in response.routing.chains if c.chain_id == 1]
        assert chain.version > version
        assert [t.target_id // 1000 for t in chain.targets if t.state == SERVING] == [loud.node.node_id]

    run(body)


def test_who_waited_while_the_outcome_of_a_commit_stayed_unknown_does_not_decide_any_more() -> None:
    async def body(world: World) -> None:
        _, session = world.node("first")
        manager = world.manager
        async with manager.lock:
            waiting = asyncio.create_task(session.register(timeout_s=5))
            await asyncio.sleep(0.1)
            manager.lose("the outcome of a commit is not known")
        await waiting
        # Taken by the next primary, which read what there is: the one that was lost has decided nothing.
        assert world.manager is not manager
        assert not manager.records.nodes
        assert len(world.manager.records.nodes) == 1

    run(body)


def test_a_registration_whose_caller_goes_away_leaves_records_and_store_the_same() -> None:
    async def body(world: World) -> None:
        client, first = world.node("first")
        world.store.faults.open_s = 0.4
        with pytest.raises(Fs3Error):
            await client.register(first.node, first.disks, timeout_s=0.6)
        _, second = world.node("second")
        await second.register()
        await asyncio.sleep(3)
        assert sorted(n.node.host for n in world.manager.records.nodes.values()) == ["first", "second"]
        assert second.node.node_id == 2

    run(body)
