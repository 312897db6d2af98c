"""Large reads and writes of a cluster by RDMA against raw verbs, and the client's CPU time against TCP."""

from __future__ import annotations

import random
import statistics
import time

import fs3
from fs3.testing.cluster import ClusterSpec, LocalCluster
from tests.cluster.conftest import MakeCluster, make_cluster
from tests.rdma.perftest import bandwidth

__all__ = ["make_cluster"]

MIB = 1 << 20
FILE_BYTES = 64 * MIB
PASSES = 5


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
    return statistics.median(rates), cpu_s / PASSES / (FILE_BYTES / (1 << 30))


def test_large_reads_and_writes_against_raw_verbs_and_tcp(make_cluster: MakeCluster, numbers: dict[str, float]) -> None:
    spec = ClusterSpec(storage=1, replicas=1, targets_per_disk=2, kv_durable=False, read_cache_bytes=256 * MIB)
    cluster = make_cluster(spec)
    for work, tool in (("read", "ib_read_bw"), ("write", "ib_write_bw")):
        limit = bandwidth(tool, "rxe0", MIB, messages=300)
        rdma, rdma_cpu = passes(cluster, "rdma", work)
        tcp, tcp_cpu = passes(cluster, "tcp", work)
        limit = statistics.mean([limit, bandwidth(tool, "rxe0", MIB, messages=300)])
        numbers |= {
            f"{tool}_1mib_bytes_per_s": limit,
            f"fs3_{work}_rdma_bytes_per_s": rdma,
            f"fs3_{work}_rdma_ratio": rdma / limit,
            f"fs3_{work}_tcp_bytes_per_s": tcp,
            f"fs3_{work}_rdma_client_cpu_s_per_gib": rdma_cpu,
            f"fs3_{work}_tcp_client_cpu_s_per_gib": tcp_cpu,
        }
