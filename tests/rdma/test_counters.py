"""What moves by RDMA is counted on both sides."""

from __future__ import annotations

import fs3
from fs3.cli.health import describe_storage
from fs3.testing.cluster import LocalCluster
from fs3.testing.node_status import engine_statuses
from tests.cluster.conftest import cluster, make_cluster
from tests.rdma.test_cluster import MIB, read, write

__all__ = ["cluster", "make_cluster"]

FILE_BYTES = 8 * MIB


def total(of: LocalCluster, counter: str) -> int:
    """Sum of a counter of rxe0 over all storage services."""
    return sum(node["rdma"]["rxe0"][counter] for node in describe_storage(engine_statuses(of, of.routing())))


def test_the_bytes_of_a_file_are_in_the_counters_of_storage_and_client(cluster: LocalCluster) -> None:
    with fs3.connect(cluster.url, token=cluster.token, transport="rdma") as fs:

        def own(counter: str) -> int:
            return fs.stats()[f"rdma.rxe0.{counter}"]

        write(fs, "/file", b"x" * FILE_BYTES)
        assert total(cluster, "read_bytes") >= FILE_BYTES
        assert own("peer_read_bytes") >= FILE_BYTES
        pushed, came = total(cluster, "write_bytes"), own("peer_write_bytes")
        assert read(fs, "/file") == b"x" * FILE_BYTES
        assert total(cluster, "write_bytes") - pushed >= FILE_BYTES
        assert own("peer_write_bytes") - came >= FILE_BYTES
        assert own("connections") > 0
        assert own("messages_sent") > 0
        assert own("messages_received") > 0
        assert own("registrations") > 0
        assert own("registered_bytes") > 0
        assert (own("connections_lost"), own("tcp_fallbacks")) == (0, 0)
        connections = total(cluster, "connections")
        assert connections >= own("connections")
    # The client has closed its connections in good order.
    assert total(cluster, "connections_lost") == 0


def test_a_client_that_uses_tcp_has_no_counters_of_rdma(cluster: LocalCluster) -> None:
    with fs3.connect(cluster.url, token=cluster.token, transport="tcp") as fs:
        assert not any(name.startswith("rdma.") for name in fs.stats())
