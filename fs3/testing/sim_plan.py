"""What one seed simulates: cluster, timing and faults, all drawn from the seed (a swarm of configurations)."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

CLUSTER = "sim"
PACES: Final = (1, 3, 10, 30, 100)
# Stored bytes change only where a replica that never fails is left to repair them from: the world lets node 0 rot, and
# only nodes 0 and 2 fail then.
ROT_REPLICAS: Final = 3
# At pace 1; it grows with the pace.
HORIZON_S: Final = (300.0, 900.0)


@dataclass(frozen=True)
class Plan:
    """The configuration of one seed. Rates are events per hour and machine; probabilities are 0..1."""

    seed: int
    # How slowly the cluster lives: leases, faults and operations are so many times further apart than usual. A slow
    # one simulates more hours in the same real time, a quick one has more happen in an hour.
    pace: int
    # The cluster.
    nodes: int
    disks: int
    targets_per_disk: int
    replicas: int
    managers: int
    heartbeat_ms: int
    lease_ms: int
    primary_lease_ms: int
    # How long faults go on, in seconds.
    horizon_s: float
    # The managers and their store.
    shuffle: bool
    manager_crashes: float
    manager_pauses: float
    manager_stops: float
    clock_drift: float
    kv_conflict: float
    kv_too_old: float
    kv_unknown: float
    kv_unavailable: float
    kv_delay_s: float
    # The storage shells: orderly restarts. Their crashes, pauses and partitions are the world's.
    node_stops: float

    @property
    def chains(self) -> int:
        """How many chains the manager will make."""
        return self.nodes * self.disks * self.targets_per_disk // self.replicas

    def world_options(self) -> str:
        """Return what the world is told, as JSON; what is not in it the world draws from the seed itself."""
        options: dict[str, int] = {"nodes": self.nodes, "pace": self.pace}
        if self.replicas < ROT_REPLICAS:
            options["rot_ms"] = 0
        return json.dumps(options)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return asdict(self)


def draw(seed: int, *, hours: float | None = None, given: str = "") -> Plan:
    """Make the plan of a seed; `hours` replaces the horizon that it would have, `given` (JSON) any other fields.

    Raises TypeError for a field that there is not.
    """
    return replace(_drawn(seed, hours), **(json.loads(given) if given else {}))


def _drawn(seed: int, hours: float | None) -> Plan:
    rng = random.Random(f"plan {seed}")
    replicas = rng.choice([1, 2, 2, 3, 3, 3, 3])
    nodes = rng.randint(max(2, replicas), 5)
    targets_per_disk = rng.choice([1, 1, 2])
    # Whole chains only: every target that the disks have room for is used.
    while nodes * targets_per_disk % replicas:
        targets_per_disk += 1
    pace = rng.choice(PACES)
    heartbeat_ms = 1000 * pace
    horizon_s = rng.uniform(*HORIZON_S) * pace if hours is None else hours * 3600

    def sometimes(probability: float, low: float, high: float) -> float:
        """Swarm: a fault is often off, so that the others can go deep."""
        return rng.uniform(low, high) if rng.random() < probability else 0.0

    return Plan(
        seed=seed,
        pace=pace,
        nodes=nodes,
        disks=1,
        targets_per_disk=targets_per_disk,
        replicas=replicas,
        managers=rng.choice([1, 2, 2, 3]),
        heartbeat_ms=heartbeat_ms,
        lease_ms=heartbeat_ms * rng.choice([4, 6, 6, 10]),
        primary_lease_ms=5 * heartbeat_ms * rng.choice([1, 2]),
        horizon_s=horizon_s,
        shuffle=rng.random() < 0.5,
        manager_crashes=sometimes(0.8, 6, 60) / pace,
        manager_pauses=sometimes(0.7, 6, 60) / pace,
        manager_stops=sometimes(0.5, 6, 30) / pace,
        clock_drift=sometimes(0.5, 0.0001, 0.02),
        kv_conflict=sometimes(0.5, 0.001, 0.1),
        kv_too_old=sometimes(0.3, 0.001, 0.03),
        kv_unknown=sometimes(0.6, 0.001, 0.1),
        kv_unavailable=sometimes(0.3, 0.001, 0.05),
        kv_delay_s=sometimes(0.7, 0.01, 6.0),
        node_stops=sometimes(0.5, 3, 12) / pace,
    )
