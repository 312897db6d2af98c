"""What applications see when services die and return."""

from __future__ import annotations

import os
import signal

import pytest

import fs3
from fs3.testing.cluster import LocalCluster, unserving
from fs3.testing.process import wait_until
from fs3.testing.replicas import compare_replicas

SIZE = 24 << 20
PIECE = 2 << 20


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
def test_writes_and_reads_go_on_when_a_storage_service_fails_in_the_middle(
    cluster: LocalCluster, number: signal.Signals
) -> None:
    data = os.urandom(SIZE)
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        with fs.open("/f", "wb", buffering=0) as file:
            for offset in range(0, SIZE, PIECE):
                if offset == SIZE // 2:
                    cluster.kill("storage-1", number)
                assert file.pwrite(data[offset : offset + PIECE], offset) == PIECE
        with fs.open("/f", "rb") as file:
            assert file.read() == data
        # The failed service is out of every chain before it comes back.
        wait_until(lambda: len(unserving(cluster.routing())) > 0, timeout_s=30, what="the chains dropping the dead one")
        if number == signal.SIGSTOP:
            cluster.kill("storage-1", signal.SIGCONT)
        else:
            cluster.start("storage-1")
        cluster.wait_serving()
        assert compare_replicas(fs).differences == []
        cluster.kill("storage-2", number)
        with fs.open("/f", "rb") as file:
            assert file.read() == data
        if number == signal.SIGSTOP:
            cluster.kill("storage-2", signal.SIGCONT)


def test_everything_survives_kill_of_all_storage_services_at_once(cluster: LocalCluster) -> None:
    data = os.urandom(SIZE)
    names = [s.name for s in cluster.services() if s.kind == "storage"]
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        with fs.open("/f", "wb", buffering=0) as file:
            file.pwrite(data, 0)
        for name in names:
            cluster.kill(name)
        for name in names:
            cluster.start(name)
        cluster.wait_serving()
        with fs.open("/f", "rb") as file:
            assert file.read() == data
        assert compare_replicas(fs).differences == []


def test_operations_go_on_when_the_manager_is_killed_and_returns(cluster: LocalCluster) -> None:
    data = os.urandom(PIECE)
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        cluster.kill("mgmtd")
        with fs.open("/while-away", "wb") as file:
            file.write(data)
        cluster.start("mgmtd")
        cluster.wait_serving()
        with fs.open("/while-away", "rb") as file:
            assert file.read() == data


def test_metadata_calls_wait_for_a_metadata_service_that_returns(cluster: LocalCluster) -> None:
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        fs.mkdir("/d")
        cluster.kill("meta-1")
        cluster.start("meta-1")
        fs.mkdir("/d/e")
        assert fs.listdir("/d") == ["e"]


def test_a_hole_reads_as_zeros_on_every_replica_and_survives_restarts(cluster: LocalCluster) -> None:
    data = bytearray(os.urandom(5 << 20))
    first, end = 1_000_001, 4_100_000
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        with fs.open("/f", "wb", buffering=0) as file:
            file.pwrite(data, 0)
            file.punch(first, end - first)
            file.punch(len(data) - 10, 1 << 30)
        data[first:end] = bytes(end - first)
        data[-10:] = bytes(10)
        with fs.open("/f", "rb", buffering=0) as file:
            assert file.readall() == data
            with pytest.raises(OSError, match="writ"):
                file.punch(0, 1)
        for name in ("storage-1", "storage-2", "storage-3"):
            cluster.kill(name)
            cluster.start(name)
            cluster.wait_serving()
            with fs.open("/f", "rb") as file:
                assert file.read() == data
        assert compare_replicas(fs).differences == []
