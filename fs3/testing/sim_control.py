"""The control plane inside a simulation: real managers, real storage shells and a follower of the routing.

Each machine runs one process at a time under a supervisor, which begins it again when it ended by an operating
error. Managers suffer what the plan says; storage nodes what the world says through its events.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final, Protocol

from fs3.core.config import MgmtdConfig, StorageConfig
from fs3.core.errors import Fs3Error
from fs3.core.ids import TARGETS_PER_NODE_MAX, UUID_BYTES
from fs3.core.routing import News
from fs3.kv.api import KvError, KvStore
from fs3.mgmtd.manager import Manager
from fs3.mgmtd.service import MgmtdService
from fs3.rpc.mgmtd_client import MgmtdClient, NodeHooks, NodeSession
from fs3.storage.disks import DiskIdentity, NodeIdentity
from fs3.storage.engine import StorageEngine
from fs3.storage.service import STATUS_S, StorageService, Surroundings
from fs3.testing.sim_checks import Checks
from fs3.testing.sim_plan import CLUSTER, Plan
from fs3.testing.sim_world import World
from fs3.testing.virtual_loop import LoopClock, Process, VirtualLoop
from fs3.testing.virtual_network import PORT, VirtualNetwork
from fs3.v1.routing_pb2 import LocalState, Node
from fs3.v1.storage_pb2 import EngineStatus

TOKEN: Final = "simulated"
# A supervisor begins a process again so long after it ended by itself.
RESTART_S: Final = 5.0
DISK_BYTES: Final = 1 << 40
FOLLOWER: Final = "meta0"


class Surrounding(Protocol):
    """What the machines of one simulation share."""

    plan: Plan
    loop: VirtualLoop
    network: VirtualNetwork
    world: World
    checks: Checks
    faults: Counter[str]

    @property
    def store(self) -> KvStore:
        """The managers' store."""

    def fail(self, what: str, text: str) -> None:
        """Note a violated property."""


class Machine:
    """A machine with one supervised process, and what can be done to it."""

    def __init__(self, around: Surrounding, name: str) -> None:
        self.name = name
        self.around = around
        self.rng = random.Random(f"{name} {around.plan.seed}")
        self.process: Process | None = None
        # Version of the routing that it has taken over in this life.
        self.known = 0
        self._lives = 0
        self._stop = asyncio.Event()
        self._paused = False
        self._restart: asyncio.TimerHandle | None = None

    def main(self, stop: asyncio.Event) -> Coroutine[Any, Any, None]:
        """Return what the process runs."""
        raise NotImplementedError

    def start(self) -> None:
        """Begin a new life, unless one is going on."""
        self._forget_restart()
        if self.process is not None:
            return
        self._lives += 1
        self._stop = asyncio.Event()
        process = self.process = Process(self.around.loop, f"{self.name}.{self._lives}")
        task = process.start(self.main(self._stop))
        task.add_done_callback(lambda done: self._ended(process, done))
        if self._paused:
            process.pause()

    def _ended(self, process: Process, task: asyncio.Task[None]) -> None:
        if self.process is not process:
            return
        self.process = None
        failure = None if task.cancelled() else task.exception()
        if failure is not None and not isinstance(failure, Fs3Error | OSError | KvError):
            self.around.fail("no process ends by a bug", f"{process.name}: {type(failure).__name__}: {failure}")
        if failure is not None:
            self.around.faults["processes given up"] += 1
        process.kill()
        self.around.network.died(process)
        self.start_after(RESTART_S)

    def start_after(self, seconds: float) -> None:
        """Begin again in `seconds`."""
        self._forget_restart()
        self._restart = self.around.loop.call_later(seconds, self.start)

    def _forget_restart(self) -> None:
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None

    def crash(self) -> None:
        """End the process without a word, standing still or not; nobody begins it again but `start`."""
        self._forget_restart()
        self._paused = False
        self.known = 0
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            self.around.network.died(process)

    def pause(self) -> None:
        """Stop everything on the machine where it stands."""
        self._paused = True
        if self.process is not None:
            self.process.pause()

    def resume(self) -> None:
        """Let it go on."""
        self._paused = False
        if self.process is not None:
            self.process.resume()

    def stop(self) -> None:
        """Ask the process to end in good order; its supervisor begins it again."""
        self._stop.set()


class ManagerMachine(Machine):
    """A cluster manager."""

    def __init__(self, around: Surrounding, index: int) -> None:
        super().__init__(around, f"mgmtd{index}")
        plan = around.plan
        drift = plan.clock_drift
        self.clock = LoopClock(
            around.loop,
            origin_ns=self.rng.randrange(10**15),
            rate=1.0 if not drift else self.rng.uniform(1 - drift, 1 + drift),
        )
        self.service: MgmtdService | None = None
        self._config = MgmtdConfig(
            cluster_id=CLUSTER,
            token=TOKEN,
            kv="memory:",
            host=self.name,
            replicas=plan.replicas,
            min_storage_nodes=plan.nodes,
            targets_per_disk=plan.targets_per_disk,
            lease_ms=plan.lease_ms,
            heartbeat_ms=plan.heartbeat_ms,
            primary_lease_ms=plan.primary_lease_ms,
        )

    async def main(self, stop: asyncio.Event) -> None:
        """See Machine."""
        around = self.around
        self.service = MgmtdService(
            self._config,
            store=around.store,
            clock=self.clock,
            network=around.network.at(self.name),
            rng=random.Random(f"{self.name} {self._lives} {around.plan.seed}"),
        )
        await self.service.run(stop)

    @property
    def primary(self) -> Manager | None:
        """The manager in it, if it certainly is primary now."""
        if self.process is None or not self.process.running or self.service is None:
            return None
        try:
            return self.service.primary()
        except Fs3Error:
            return None

    async def suffer(self, until: Callable[[], bool]) -> None:
        """Crash, stand still and stop as often as the plan says, until that is true."""
        plan, rng, faults = self.around.plan, self.rng, self.around.faults
        kinds = {"crash": plan.manager_crashes, "pause": plan.manager_pauses, "stop": plan.manager_stops}
        rate = sum(kinds.values())
        lease_s = plan.primary_lease_ms / 1000
        while rate and not until():
            await asyncio.sleep(rng.expovariate(rate / 3600))
            if until():
                return
            (kind,) = rng.choices(list(kinds), list(kinds.values()))
            if kind == "crash":
                faults["manager crashes"] += 1
                self.crash()
                await asyncio.sleep(rng.choice([0.1, lease_s * rng.random(), lease_s * rng.uniform(1, 5)]))
                self.start()
            elif kind == "pause":
                faults["manager pauses"] += 1
                self.pause()
                await asyncio.sleep(lease_s * rng.choice([0.1, rng.random(), rng.uniform(1, 3)]))
                self.resume()
            else:
                faults["manager stops"] += 1
                self.stop()


class _ToldEngine:
    """An engine whose routing the checks see as well, and which remembers its lease."""

    def __init__(self, engine: StorageEngine, told: Callable[[bytes], None]) -> None:
        self._engine = engine
        self._told = told
        self.serves_until_ns = 0
        # As the last status had it.
        self.usable: frozenset[int] = frozenset()
        self.start = engine.start

    def status(self) -> bytes:
        raw = self._engine.status()
        serves = (LocalState.LOCAL_STATE_ONLINE, LocalState.LOCAL_STATE_UPTODATE)
        # Neither one that is offline nor one that is still opened serves.
        self.usable = frozenset(t.target_id for t in EngineStatus.FromString(raw).targets if t.local_state in serves)
        return raw

    def apply_routing(self, routing: bytes) -> None:
        self._told(routing)
        self._engine.apply_routing(routing)

    def renew_lease(self, serve_until_monotonic_ns: int) -> None:
        self.serves_until_ns = max(self.serves_until_ns, serve_until_monotonic_ns)
        self._engine.renew_lease(serve_until_monotonic_ns)

    def stop(self) -> None:
        self.serves_until_ns = 0
        self._engine.stop()


class NodeMachine(Machine):
    """A storage node: the real shell around an engine of the world."""

    def __init__(self, around: Surrounding, index: int, managers: tuple[str, ...]) -> None:
        super().__init__(around, f"node{index}")
        self.index = index
        disks = tuple(f"/disk{index}.{d}" for d in range(around.plan.disks))
        self._config = StorageConfig(
            cluster_id=CLUSTER,
            token=TOKEN,
            host=self.name,
            mgmtd=managers,
            data_dir=f"/{self.name}",
            disks=disks,
        )
        self._clock = LoopClock(around.loop)
        self._lives = 0
        self._engine: _ToldEngine | None = None
        self.node_id = 0
        # When its process was killed, when it could serve no more, and what; -1: it has one, or had ended by itself.
        self.died_ns = self.served_ns = -1
        self.served: frozenset[int] = frozenset()

    def _identity(self, data_dir: str, disks: tuple[str, ...], cluster_id: str) -> NodeIdentity:
        uuid = self.name.encode().ljust(UUID_BYTES, b"\0")
        self._lives += 1
        found = [DiskIdentity(d, d.strip("/").encode().ljust(UUID_BYTES, b"\0")) for d in disks]
        return NodeIdentity(uuid, self._lives, found, [])

    def _make_engine(self, config_json: str) -> StorageEngine:
        self.node_id = json.loads(config_json)["node_id"]
        self._engine = _ToldEngine(self.around.world.engine(self.index, config_json), self._told)
        return self._engine

    def _told(self, raw: bytes) -> None:
        self.known = self.around.checks.told(self.name, raw)

    async def main(self, stop: asyncio.Event) -> None:
        """See Machine."""
        around = self.around
        self.known, self._engine = 0, None
        self.died_ns = self.served_ns = -1
        surroundings = Surroundings(
            make_engine=self._make_engine,
            network=around.network.at(self.name),
            clock=self._clock,
            rng=random.Random(f"{self.name} {self._lives} {around.plan.seed}"),
            open_node=self._identity,
            capacity=lambda _: (DISK_BYTES, DISK_BYTES // 2),
            pid=self._lives,
            status_s=max(STATUS_S, around.plan.heartbeat_ms / 2000),
        )
        await StorageService(self._config, surroundings).run(stop)

    def hold_lease(self, until_ns: int) -> None:
        """Let the engine serve until then, whatever the managers say: for checks at the end."""
        assert self._engine is not None, f"{self.name} has no engine"
        self._engine.renew_lease(until_ns)

    def serves_until_ns(self, target_id: int) -> int:
        """Tell until when a target of this node may serve, as far as its own life and lease go; 0: not at all."""
        if self.process is None or self._engine is None:
            return 0
        try:
            self._engine.status()
        except OSError:
            return 0  # The world has ended it in this moment.
        return self._engine.serves_until_ns if target_id in self._engine.usable else 0

    def happened(self, kind: str) -> None:
        """Follow what the world did to the node."""
        if kind == "crashed":
            self.died_ns = self.around.loop.now_ns
            self.served_ns = min(self.died_ns, self._engine.serves_until_ns if self._engine is not None else 0)
            self.served = self._engine.usable if self._engine is not None else frozenset()
            self.crash()
        elif kind == "started":
            self.start()
        elif kind == "paused":
            self.pause()
        elif kind == "resumed":
            self.resume()
        else:
            raise ValueError(f"the world tells of an unknown event: {kind}")

    async def suffer(self, until: Callable[[], bool]) -> None:
        """Stop in good order as often as the plan says, until that is true."""
        rate = self.around.plan.node_stops
        while rate and not until():
            await asyncio.sleep(self.rng.expovariate(rate / 3600))
            if not until():
                self.around.faults["node stops"] += 1
                self.stop()


class FollowerMachine(Machine):
    """A metadata service as far as routing goes: it relays what the managers publish to the data clients."""

    def __init__(self, around: Surrounding, managers: tuple[str, ...]) -> None:
        super().__init__(around, FOLLOWER)
        self._managers = managers

    async def main(self, stop: asyncio.Event) -> None:
        """See Machine."""
        client = MgmtdClient(self._managers, TOKEN, CLUSTER, network=self.around.network.at(self.name))
        uuid = self.name.encode().ljust(UUID_BYTES, b"\0")
        node = Node(uuid=uuid, role="meta", host=self.name, incarnation=self.rng.randbytes(UUID_BYTES))
        session = NodeSession(client, node, (), NodeHooks(on_routing=self._take), LoopClock(self.around.loop))
        await session.register()
        await session.run()

    def _take(self, news: News) -> None:
        raw = news.routing.SerializeToString()
        self.known = self.around.checks.told(self.name, raw)
        self.around.world.publish_routing(raw)


class ControlPlane:
    """All machines of one simulation."""

    def __init__(self, around: Surrounding) -> None:
        plan = around.plan
        addresses = tuple(f"mgmtd{i}:{PORT}" for i in range(plan.managers))
        self._around = around
        self.managers = [ManagerMachine(around, i) for i in range(plan.managers)]
        self.nodes = [NodeMachine(around, i, addresses) for i in range(plan.nodes)]
        self.follower = FollowerMachine(around, addresses)

    def start(self) -> None:
        """Begin everything; the nodes are begun by the world."""
        for machine in (*self.managers, self.follower):
            machine.start()
        self.follow_world()

    def follow_world(self) -> None:
        """Do to the shells what the world did to their nodes."""
        for _, kind, node in self._around.world.events():
            self.nodes[node].happened(kind)

    def suffer(self, until: Callable[[], bool]) -> list[asyncio.Task[None]]:
        """Begin the faults of managers and the stops of nodes, until that is true."""
        machines: list[ManagerMachine | NodeMachine] = [*self.managers, *self.nodes]
        return [asyncio.get_running_loop().create_task(machine.suffer(until)) for machine in machines]

    def heal(self) -> None:
        """Let every manager run; the world does that for its nodes."""
        for machine in self.managers:
            machine.resume()
            machine.start()

    def serves_until_ns(self, target_id: int) -> int:
        """See NodeMachine."""
        return max(node.serves_until_ns(target_id) for node in self.nodes)

    def ended_ns(self, target_id: int) -> tuple[int, int]:
        """Tell when the process of a target's node was killed, and when the target could serve no more.

        -1: it has a process, or the last one did not let the target serve.
        """
        node_id = target_id // TARGETS_PER_NODE_MAX
        node = next((n for n in self.nodes if n.node_id == node_id), None)
        if node is None:
            return -1, -1
        return node.died_ns, node.served_ns if target_id in node.served else -1

    def settled(self, version: int) -> bool:
        """Tell whether every node and the data clients know that version of the routing."""
        return all(party.known == version for party in (*self.nodes, self.follower))

    def primary(self) -> Manager | None:
        """Return the primary, if there is one now."""
        return next((p for m in self.managers if (p := m.primary) is not None), None)
