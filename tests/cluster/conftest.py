"""Real clusters of separate processes in temporary directories."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fs3.fuse.options import ENGINES
from fs3.testing.cluster import ClusterSpec, LocalCluster

# Short leases, so that a test that kills a node does not wait for long; removed files go at once.
QUICK = ClusterSpec(
    lease_ms=3000, heartbeat_ms=300, targets_per_disk=2, kv_durable=False, read_cache_bytes=64 << 20, gc_delay_ms=0
)

MakeCluster = Callable[..., LocalCluster]


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Start clusters that end with the test; their logs are printed when it fails."""
    made: list[LocalCluster] = []

    def make(spec: ClusterSpec = QUICK, *, name: str = "cluster", start: bool = True) -> LocalCluster:
        cluster = LocalCluster.create(tmp_path / name, spec)
        made.append(cluster)
        if start:
            cluster.up()
        return cluster

    yield make
    for cluster in made:
        cluster.down()
        cluster.print_logs(sys.stdout)
        shutil.rmtree(cluster.directory, ignore_errors=True)


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> LocalCluster:
    """A running cluster of one manager, one metadata service and three storage services, for this test alone."""
    return make_cluster()


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """Who serves the mounts of a test; tests that ask for it run once with each."""
    return str(request.param)


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A running cluster shared by the tests of a module, which must not disturb its services."""
    cluster = LocalCluster.create(tmp_path_factory.mktemp("shared") / "cluster", QUICK)
    cluster.up()
    yield cluster
    cluster.down()
    cluster.print_logs(sys.stdout)
    shutil.rmtree(cluster.directory, ignore_errors=True)
