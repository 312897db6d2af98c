"""kill -9 of metadata services and cluster managers under load: nothing fails, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import fs3
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.command import fs3_command
from tests.cluster.mounts import mounted
from tests.cluster.names import Call, MountedNames, NameLoad, NativeNames

SPEC = ClusterSpec(meta=2, managers=3, targets_per_disk=2, read_cache_bytes=64 << 20)
PROGRESS_CALLS = 5
PROGRESS_S = 60.0
PRIMARY_S = 30.0
# Drawn with these weights.
KINDS = {
    "one metadata service": 4,
    "the primary manager": 4,
    "a manager": 2,
    "a metadata service and the primary manager": 3,
    "all metadata services": 1,
}


@dataclass
class Report:
    """What a campaign did, and how long clients waited around the kills, in seconds."""

    kills: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    # Per cycle of a kind, the longest call that was under way after the kill and before the restart.
    waits_s: dict[str, list[float]] = field(default_factory=dict)
    slowest_s: float = 0.0

    def lines(self) -> list[str]:
        """For people."""
        found = [f"{self.calls} calls, the slowest took {self.slowest_s:.2f} s; kill -9 of {self.kills}"]
        for kind, waits in sorted(self.waits_s.items()):
            ordered = sorted(waits)
            median, high = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)]
            found.append(
                f"{kind}: {len(ordered)} cycles; longest wait of a call: median {median:.2f} s, 95 % {high:.2f} s, "
                f"most {ordered[-1]:.2f} s"
            )
        return found


def wait_for_progress(loads: list[NameLoad]) -> None:
    """Wait until every load has had more calls acknowledged."""
    goals = [len(load.calls) + PROGRESS_CALLS for load in loads]
    wait_until(
        lambda: all(len(load.calls) >= goal or load.failure for load, goal in zip(loads, goals, strict=True)),
        timeout_s=PROGRESS_S,
        what="progress of the clients",
    )
    for load in loads:
        if load.failure is not None:
            raise load.failure


@contextmanager
def name_load(
    cluster: LocalCluster, directory: Path, *, natives: int, mounts: int, seed: int
) -> Iterator[list[NameLoad]]:
    """Loads at work at native clients and at a mount. In the end everything acknowledged is compared and audited."""
    with mounted(cluster, directory / "mnt") as mountpoint, fs3.connect(cluster.url, token=cluster.token) as fs:
        clients = [NativeNames(fs) for _ in range(natives)] + [MountedNames(mountpoint) for _ in range(mounts)]
        loads = [NameLoad(names, f"/n{i}", seed * 1000 + i) for i, names in enumerate(clients)]
        for load in loads:
            load.start()
        try:
            wait_for_progress(loads)
            yield loads
            wait_for_progress(loads)
        finally:
            for load in loads:
                load.stopping.set()
            for load in loads:
                load.join(timeout=PROGRESS_S)
        for load in loads:
            load.finish()
            load.verify(NativeNames(fs))
            load.verify(MountedNames(mountpoint))
    cluster.wait_serving()
    audit = json.loads(fs3_command("admin", "fsck", str(cluster.directory), "--json").stdout)
    assert audit["findings"] == []


def kill_cycles(cluster: LocalCluster, loads: list[NameLoad], *, cycles: int, rng: random.Random) -> Report:
    """kill -9, progress without what was killed, restart; again and again."""
    report = Report()
    for _ in range(cycles):
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        victims = _victims(cluster, kind, rng)
        killed_s = monotonic()
        for name in victims:
            cluster.kill(name)
            report.kills[name] = report.kills.get(name, 0) + 1
        if kind != "all metadata services":
            wait_for_progress(loads)
        if "primary" in kind:
            _wait_for_takeover(cluster, victims[-1])
            wait_for_progress(loads)
        for name in victims:
            cluster.start(name)
        wait_for_progress(loads)
        waited = [call.took_s for call in _since(loads, killed_s)]
        report.waits_s.setdefault(kind, []).append(max(waited))
        if rng.random() < 0.5:
            cluster.wait_serving()
    calls = [call for load in loads for call in load.calls]
    report.calls = len(calls)
    report.slowest_s = max(call.took_s for call in calls)
    return report


def _wait_for_takeover(cluster: LocalCluster, dead: str) -> None:
    """Wait until another manager is primary."""
    wait_until(lambda: _primary(cluster) != dead, timeout_s=PRIMARY_S, what="the takeover by another manager")


def _since(loads: list[NameLoad], at_s: float) -> list[Call]:
    return [call for load in loads for call in list(load.calls) if call.ended_s > at_s]


def _victims(cluster: LocalCluster, kind: str, rng: random.Random) -> list[str]:
    names = {k: [s.name for s in cluster.services() if s.kind == k] for k in ("meta", "mgmtd")}
    match kind:
        case "all metadata services":
            return names["meta"]
        case "one metadata service":
            return [rng.choice(names["meta"])]
        case "a manager":
            return [rng.choice(names["mgmtd"])]
        case "the primary manager":
            return [_primary(cluster)]
        case _:
            return [rng.choice(names["meta"]), _primary(cluster)]


def _primary(cluster: LocalCluster) -> str:
    found: list[str] = []

    def known() -> bool:
        try:
            found.append(cluster.primary())
        except Fs3Error:
            return False
        return cluster.service(found[-1]).process() is not None

    wait_until(known, timeout_s=PRIMARY_S, what="a primary manager")
    return found[-1]
