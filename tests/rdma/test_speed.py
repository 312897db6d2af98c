"""Large reads and writes of a cluster by RDMA against raw verbs, and the client's CPU time against TCP."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fs3
from fs3.native import crc32c
from fs3.testing.cluster import ClusterSpec, LocalCluster
from tests.cluster.conftest import MakeCluster, make_cluster
from tests.rdma.perftest import bandwidth

__all__ = ["make_cluster"]

MIB = 1 << 20
GIB = 1 << 30
FILE_BYTES = 64 * MIB
# What one RDMA operation of fs3 moves, and one of the raw verbs.
CHUNK_BYTES = 8 * MIB
PASSES = 7
# Far below what is measured on an idle machine: less is a fault, not noise.
READ_RATIO_MIN = 0.6
WRITE_RATIO_MIN = 0.5


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Give a directory in memory: the guest's disk is another process of the host, on the same CPU."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def passes(cluster: LocalCluster, transport: str, work: str) -> tuple[float, float]:
    """Read or write a file in registered memory. Returns the median in bytes/s, and this process' CPU-s per GiB."""
    memory = bytearray(random.Random(7).randbytes(FILE_BYTES))
    rates, cpu_s = [], 0.0
    with (
        fs3.connect(cluster.url, token=cluster.token, transport=transport) as fs,
        fs.open("/file", "w+b", buffering=0) as file,
    ):
        registered = fs3.RegisteredMemory(memory)
        expected = bytes(memory)
        file.pwrite(memory, 0)
        if work == "read":
            # What is compared afterwards has to come from the cluster.
            memory[:] = bytes(FILE_BYTES)
        for _ in range(PASSES):
            began_s, began_cpu_s = time.perf_counter(), time.process_time()
            if work == "read":
                assert file.pread_into(memory, 0) == FILE_BYTES
            else:
                assert file.pwrite(memory, 0) == FILE_BYTES
            cpu_s += time.process_time() - began_cpu_s
            rates.append(FILE_BYTES / (time.perf_counter() - began_s))
        assert memory == expected
        assert file.pread(FILE_BYTES, 0) == expected
        registered.release()
    return statistics.median(rates), cpu_s / PASSES / (FILE_BYTES / GIB)


def seconds_per_byte(work: Callable[[memoryview], object]) -> float:
    """Time `work` on FILE_BYTES, in pieces of CHUNK_BYTES; the best of some passes."""
    memory = memoryview(bytearray(random.Random(8).randbytes(FILE_BYTES)))
    taken_s = []
    for _ in range(PASSES):
        began_s = time.perf_counter()
        for at in range(0, FILE_BYTES, CHUNK_BYTES):
            work(memory[at : at + CHUNK_BYTES])
        taken_s.append(time.perf_counter() - began_s)
    return min(taken_s) / FILE_BYTES


def test_large_reads_and_writes_against_raw_verbs_and_tcp(
    make_cluster: MakeCluster, tmp_path: Path, numbers: dict[str, float]
) -> None:
    spec = ClusterSpec(
        storage=1, replicas=1, targets_per_disk=2, chunk_bytes=CHUNK_BYTES, kv_durable=False, read_cache_bytes=256 * MIB
    )
    cluster = make_cluster(spec)
    raw: dict[str, float] = {}
    for message_bytes, messages in ((MIB, 300), (CHUNK_BYTES, 50)):
        for tool in ("ib_read_bw", "ib_write_bw"):
            raw[f"{tool}_{message_bytes // MIB}mib"] = bandwidth(tool, "rxe0", message_bytes, messages=messages)
    numbers |= {f"{name}_bytes_per_s": rate for name, rate in raw.items()}
    # The one CPU of the guest is client, server, both adapters and disk. What is read is pushed by RDMA WRITE and
    # verified; what is written gets checksums, is pulled by RDMA READ, verified and stored.
    checksum_s = seconds_per_byte(crc32c)
    with open(tmp_path / "plain", "wb", buffering=0) as plain:
        store_s = seconds_per_byte(lambda data: os.pwrite(plain.fileno(), data, 0))
    possible = {
        "read": 1 / (1 / raw["ib_write_bw_8mib"] + checksum_s),
        "write": 1 / (1 / raw["ib_read_bw_8mib"] + 2 * checksum_s + store_s),
    }
    for work, tool, ratio_min in (("read", "ib_read_bw", READ_RATIO_MIN), ("write", "ib_write_bw", WRITE_RATIO_MIN)):
        rdma, rdma_cpu = passes(cluster, "rdma", work)
        tcp, tcp_cpu = passes(cluster, "tcp", work)
        ratio = rdma / raw[f"{tool}_8mib"]
        numbers |= {
            f"fs3_{work}_rdma_bytes_per_s": rdma,
            f"fs3_{work}_rdma_ratio": ratio,
            f"fs3_{work}_rdma_ratio_1mib": rdma / raw[f"{tool}_1mib"],
            f"fs3_{work}_rdma_of_possible": rdma / possible[work],
            f"fs3_{work}_tcp_bytes_per_s": tcp,
            f"fs3_{work}_rdma_client_cpu_s_per_gib": rdma_cpu,
            f"fs3_{work}_tcp_client_cpu_s_per_gib": tcp_cpu,
        }
        assert ratio > ratio_min
        assert rdma_cpu < tcp_cpu
