"""A cluster whose data moves by RDMA: what it does, and what becomes of it when RDMA goes away."""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator

import pytest

import fs3
from fs3.cli.health import describe_storage
from fs3.client import FileSystem
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from fs3.testing.replicas import compare_replicas
from fs3.testing.storage_status import engine_statuses
from tests.cluster.conftest import cluster, make_cluster
from tests.cluster.test_kill_cycles import wait_for_progress
from tests.cluster.writers import Writer

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


def set_roce_port(state: str) -> None:
    """Bring the port of rxe0 up or down."""
    subprocess.run(["ip", "link", "set", "rd0", state], check=True)


@pytest.fixture
def port_up_again() -> Iterator[None]:
    """Leave the port as it was found."""
    yield
    set_roce_port("up")


@pytest.fixture(params=["rxe0", "siw0"])
def device(request: pytest.FixtureRequest, port_up_again: None) -> str:
    """Give the device that clusters use from here on: soft-RoCE, or soft-iWARP while the other one is down."""
    name: str = request.param
    if name == "siw0":
        set_roce_port("down")
    return name


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


def test_no_acknowledged_write_is_lost_over_kills_by_rdma(device: str, cluster: LocalCluster) -> None:
    rng = random.Random(1)
    writers = [Writer(cluster, f"/w{i}", seed=1000 + i) for i in range(3)]
    for writer in writers:
        writer.start()
    try:
        wait_for_progress(writers)
        for _ in range(CYCLES):
            victim = f"storage-{rng.randrange(cluster.spec.storage) + 1}"
            cluster.kill(victim)
            wait_for_progress(writers)
            cluster.start(victim)
            cluster.wait_serving()
        wait_for_progress(writers)
        used = transports(cluster)
    finally:
        for writer in writers:
            writer.stopping.set()
    for writer in writers:
        writer.finish()
    assert used["client", device] > 0
    assert used["node", device] > 0
    cluster.wait_serving()
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        for writer in writers:
            writer.verify(fs)
        report = compare_replicas(fs)
    assert report.chunks > 0
    assert report.differences == []


def test_writes_go_on_by_tcp_when_the_port_goes_down(cluster: LocalCluster, port_up_again: None) -> None:
    writers = [Writer(cluster, f"/w{i}", seed=2000 + i) for i in range(2)]
    for writer in writers:
        writer.start()
    try:
        wait_for_progress(writers)
        assert transports(cluster)["client", "rxe0"] > 0
        set_roce_port("down")
        wait_until(lambda: transports(cluster)["client", "tcp"] > 0, timeout_s=60.0, what="connections by TCP")
        wait_for_progress(writers)
    finally:
        for writer in writers:
            writer.stopping.set()
    for writer in writers:
        writer.finish()
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        for writer in writers:
            writer.verify(fs)
        assert compare_replicas(fs).differences == []
