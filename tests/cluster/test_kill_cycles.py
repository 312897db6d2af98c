"""kill -9 of storage services under write load: nothing acknowledged is lost, and the replicas end equal."""

from __future__ import annotations

import os
import random

from fs3.testing.cluster import LocalCluster
from tests.cluster.kills import kill_cycles, write_load

CYCLES = int(os.environ.get("FS3_KILL_CYCLES", "20"))
SEED = int(os.environ.get("FS3_KILL_SEED", "1"))
WRITERS = 3


def test_no_acknowledged_write_is_lost_over_kills_of_storage_services(cluster: LocalCluster) -> None:
    with write_load(cluster, writers=WRITERS, seed=SEED) as writers:
        kill_cycles(cluster, writers, cycles=CYCLES, rng=random.Random(SEED))
