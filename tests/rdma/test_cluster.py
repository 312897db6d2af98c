"""A cluster whose data moves by RDMA: what it does, and what becomes of it when RDMA goes away."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections import Counter

import pytest

import fs3
from fs3.cli.health import describe_storage
from fs3.client import FileSystem
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import LocalCluster
from fs3.testing.node_status import engine_statuses
from fs3.testing.process import wait_until
from fs3.testing.replicas import compare_replicas
from tests.cluster.conftest import cluster, make_cluster
from tests.cluster.kills import kill_cycles, write_load
from tests.rdma.conftest import set_roce_port

__all__ = ["cluster", "make_cluster"]

MIB = 1 << 20
CYCLES = int(os.environ.get("FS3_KILL_CYCLES", "20"))


def transports(of: LocalCluster) -> Counter[tuple[str, str]]:
    """Count the connections of all storage services by who made them and how they travel."""
    nodes = describe_storage(engine_statuses(of, of.routing()))
    return Counter(
        ("node" if c["outgoing"] else c["peer"].split()[0], c["rdma_device"] or "tcp")
        for node in nodes
        for c in node["connections"]
    )


def write(fs: FileSystem, path: str, data: bytes) -> None:
    """Make a file of `data`."""
    with fs.open(path, "wb") as file:
        file.write(data)


def read(fs: FileSystem, path: str) -> bytes:
    """All of a file."""
    with fs.open(path, "rb") as file:
        return file.read()


def test_file_data_moves_by_rdma_between_clients_and_storage_and_along_the_chains(
    device: str, cluster: LocalCluster
) -> None:
    data = random.Random(5).randbytes(24 * MIB + 12_345)
    with fs3.connect(cluster.url, token=cluster.token, transport="rdma") as fs:
        write(fs, "/large", data)
        for at in range(0, 200_000, 50_001):
            write(fs, f"/small{at}", data[at : at + 1 + at])
        assert read(fs, "/large") == data
        assert all(read(fs, f"/small{at}") == data[at : at + 1 + at] for at in range(0, 200_000, 50_001))
        report = compare_replicas(fs)
        used = transports(cluster)
    assert report.chunks > 0
    assert report.differences == []
    assert used["client", device] > 0
    assert used["node", device] > 0
    assert used["storage", device] > 0
    assert used["node", "tcp"] == 0


def test_registered_memory_is_written_and_read_in_place(device: str, cluster: LocalCluster) -> None:
    memory = bytearray(random.Random(6).randbytes(8 * MIB))
    expected = bytes(memory)
    with (
        fs3.connect(cluster.url, token=cluster.token, transport="rdma") as fs,
        fs.open("/file", "w+b", buffering=0) as file,
    ):
        registered = fs3.RegisteredMemory(memory)
        assert file.pwrite(memory, 0) == len(memory)
        with pytest.raises(BufferError):
            memory.clear()
        memory[:] = bytes(len(memory))
        with memoryview(memory) as view:
            assert file.pread_into(view[5 : 5 * MIB], 5) == 5 * MIB - 5
        assert memory[5 : 5 * MIB] == expected[5 : 5 * MIB]
        assert not any(memory[:5])
        assert not any(memory[5 * MIB :])
        registered.release()
        memory.clear()


def test_tcp_is_used_where_the_client_wants_it(cluster: LocalCluster) -> None:
    with fs3.connect(cluster.url, token=cluster.token, transport="tcp") as fs:
        write(fs, "/file", b"x" * MIB)
        assert read(fs, "/file") == b"x" * MIB
        assert transports(cluster)["client", "rxe0"] == 0


def test_a_wrong_transport_is_refused_with_the_right_ones() -> None:
    with pytest.raises(Fs3Error, match="transport is auto, tcp or rdma"):
        fs3.connect("fs3://127.0.0.1:1/", transport="udp")


class CanaryKeeper(threading.Thread):
    """Writes and reads in registered memory that has canaries on both sides, and compares everything each time."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__(name="canary-keeper")
        self.cluster = cluster
        self.rounds = 0
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        """Go on until stopped."""
        try:
            self.work()
        except BaseException as e:
            self.failure = e

    def work(self) -> None:
        """One round after the other."""
        rng, canary = random.Random(9), b"canary" * 10_000
        memory = bytearray(canary + bytes(4 * MIB) + canary)
        with (
            fs3.connect(self.cluster.url, token=self.cluster.token) as fs,
            fs.open("/canaries", "w+b", buffering=0) as file,
        ):
            registered = fs3.RegisteredMemory(memory)
            while not self.stopping.is_set():
                data = rng.randbytes(rng.randrange(1, 4 * MIB))
                begin = len(canary) + rng.randrange(4 * MIB - len(data))
                end = begin + len(data)
                memory[begin:end] = data
                before, after = bytes(memory[:begin]), bytes(memory[end:])
                with memoryview(memory)[begin:end] as window:
                    assert file.pwrite(window, begin) == len(data)
                    window[:] = bytes(len(data))
                    assert file.pread_into(window, begin) == len(data)
                assert memory[begin:end] == data
                assert (memory[:begin], memory[end:]) == (before, after), "memory around the caller's was touched"
                self.rounds += 1
            registered.release()

    def finish(self) -> None:
        """Stop, and raise what went wrong in the thread."""
        self.stopping.set()
        self.join(timeout=120)
        assert not self.is_alive(), "a read or write hangs"
        if self.failure is not None:
            raise self.failure


def test_no_acknowledged_write_is_lost_over_kills_by_rdma(device: str, cluster: LocalCluster) -> None:
    keeper = CanaryKeeper(cluster)
    with write_load(cluster, writers=3, seed=1) as writers:
        keeper.start()
        try:
            kill_cycles(cluster, writers, cycles=CYCLES, rng=random.Random(1))
            used = transports(cluster)
        finally:
            keeper.finish()
    assert keeper.rounds > 0
    assert used["client", device] > 0
    assert used["node", device] > 0


def test_writes_go_on_by_tcp_when_the_port_goes_down(cluster: LocalCluster, port_up_again: None) -> None:
    # Soft-iWARP would step in.
    subprocess.run(["ip", "link", "set", "rd1", "down"], check=True)
    try:
        with write_load(cluster, writers=2, seed=2):
            assert transports(cluster)["client", "rxe0"] > 0
            set_roce_port("down")
            wait_until(lambda: transports(cluster)["client", "tcp"] > 0, timeout_s=60.0, what="connections by TCP")
    finally:
        subprocess.run(["ip", "link", "set", "rd1", "up"], check=True)
