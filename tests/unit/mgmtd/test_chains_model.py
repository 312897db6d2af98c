"""The state machine under random failures, with a model of targets that hold data.

Every target that may answer a read must hold every acknowledged write, whatever dies, restarts, stops in good
order, loses heartbeats or hears of routing late. A failing seed is in the test's name.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from fs3.mgmtd import chains
from fs3.mgmtd.chains import TargetView, accepts_report, next_chain
from fs3.v1.routing_pb2 import Chain, ChainTarget

T = 1200
TICK = 50
STEPS = 400


@dataclass
class Node:
    """One target on a node of its own."""

    id: int
    up: bool = True
    ready: bool = True
    partitioned: bool = False
    chain: Chain = field(default_factory=Chain)
    serve_until: int = 0
    uptodate: bool = False
    data: set[int] = field(default_factory=set)

    def state(self) -> int:
        return next((t.state for t in self.chain.targets if t.target_id == self.id), chains.OFFLINE)

    def learn(self, chain: Chain) -> None:
        if chain.version <= self.chain.version:
            return
        self.chain = chain
        self.ready |= self.state() not in (chains.SERVING, chains.SYNCING)
        self.uptodate = self.ready and self.state() == chains.SERVING

    def local(self) -> int:
        if not self.ready:
            return chains.LOCAL_OFFLINE
        return chains.LOCAL_UPTODATE if self.uptodate else chains.LOCAL_ONLINE

    def takes(self, version: int, now: int, *states: int) -> bool:
        lease = now < self.serve_until
        return self.up and self.ready and lease and self.chain.version == version and self.state() in states


class Model:
    def __init__(self, seed: int, replicas: int) -> None:
        self.rng = random.Random(seed)
        self.now = 10 * T
        ids = range(1, replicas + 1)
        self.chain = Chain(chain_id=1, version=1, targets=[ChainTarget(target_id=i, state=chains.SERVING) for i in ids])
        self.nodes = {i: Node(i) for i in ids}
        self.views = {i: TargetView(chains.LOCAL_UPTODATE, 0, self.now, lived_ns=self.now) for i in ids}
        self.acknowledged: set[int] = set()
        self.next_write = 1
        self.lossy = self.rng.choice([0.0, 0.1, 0.3])
        self.failing = self.rng.choice([0.005, 0.02, 0.05])
        for node in self.nodes.values():
            node.learn(self.chain)
            node.serve_until = self.now + T // 2

    def set_local(self, i: int, local: int, version: int, *, heard: int | None = None, orderly: bool = False) -> None:
        old = self.views[i]
        alive = (chains.LOCAL_ONLINE, chains.LOCAL_UPTODATE)
        changed = (old.local in alive) != (local in alive)
        self.views[i] = TargetView(
            local,
            version,
            old.heard_ns if heard is None else heard,
            self.now if changed else old.changed_ns,
            orderly if changed else old.orderly,
            lived_ns=old.lived_ns if heard is None else max(old.lived_ns, heard),
        )

    def decide(self) -> None:
        self.chain = next_chain(self.chain, self.views, self.now, T)

    def expire(self) -> None:
        for i, view in self.views.items():
            if self.now - view.heard_ns >= T and view.local != chains.LOCAL_OFFLINE:
                self.views[i] = TargetView(
                    chains.LOCAL_OFFLINE, 0, view.heard_ns, view.heard_ns + T // 2, lived_ns=view.heard_ns
                )

    def fail_something(self) -> None:
        for i, node in self.nodes.items():
            roll = self.rng.random()
            if node.up and roll < self.failing:
                node.up = False
                if self.rng.random() < 0.3 and not node.partitioned:
                    self.set_local(i, chains.LOCAL_OFFLINE, 0, heard=self.now - T, orderly=True)
                    self.decide()
            elif node.up and roll < 2 * self.failing:
                node.partitioned = not node.partitioned
            elif not node.up and roll < 0.15:
                self.restart(node)
        if self.rng.random() < self.failing / 4:
            for node in self.nodes.values():
                node.up = False

    def restart(self, node: Node) -> None:
        node.up, node.ready, node.partitioned, node.uptodate = True, False, False, False
        node.serve_until = 0
        node.chain = Chain()
        self.set_local(node.id, chains.LOCAL_OFFLINE, 0, heard=self.now)
        self.decide()
        node.learn(self.chain)

    def heartbeats(self) -> None:
        for i, node in self.nodes.items():
            if not node.up or node.partitioned or self.rng.random() < self.lossy:
                continue
            version = node.chain.version
            self.views[i] = TargetView(
                self.views[i].local,
                self.views[i].chain_version,
                self.now,
                self.views[i].changed_ns,
                self.views[i].orderly,
                lived_ns=self.now,
            )
            if accepts_report(self.chain, node.local(), version):
                self.set_local(i, node.local(), version, heard=self.now)
            if self.rng.random() >= self.lossy:
                node.serve_until = max(node.serve_until, self.now + T // 2)
                node.learn(self.chain)

    def write(self) -> None:
        knower = self.rng.choice(list(self.nodes.values()))
        version, targets = knower.chain.version, knower.chain.targets
        serving = [t.target_id for t in targets if t.state == chains.SERVING]
        syncing = [t.target_id for t in targets if t.state == chains.SYNCING]
        if not serving:
            return
        write, self.next_write = self.next_write, self.next_write + 1
        takes = {t: self.nodes[t].takes(version, self.now, chains.SERVING) for t in serving}
        takes |= {t: self.nodes[t].takes(version, self.now, chains.SYNCING) for t in syncing}
        if all(takes.values()) and self.rng.random() >= self.lossy:
            self.acknowledged.add(write)
            for t in takes:
                self.nodes[t].data.add(write)
        elif takes[serving[0]]:
            # Not acknowledged: it may be anywhere it was taken.
            for t, taken in takes.items():
                if taken and self.rng.random() < 0.5:
                    self.nodes[t].data.add(write)

    def resync(self) -> None:
        for node in self.nodes.values():
            version = node.chain.version
            if not node.takes(version, self.now, chains.SYNCING) or self.rng.random() < 0.5:
                continue
            source = [t.target_id for t in node.chain.targets if t.state == chains.SERVING]
            if source and self.nodes[source[-1]].takes(version, self.now, chains.SERVING):
                node.data = set(self.nodes[source[-1]].data)
                node.uptodate = True

    def check(self) -> None:
        for node in self.nodes.values():
            if node.takes(node.chain.version, self.now, chains.SERVING):
                missing = self.acknowledged - node.data
                assert not missing, f"target {node.id} serves without writes {sorted(missing)[:5]}"

    def step(self) -> None:
        self.now += TICK
        self.fail_something()
        self.heartbeats()
        if self.rng.random() < 0.8:
            self.expire()
            self.decide()
        for _ in range(2):
            self.write()
        self.resync()
        self.check()

    def heal(self) -> None:
        self.lossy = self.failing = 0.0
        for node in self.nodes.values():
            node.partitioned = False
            if not node.up:
                self.restart(node)
        for _ in range(4 * T // TICK):
            self.now += TICK
            self.heartbeats()
            self.expire()
            self.decide()
            self.resync()
            self.check()


@pytest.mark.parametrize("block", range(8))
def test_whoever_serves_holds_every_acknowledged_write(block: int) -> None:
    acknowledged = 0
    for seed in range(block * 15, block * 15 + 15):
        model = Model(seed, replicas=1 + seed % 4)
        try:
            for _ in range(STEPS):
                model.step()
            model.heal()
            assert all(t.state == chains.SERVING for t in model.chain.targets), "the chain did not heal"
        except AssertionError as exc:
            raise AssertionError(f"seed {seed}: {exc}") from exc
        acknowledged += len(model.acknowledged)
    assert acknowledged > 1000


def first_failure(monkeypatch: pytest.MonkeyPatch, name: str, broken: object, seeds: int = 200) -> bool:
    monkeypatch.setattr(chains._Step, name, broken)
    for seed in range(seeds):
        model = Model(seed, replicas=1 + seed % 4)
        try:
            for _ in range(STEPS):
                model.step()
        except AssertionError:
            return True
    return False


def test_the_model_notices_targets_that_serve_again_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    def syncing(self: chains._Step) -> None:
        for target in self.old(chains.SYNCING):
            self.new[target] = chains.SERVING if self.alive(target) else chains.OFFLINE

    assert first_failure(monkeypatch, "syncing", syncing)


def test_the_model_notices_that_offline_targets_are_taken_for_last_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(self: chains._Step) -> None:
        for target in self.old(chains.WAITING, chains.OFFLINE):
            if not self.alive(target):
                self.new[target] = chains.OFFLINE
            else:
                self.new[target] = chains.SYNCING if self.some_serving() else chains.SERVING

    assert first_failure(monkeypatch, "waiting", waiting)
