"""A full disk: ENOSPC for the writer, nothing half-written, everything acknowledged before still there."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fs3
import fs3.kvcache
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.conftest import MakeCluster
from tests.cluster.mounts import mounted

DISK_BYTES = 256 << 20
PIECE = 4 << 20

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="making a small file system takes root")


def fits(path: Path, data: bytes) -> bool:
    """Write a file; False when there is no room."""
    try:
        path.write_bytes(data)
    except OSError as e:
        if e.errno == errno.ENOSPC:
            return False
        raise
    return True


@pytest.fixture
def small_cluster(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[LocalCluster]:
    """One storage service on a file system of DISK_BYTES."""
    spec = ClusterSpec(
        storage=1, replicas=1, targets_per_disk=1, lease_ms=3000, heartbeat_ms=300, kv_durable=False, gc_delay_ms=0
    )
    cluster = make_cluster(spec, name="small", start=False)
    disk = cluster.directory / "storage-1" / "disk-1"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], check=True)
    try:
        cluster.up()
        yield cluster
        cluster.down()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_an_error_and_loses_nothing(small_cluster: LocalCluster, tmp_path: Path) -> None:
    data = os.urandom(PIECE)
    with fs3.connect(small_cluster.url, token=small_cluster.token) as fs:
        written = 0
        with fs.open("/native", "wb", buffering=0) as file, pytest.raises(OSError, match=r".") as caught:
            while written < 2 * DISK_BYTES:
                file.pwrite(data, written)
                written += PIECE
        assert caught.value.errno == errno.ENOSPC
        assert written > DISK_BYTES // 4
        with fs.open("/native", "rb", buffering=0) as file:
            for offset in range(0, written, PIECE):
                assert file.pread(PIECE, offset) == data
        with mounted(small_cluster, tmp_path / "m") as path:
            with pytest.raises(OSError, match=r".") as caught, (path / "mounted").open("wb") as out:
                for _ in range(2 * DISK_BYTES // PIECE):
                    out.write(data)
            assert caught.value.errno == errno.ENOSPC
            (path / "native").unlink()
            (path / "mounted").unlink()
            # Space comes back once the collector has been by.
            wait_until(lambda: fits(path / "again", data), timeout_s=30, what="room on the disk")
            assert (path / "again").read_bytes() == data


def test_entries_of_the_kv_cache_go_before_a_disk_is_full(small_cluster: LocalCluster) -> None:
    data = os.urandom(PIECE)
    with (
        fs3.connect(small_cluster.url, token=small_cluster.token) as fs,
        fs3.kvcache.open(fs, "/kv", durable=True, timeout=30) as cache,
    ):
        # More than the disk holds.
        value, count = os.urandom(1 << 20), 2 * DISK_BYTES >> 20
        assert all(cache.put(f"page-{number}", value) for number in range(count))
        assert cache.get(f"page-{count - 1}") == value
        assert cache.get("page-0") is None
        with fs.open("/file", "wb", buffering=0) as file:
            for offset in range(0, DISK_BYTES // 2, PIECE):
                file.pwrite(data, offset)
        with fs.open("/file", "rb", buffering=0) as file:
            assert all(file.pread(PIECE, offset) == data for offset in range(0, DISK_BYTES // 2, PIECE))
        assert cache.stats().evicted_memory > 0
        assert all(cache.get(key) in (None, value) for key in ("page-0", f"page-{count - 1}"))
