"""kill -9 of metadata services and managers under load: clients go on, and nothing acknowledged is lost."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from tests.cluster.command import fs3_command
from tests.cluster.conftest import MakeCluster
from tests.cluster.control_kills import SPEC, kill_cycles, name_load

CYCLES = int(os.environ.get("FS3_CONTROL_KILL_CYCLES", "3"))
SEED = int(os.environ.get("FS3_CONTROL_KILL_SEED", "1"))


def test_clients_go_on_over_kills_of_metadata_services_and_managers(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(SPEC)
    with name_load(cluster, tmp_path, natives=3, mounts=2, seed=SEED) as loads:
        report = kill_cycles(cluster, loads, cycles=CYCLES, rng=random.Random(SEED))
    print(*report.lines(), sep="\n")
    status = json.loads(fs3_command("status", str(cluster.directory), "--json").stdout)
    assert status["healthy"]
    assert status["primary"] in {s.name for s in cluster.services() if s.kind == "mgmtd"}
