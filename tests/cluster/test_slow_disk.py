"""One slow disk does not slow the reads of a chain: clients move away from it, and come back."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fs3
from fs3.client import FileSystem
from fs3.testing.cluster import ClusterSpec, LocalCluster
from tests.torture.disks import FaultDisk, missing_device

SLOW_MS = 10
FILE_BYTES = 24 << 20
READ_BYTES = 4096
# Of the client: a slow disk is probed at most once in so many reads that avoid it.
PROBE_READS = 32


@dataclass
class Slow:
    """A cluster of three storage services; the disk of one of them can be slowed down."""

    cluster: LocalCluster
    disk: FaultDisk

    def delayed(self) -> int:
        """Reads and writes of chunk data that the slow disk has done slowly so far."""
        return self.disk.order({"do": "counts"})["delayed"]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    if reason := missing_device():
        pytest.skip(reason)
    # The cache holds next to nothing, so that reads go to the disks.
    cluster = LocalCluster.create(tmp_path / "c", ClusterSpec(kv_durable=False, read_cache_bytes=1 << 20))
    disk = FaultDisk(cluster.service("storage-3").directory / "disk-1", tmp_path / "backing")
    try:
        disk.start(seed=1)
        cluster.up()
        yield Slow(cluster, disk)
    finally:
        cluster.down()
        disk.stop()


def _read(fs: FileSystem, data: bytes, count: int, seed: int) -> list[float]:
    """Read random blocks, one after another; the sorted latencies in seconds."""
    rng = random.Random(seed)
    buffer = bytearray(READ_BYTES)
    latencies = []
    with fs.open("/f", "rb", buffering=0) as file:
        for _ in range(count):
            offset = rng.randrange(FILE_BYTES // READ_BYTES) * READ_BYTES
            start = time.perf_counter()
            file.pread_into(buffer, offset)
            latencies.append(time.perf_counter() - start)
            assert buffer == data[offset : offset + READ_BYTES]
    return sorted(latencies)


def test_reads_leave_a_slow_disk_and_return_when_it_is_fast_again(slow: Slow) -> None:
    data = random.Random(3).randbytes(FILE_BYTES)
    with fs3.connect(slow.cluster.url, token=slow.cluster.token) as fs:
        with fs.open("/f", "wb") as file:
            file.write(data)
        before = _read(fs, data, 400, seed=1)

        slow.disk.set_faults(latency_ms=SLOW_MS, only="data")
        _read(fs, data, 200, seed=2)
        count, delayed = 600, slow.delayed()
        during = _read(fs, data, count, seed=3)
        delayed = slow.delayed() - delayed
        print(f"p50 {statistics.median(before) * 1e6:.0f} -> {statistics.median(during) * 1e6:.0f} µs, p99", end=" ")
        print(f"{before[-4] * 1e6:.0f} -> {during[-6] * 1e6:.0f} µs; {delayed} slow reads; {fs.client.stats()}")
        # A third of the chunks prefer the slow disk; only probes go there.
        assert delayed <= count / PROBE_READS + 1
        assert statistics.median(during) < SLOW_MS / 1000

        # As fast as it was, but counted: reads return.
        slow.disk.set_faults(latency_ms=1, only="data")
        deadline = time.monotonic() + 60
        delayed = slow.delayed()
        while slow.delayed() - delayed < 100:
            assert time.monotonic() < deadline, "the disk was never used again"
            _read(fs, data, 200, seed=4)
