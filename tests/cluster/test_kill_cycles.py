"""kill -9 of storage services under write load: nothing acknowledged is lost, and the replicas end equal."""

from __future__ import annotations

import os
import random

import fs3
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from fs3.testing.replicas import compare_replicas
from tests.cluster.writers import Writer

CYCLES = int(os.environ.get("FS3_KILL_CYCLES", "20"))
SEED = int(os.environ.get("FS3_KILL_SEED", "1"))
WRITERS = 3
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


def test_no_acknowledged_write_is_lost_over_kills_of_storage_services(cluster: LocalCluster) -> None:
    rng = random.Random(SEED)
    writers = [Writer(cluster, f"/w{i}", seed=SEED * 1000 + i) for i in range(WRITERS)]
    for writer in writers:
        writer.start()
    try:
        wait_for_progress(writers)
        for _ in range(CYCLES):
            victim = f"storage-{rng.randrange(cluster.spec.storage) + 1}"
            cluster.kill(victim)
            wait_for_progress(writers)
            cluster.start(victim)
            if rng.random() < 0.5:
                wait_for_progress(writers)
            cluster.wait_serving()
    finally:
        for writer in writers:
            writer.stopping.set()
    for writer in writers:
        writer.finish()
    cluster.wait_serving()
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        for writer in writers:
            writer.verify(fs)
        report = compare_replicas(fs)
    assert report.chunks > 0
    assert report.differences == []
