"""A cluster, a mount, workers on it, and somebody who watches."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fs3.testing.cluster import ClusterSpec, LocalCluster
from tests.cluster.mounts import mounted
from tests.soak.load import WORK, Worker
from tests.soak.resources import RULES, Sample, leaks, rise, sample

# Small caches, so that they are full early and what grows later is a leak.
SPEC: Final = ClusterSpec(targets_per_disk=2, kv_durable=False, read_cache_bytes=32 << 20, gc_delay_ms=1000)
SAMPLES: Final = 400
INTERVAL_S_MIN: Final = 0.5
PROGRESS_S: Final = 60.0
END_S: Final = 300.0


@dataclass
class Report:
    """What came out. ``problems``: leaks and errors of workers."""

    rounds: dict[str, int]
    samples: dict[str, list[Sample]]
    problems: list[str] = field(default_factory=list)

    def table(self) -> str:
        """A line for each process: where each figure was in the middle and at the end, and how much it rose."""
        lines = [", ".join(f"{count} rounds of {name}" for name, count in self.rounds.items())]
        for name, samples in self.samples.items():
            parts = []
            for figure in RULES:
                risen, _ = rise(samples, figure)
                middle, last = (getattr(s, figure) for s in (samples[len(samples) // 2], samples[-1]))
                unit, name_of_unit = (1 << 20, " MiB") if figure == "rss" else (1, "")
                parts.append(f"{figure} {middle / unit:.0f} -> {last / unit:.0f}{name_of_unit} ({risen / unit:+.1f})")
            lines.append(f"{name}: {', '.join(parts)}")
        return "\n".join([*lines, *self.problems])


def processes(cluster: LocalCluster, mountpoint: Path) -> dict[str, int]:
    """Pids of all services and of the mount daemon."""
    found = {service.name: ref.pid for service in cluster.services() if (ref := service.process())}
    pid_file = cluster.directory / f"mount-{mountpoint.name}.pid"
    return {**found, "mount": int(json.loads(pid_file.read_text())["pid"])}


def watch(
    pids: dict[str, int], workers: list[Worker], seconds: float, say: Callable[[str], None]
) -> dict[str, list[Sample]]:
    """Sample all processes until the time is over or a worker has ended."""
    began_s, ended = time.monotonic(), threading.Event()
    samples: dict[str, list[Sample]] = {name: [] for name in pids}
    said_s = 0.0
    while (at_s := time.monotonic() - began_s) < seconds and all(worker.is_alive() for worker in workers):
        for name, pid in pids.items():
            samples[name].append(sample(pid, at_s))
        if at_s - said_s >= PROGRESS_S:
            said_s = at_s
            rounds = sum(worker.rounds for worker in workers)
            memory = ", ".join(f"{name} {found[-1].rss >> 20}" for name, found in samples.items())
            say(f"{at_s / 60:.0f} of {seconds / 60:.0f} minutes: {rounds} rounds; MiB: {memory}")
        ended.wait(max(INTERVAL_S_MIN, seconds / SAMPLES))
    return samples


def soak(directory: Path, *, seconds: float, seed: int, say: Callable[[str], None] = lambda _: None) -> Report:
    """Work on a mount in `directory` for so long and watch."""
    cluster = LocalCluster.create(directory / "cluster", SPEC)
    cluster.up()
    try:
        with mounted(cluster, directory / "mount") as mountpoint:
            ended = threading.Event()
            workers = [Worker(name, mountpoint, seed, ended) for name in WORK]
            for worker in workers:
                worker.start()
            try:
                samples = watch(processes(cluster, mountpoint), workers, seconds, say)
            finally:
                ended.set()
                for worker in workers:
                    worker.join(END_S)
    finally:
        cluster.down()
    problems = [worker.error for worker in workers if worker.error]
    if not problems:
        problems = [line for name, found in samples.items() for line in leaks(name, found)]
    report = Report({worker.kind: worker.rounds for worker in workers}, samples, problems)
    say(report.table())
    return report
