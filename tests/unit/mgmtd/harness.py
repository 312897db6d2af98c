"""A manager on a free port with a memory store, and storage nodes that behave as the engine would."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import uvloop

from fs3.core.config import MgmtdConfig
from fs3.kv.api import KvStore
from fs3.kv.memory import MemoryKv
from fs3.mgmtd import chains
from fs3.mgmtd.lease import RELEASE
from fs3.mgmtd.service import MgmtdService
from fs3.rpc.mgmtd_client import MgmtdClient, NodeHooks, NodeSession
from fs3.v1.mgmtd_pb2 import TargetReport
from fs3.v1.routing_pb2 import Disk, Node, PublicState, Routing

LEASE_MS = 400
HEARTBEAT_MS = 40
TOKEN = "t0ken"
CLUSTER = "unit"


def config(**changes: Any) -> MgmtdConfig:
    values: dict[str, Any] = {
        "cluster_id": CLUSTER,
        "token": TOKEN,
        "kv": "memory:",
        "replicas": 3,
        "targets_per_disk": 2,
        "lease_ms": LEASE_MS,
        "heartbeat_ms": HEARTBEAT_MS,
        "primary_lease_ms": 600,
        **changes,
    }
    return MgmtdConfig(**values)


class RunningManager:
    """A manager service in this process, that can be stopped or made to vanish."""

    def __init__(self, service: MgmtdService, task: asyncio.Task[None], stop: asyncio.Event) -> None:
        self.service = service
        self.task = task
        self.stop_event = stop

    @classmethod
    async def start(cls, store: KvStore, *, release: int = RELEASE, **changes: Any) -> RunningManager:
        service = MgmtdService(config(**changes), store=store, release=release)
        stop = asyncio.Event()
        task = asyncio.create_task(service.run(stop))
        ready = asyncio.create_task(service.ready.wait())
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            ready.cancel()
            await task
        return cls(service, task, stop)

    @property
    def address(self) -> str:
        return self.service.address

    async def stop(self) -> None:
        self.stop_event.set()
        await asyncio.gather(self.task, return_exceptions=True)

    @property
    def routing(self) -> Routing:
        assert self.service.manager is not None
        return self.service.manager.routing


class FakeNode:
    """A storage node that follows the start-up and resync rules of targets, without data."""

    def __init__(self, address: str | list[str], *, name: str, disks: int = 1, syncs: bool = True) -> None:
        self.addresses = [address] if isinstance(address, str) else address
        self.name = name
        self.uuid = name.encode().ljust(16, b"\0")
        self.disks = [
            Disk(uuid=f"{name}-{i}".encode().ljust(16, b"\0"), path=f"/{name}/{i}", capacity_bytes=1000, free_bytes=900)
            for i in range(disks)
        ]
        # Whether a syncing target ever becomes complete.
        self.syncs = syncs
        self.broken: set[int] = set()
        self.seen_out: set[int] = set()
        self.fresh: set[int] = set()
        self.session: NodeSession | None = None
        self._client: MgmtdClient | None = None
        self._task: asyncio.Task[None] | None = None
        self._known: set[int] = set()

    @property
    def node_id(self) -> int:
        assert self.session is not None
        return self.session.node.node_id

    def report(self) -> tuple[list[TargetReport], list[Disk]]:
        assert self.session is not None
        reports = []
        for chain in self.session.routing.chains:
            for target in chain.targets:
                if target.target_id // 1000 != self.node_id:
                    continue
                reports.append(
                    TargetReport(
                        target_id=target.target_id,
                        chain_version=chain.version,
                        local_state=self._local(target.target_id, target.state),
                    )
                )
        return reports, self.disks

    def _local(self, target: int, state: int) -> Any:
        if target in self.broken:
            return chains.LOCAL_OFFLINE
        if target not in self._known:
            # Existed in an earlier life: out of service until routing says so.
            self._known.add(target)
            if target not in self.fresh:
                self.seen_out.add(target)
        if target in self.seen_out:
            if state in (chains.SERVING, chains.SYNCING):
                return chains.LOCAL_OFFLINE
            self.seen_out.discard(target)
        if state == chains.SERVING or (state == chains.SYNCING and self.syncs):
            return chains.LOCAL_UPTODATE
        return chains.LOCAL_ONLINE

    async def start(self) -> None:
        """Begin a life: a new incarnation with the same disks."""
        self._client = MgmtdClient(self.addresses, TOKEN, CLUSTER)
        node = Node(uuid=self.uuid, role="storage", host="127.0.0.1", frame_port=1, incarnation=os.urandom(16))
        self.session = NodeSession(self._client, node, self.disks, NodeHooks(report=self.report))
        self._known = set()
        await self.session.register()
        mine = {t.target_id for t in self.session.routing.targets if t.node_id == self.node_id}
        # What routing does not name at registration is made in this life.
        self.fresh = set(range(self.node_id * 1000, self.node_id * 1000 + 1000)) - mine
        self._task = asyncio.create_task(self.session.run())

    async def kill(self) -> None:
        """End without a word."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def stop(self) -> None:
        """End in good order."""
        assert self.session is not None
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self.session.unregister()
        await self.kill()


async def until(condition: Callable[[], bool], what: str = "", timeout_s: float = 10.0) -> None:
    """Wait for a condition with a deadline."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"did not become true within {timeout_s} s: {what}") from None


def states(routing: Routing) -> list[tuple[int, list[int]]]:
    return [(c.version, [t.state for t in c.targets]) for c in routing.chains]


def all_serving(routing: Routing) -> bool:
    return bool(routing.chains) and all(
        t.state == PublicState.PUBLIC_STATE_SERVING for c in routing.chains for t in c.targets
    )


@contextlib.asynccontextmanager
async def cluster(nodes: int = 3, **changes: Any) -> AsyncIterator[tuple[RunningManager, list[FakeNode], MemoryKv]]:
    """A manager with `nodes` nodes, all chains serving."""
    store = MemoryKv()
    manager = await RunningManager.start(store, **{"min_storage_nodes": nodes, **changes})
    fakes = [FakeNode(manager.address, name=f"n{i}") for i in range(nodes)]
    try:
        for fake in fakes:
            await fake.start()
        await until(lambda: all_serving(manager.routing), "all chains serve")
        yield manager, fakes, store
    finally:
        for fake in fakes:
            await fake.kill()
        await manager.stop()
        await store.close()


def run(body: Callable[[], Awaitable[None]], timeout_s: float = 30.0) -> None:
    async def main() -> None:
        async with asyncio.timeout(timeout_s):
            await body()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
