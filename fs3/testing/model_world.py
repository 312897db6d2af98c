"""A small world in Python: storage nodes that hold sets of writes instead of bytes.

For the control plane alone: managers and shells run in virtual time against nodes that follow the rules of targets
(what a target reports, when it may serve, what resync gives it), a network that loses, repeats, delays and cuts off,
and nodes that crash and stand still. Writes and resyncs happen in an instant; what happens inside the data path is
for the native world. It is also a check of the driver that needs nothing built.
"""

from __future__ import annotations

import json
import random
import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fs3.mgmtd import chains
from fs3.v1.routing_pb2 import Chain, Routing
from fs3.v1.storage_pb2 import EngineStatus

NS: Final = 1_000_000_000
# Writes, resyncs and reads are tried so often.
STEP_NS: Final = 500_000_000
TRACE_MAX: Final = 200


class NodeDown(OSError):
    """The engine of a node that is down was called."""


@dataclass
class _Target:
    """A target on its disk; what is not data belongs to one life of its node."""

    id: int
    data: set[int] = field(default_factory=set)
    ready: bool = False
    up_to_date: bool = False


@dataclass
class _Node:
    index: int
    up: bool = True
    paused: bool = False
    serving: bool = False
    serve_until_ns: int = 0
    routing_version: int = 0
    chains: dict[int, Chain] = field(default_factory=dict)
    targets: dict[int, _Target] = field(default_factory=dict)

    @property
    def takes_calls(self) -> bool:
        return self.up and not self.paused and self.serving


class ModelEngine:
    """See fs3.storage.engine.StorageEngine; of one node of a model world."""

    def __init__(self, world: ModelWorld, node: _Node, node_id: int) -> None:
        self._world = world
        self._node = node
        self._node_id = node_id

    def _check(self) -> None:
        if not self._node.up:
            raise NodeDown(5, f"node{self._node.index} is down")

    def start(self) -> int:
        """Begin a life: what is on disk is out of service until routing says so."""
        self._check()
        node = self._node
        node.serving = True
        node.serve_until_ns = 0
        node.routing_version = 0
        node.chains = {}
        for target in node.targets.values():
            target.ready = target.up_to_date = False
        return 1

    def apply_routing(self, routing: bytes) -> None:
        """Take a routing; targets of this node that are missing are made."""
        self._check()
        self._world.learn(self._node, self._node_id, Routing.FromString(routing))

    def renew_lease(self, serve_until_monotonic_ns: int) -> None:
        """Serve until then."""
        self._check()
        self._node.serve_until_ns = max(self._node.serve_until_ns, serve_until_monotonic_ns)

    def status(self) -> bytes:
        """Return what targets say of themselves."""
        self._check()
        node = self._node
        status = EngineStatus(routing_version=node.routing_version)
        for chain_id, chain in node.chains.items():
            for member in chain.targets:
                target = node.targets.get(member.target_id)
                if target is None:
                    continue
                local = chains.LOCAL_OFFLINE if not target.ready else chains.LOCAL_ONLINE
                if target.ready and target.up_to_date:
                    local = chains.LOCAL_UPTODATE
                status.targets.add(
                    target_id=target.id, chain_id=chain_id, chain_version=chain.version, local_state=local
                )
        return status.SerializeToString()

    def stop(self) -> None:
        """End in good order."""
        if self._node.up:
            self._node.serving = False
            self._node.serve_until_ns = 0


class ModelWorld:
    """See fs3.testing.sim_world.World. ``options_json`` is that of the native world."""

    def __init__(self, seed: int, options_json: str) -> None:
        options: dict[str, Any] = json.loads(options_json)
        rng = self._rng = random.Random(f"model world {seed}")
        self._now_ns = 0
        pace: int = options["pace"]
        self._lease_ns = 6 * NS * pace
        self._step_ns = self._next_step_ns = STEP_NS * pace
        self._nodes = [_Node(i) for i in range(options["nodes"])]
        self._chaos, self._load = True, False
        # Events per hour.
        self._crashes = rng.choice([0.0, 10.0, 60.0, 200.0]) / pace
        self._pauses = rng.choice([0.0, 10.0, 60.0, 200.0]) / pace
        self._cuts = rng.choice([0.0, 20.0, 100.0]) / pace
        self._total_crashes = rng.choice([0.0, 0.0, 5.0, 20.0]) / pace
        self._loss = rng.choice([0.0, 0.0, 0.01, 0.1, 0.3])
        self._repeat = rng.choice([0.0, 0.01, 0.2])
        self._slow = rng.choice([0.0, 0.01, 0.1])
        # Parties that reach nobody, and pairs that do not reach each other, until that time.
        self._cut: dict[str, int] = {}
        self._back_ns: dict[int, int] = {}
        self._resume_ns: dict[int, int] = {}
        self._events: list[tuple[int, str, int]] = [(0, "started", node.index) for node in self._nodes]
        self._client_chains: dict[int, Chain] = {}
        self._acknowledged: dict[int, set[int]] = {}
        self._members: dict[int, set[int]] = {}
        self._chain_of: dict[int, int] = {}
        self._targets: dict[int, tuple[_Node, _Target]] = {}
        self._writes = 0
        self._violation = ""
        self._hash = 0
        self._counts: Counter[str] = Counter()
        self._trace: deque[str] = deque(maxlen=TRACE_MAX)

    # -- for the shells -----------------------------------------------------------------------------------

    def engine(self, node: int, config_json: str) -> ModelEngine:
        """See World."""
        return ModelEngine(self, self._nodes[node], json.loads(config_json)["node_id"])

    def learn(self, node: _Node, node_id: int, routing: Routing) -> None:
        """Take a routing over at a node."""
        if routing.version <= node.routing_version:
            return
        node.routing_version = routing.version
        for chain in routing.chains:
            mine = [t for t in chain.targets if t.target_id // 1000 == node_id]
            before = node.chains.get(chain.chain_id)
            if not mine or (before is not None and before.version >= chain.version):
                continue
            node.chains[chain.chain_id] = chain
            for member in mine:
                target = node.targets.get(member.target_id)
                if target is None:
                    target = node.targets[member.target_id] = _Target(member.target_id, ready=True)
                    self._chain_of[target.id] = chain.chain_id
                    self._targets[target.id] = (node, target)
                    self._members.setdefault(chain.chain_id, set()).update(t.target_id for t in chain.targets)
                target.ready |= member.state not in (chains.SERVING, chains.SYNCING)
                target.up_to_date = target.ready and member.state == chains.SERVING

    def publish_routing(self, routing: bytes) -> None:
        """See World."""
        for chain in Routing.FromString(routing).chains:
            self._client_chains[chain.chain_id] = chain

    # -- the world ----------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        """See World."""
        return self._now_ns

    def events(self) -> Sequence[tuple[int, str, int]]:
        """See World."""
        events, self._events = self._events, []
        return events

    def delays(self, sender: str, receiver: str) -> Sequence[int]:
        """See World."""
        rng = self._rng
        usual = 200_000 + rng.randrange(300_000)
        if not self._chaos:
            return (usual,)
        if self._cut and any(self._is_cut(what) for what in (sender, receiver, f"{sender}>{receiver}")):
            self._counts["messages cut off"] += 1
            return ()
        if rng.random() < self._loss:
            return ()
        if rng.random() < self._slow:
            usual += int(rng.random() ** 4 * 20 * NS)
        if rng.random() < self._repeat:
            return (usual, usual + rng.randrange(5 * NS))
        return (usual,)

    def _is_cut(self, what: str) -> bool:
        return self._cut.get(what, 0) > self._now_ns

    def set_load(self, on: bool) -> None:
        """See World."""
        self._load = on

    def heal(self) -> None:
        """See World."""
        self._chaos = False
        self._crashes = self._pauses = self._cuts = self._total_crashes = 0.0
        self._cut.clear()
        for node in self._nodes:
            self._start(node)
            self._resume(node)

    def quiescent(self) -> bool:
        """See World: writes take no time here."""
        return True

    def run_until(self, time_ns: int) -> None:
        """See World."""
        while self._next_step_ns <= time_ns:
            self._now_ns = self._next_step_ns
            self._next_step_ns += self._step_ns
            self._step()
        self._now_ns = time_ns

    # -- faults -------------------------------------------------------------------------------------------

    def _happens(self, per_hour: float) -> bool:
        return self._rng.random() < per_hour * self._step_ns / (3600 * NS)

    def _happened(self, kind: str, node: _Node) -> None:
        self._note(f"node{node.index} {kind}")
        self._counts[f"nodes {kind}"] += 1
        self._events.append((self._now_ns, kind, node.index))

    def _note(self, what: str) -> None:
        self._trace.append(f"{self._now_ns / NS:.3f} {what}")
        self._hash = (self._hash * 0x100000001B3 ^ self._now_ns ^ zlib.crc32(what.encode())) & 0xFFFF_FFFF_FFFF_FFFF

    def _span_ns(self) -> int:
        """Draw how long something lasts: often about a lease."""
        return int(self._lease_ns * self._rng.choice([0.05, self._rng.random(), self._rng.uniform(1, 5)]))

    def _crash(self, node: _Node) -> None:
        if node.up:
            node.up = node.paused = node.serving = False
            self._resume_ns.pop(node.index, None)
            self._back_ns[node.index] = self._now_ns + self._span_ns()
            self._happened("crashed", node)

    def _start(self, node: _Node) -> None:
        self._back_ns.pop(node.index, None)
        if not node.up:
            node.up = True
            self._happened("started", node)

    def _resume(self, node: _Node) -> None:
        self._resume_ns.pop(node.index, None)
        if node.paused:
            node.paused = False
            self._happened("resumed", node)

    def _faults(self) -> None:
        for node in self._nodes:
            if self._back_ns.get(node.index, self._now_ns + 1) <= self._now_ns:
                self._start(node)
            if self._resume_ns.get(node.index, self._now_ns + 1) <= self._now_ns:
                self._resume(node)
            if self._happens(self._crashes):
                self._crash(node)
            elif node.up and not node.paused and self._happens(self._pauses):
                node.paused = True
                self._resume_ns[node.index] = self._now_ns + self._span_ns()
                self._happened("paused", node)
            if self._happens(self._cuts):
                self._cut_off(f"node{node.index}")
        if self._happens(self._total_crashes):
            for node in self._nodes:
                self._crash(node)

    def _cut_off(self, name: str) -> None:
        """Cut a node off from everybody, or one direction between it and a manager; sometimes the manager."""
        manager = f"mgmtd{self._rng.randrange(3)}"
        what = self._rng.choice([name, manager, f"{name}>{manager}", f"{manager}>{name}"])
        self._cut[what] = self._now_ns + self._span_ns()
        self._counts["partitions"] += 1
        self._note(f"cut {what}")

    # -- data ---------------------------------------------------------------------------------------------

    def _takes(self, target_id: int, chain: Chain, *states: int) -> bool:
        """Tell whether a target takes part in that version of its chain now, in one of the states."""
        found = self._targets.get(target_id)
        if found is None:
            return False
        node, target = found
        own = node.chains.get(chain.chain_id)
        if not (node.takes_calls and target.ready and own is not None and own.version == chain.version):
            return False
        if self._now_ns >= node.serve_until_ns:
            return False
        return any(t.target_id == target_id and t.state in states for t in own.targets)

    def _write(self, chain: Chain) -> None:
        serving = [t.target_id for t in chain.targets if t.state == chains.SERVING]
        if not serving or not self._takes(serving[0], chain, chains.SERVING):
            return
        syncing = [t.target_id for t in chain.targets if t.state == chains.SYNCING]
        takes = {t: self._takes(t, chain, chains.SERVING) for t in serving}
        takes |= {t: self._takes(t, chain, chains.SYNCING) for t in syncing}
        self._writes += 1
        write = self._writes
        whole = all(takes.values()) and self._rng.random() >= self._loss
        for target_id, taken in takes.items():
            # One that is not acknowledged may be anywhere it was taken.
            if taken and (whole or self._rng.random() < 0.5):
                self._targets[target_id][1].data.add(write)
        if whole:
            self._acknowledged.setdefault(chain.chain_id, set()).add(write)
            self._counts["operations"] += 1

    def _resync(self, node: _Node, target: _Target) -> None:
        chain = node.chains.get(self._chain_of[target.id])
        if chain is None or target.up_to_date or not self._takes(target.id, chain, chains.SYNCING):
            return
        serving = [t.target_id for t in chain.targets if t.state == chains.SERVING]
        if serving and self._takes(serving[-1], chain, chains.SERVING) and self._rng.random() < 0.5:
            target.data = set(self._targets[serving[-1]][1].data)
            target.up_to_date = True

    def _read(self, target_id: int) -> None:
        node, _ = self._targets[target_id]
        chain = node.chains.get(self._chain_of[target_id])
        if chain is not None and self._takes(target_id, chain, chains.SERVING) and (lacks := self.missing(target_id)):
            self._fail(f"target {target_id} serves and lacks {lacks}")

    def _fail(self, text: str) -> None:
        self._violation = self._violation or f"no acknowledged write is lost: {text}"

    def _forget_common(self, chain_id: int) -> None:
        """Drop what every member has: it cannot be lost from now on, and sets stay small."""
        members = [self._targets[t][1] for t in sorted(self._members[chain_id]) if t in self._targets]
        if len(members) < len(self._members[chain_id]):
            return
        common = set.intersection(*(m.data for m in members))
        if len(common) > 50:
            for member in members:
                member.data -= common
            if chain_id in self._acknowledged:
                self._acknowledged[chain_id] -= common

    def _step(self) -> None:
        if self._chaos:
            self._faults()
        for node in self._nodes:
            for target in node.targets.values():
                if not target.up_to_date:
                    self._resync(node, target)
        if self._load and self._client_chains:
            self._write(self._client_chains[self._rng.choice(sorted(self._client_chains))])
        if self._targets:
            self._read(self._rng.choice(sorted(self._targets)))
        if self._next_step_ns % (64 * self._step_ns) == 0:
            for chain_id in sorted(self._members):
                self._forget_common(chain_id)

    # -- judgement ----------------------------------------------------------------------------------------

    def missing(self, target_id: int) -> str:
        """See World."""
        if target_id not in self._targets:
            return ""
        lost = self._acknowledged.get(self._chain_of[target_id], set()) - self._targets[target_id][1].data
        return f"{len(lost)} acknowledged writes, for example {min(lost)}" if lost else ""

    def violation(self) -> str:
        """See World."""
        return self._violation

    def check(self) -> str:
        """See World: at the end every replica is the same."""
        for chain_id, members in self._members.items():
            for target_id in members:
                if lacks := self.missing(target_id):
                    self._fail(f"target {target_id} of chain {chain_id} lacks {lacks} at the end")
        return self._violation

    def trace_hash(self) -> int:
        """See World."""
        return self._hash ^ self._writes

    def trace(self) -> Sequence[str]:
        """See World."""
        return list(self._trace)

    def statistics(self) -> dict[str, int]:
        """See World."""
        return dict(self._counts)
