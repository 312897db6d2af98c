"""Write load while storage services are killed; afterwards everything acknowledged must be there, on equal replicas."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import fs3
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from fs3.testing.replicas import compare_replicas
from tests.cluster.writers import Writer

WRITES_PER_CYCLE = 5
PROGRESS_S = 60.0


def wait_for_progress(writers: list[Writer]) -> None:
    """Wait until every writer has had more writes acknowledged."""
    goals = [w.acknowledged + WRITES_PER_CYCLE for w in writers]
    wait_until(
        lambda: all(w.acknowledged >= goal or w.failure for w, goal in zip(writers, goals, strict=True)),
        timeout_s=PROGRESS_S,
        what="progress of the writers",
    )


@contextmanager
def write_load(cluster: LocalCluster, *, writers: int, seed: int) -> Iterator[list[Writer]]:
    """Writers at work. In the end they stop, and all that was acknowledged is compared."""
    running = [Writer(cluster, f"/w{i}", seed=seed * 1000 + i) for i in range(writers)]
    for writer in running:
        writer.start()
    try:
        wait_for_progress(running)
        yield running
        wait_for_progress(running)
    finally:
        for writer in running:
            writer.stopping.set()
    for writer in running:
        writer.finish()
    cluster.wait_serving()
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        for writer in running:
            writer.verify(fs)
        report = compare_replicas(fs)
    assert report.chunks > 0
    assert report.differences == []


def kill_cycles(cluster: LocalCluster, writers: list[Writer], *, cycles: int, rng: random.Random) -> None:
    """kill -9 one storage service after the other; each comes back before the next one goes."""
    for _ in range(cycles):
        victim = f"storage-{rng.randrange(cluster.spec.storage) + 1}"
        cluster.kill(victim)
        wait_for_progress(writers)
        cluster.start(victim)
        if rng.random() < 0.5:
            wait_for_progress(writers)
        cluster.wait_serving()
