"""A file that another client removed stays readable until it is closed everywhere, or its client is dead."""

from __future__ import annotations

import json
import mmap
import os
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

import fs3
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.command import fs3_command
from tests.cluster.conftest import QUICK, MakeCluster
from tests.cluster.mounts import mounted

SESSION_S = 5.0
PATIENCE_S = 90.0
SIZE = 3_000_000


def status(cluster: LocalCluster) -> dict[str, list[dict[str, int]]]:
    described: dict[str, list[dict[str, int]]] = json.loads(
        fs3_command("status", str(cluster.directory), "--json").stdout
    )
    return described


def collected(cluster: LocalCluster) -> int:
    """How many files the metadata service has removed."""
    return status(cluster)["meta"][0]["gc_collected"]


def stored(cluster: LocalCluster) -> set[int]:
    """The inodes that storage has chunks of."""
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        # A chunk id is a zero, the inode and the index.
        return {int.from_bytes(chunk.chunk_id[4:12]) for replica in fs.list_replicas() for chunk in replica.chunks}


def remove_another(cluster: LocalCluster, directory: Path) -> None:
    """Return when a file that is removed now has been collected, and so all that were removed before and may go."""
    before = collected(cluster)
    (directory / "another").write_bytes(bytes(SIZE))
    (directory / "another").unlink()
    wait_until(lambda: collected(cluster) > before, timeout_s=PATIENCE_S, what="a collection")


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> LocalCluster:
    """Files are removed after the time that is the default."""
    return make_cluster(replace(QUICK, gc_delay_ms=ClusterSpec.gc_delay_ms, session_ms=int(SESSION_S * 1000)))


def test_what_another_client_removed_stays_readable_until_it_is_closed(cluster: LocalCluster, tmp_path: Path) -> None:
    data = os.urandom(SIZE)
    with ExitStack() as stack:
        a, b = (stack.enter_context(mounted(cluster, tmp_path / name)) for name in "ab")
        fs = stack.enter_context(fs3.connect(cluster.url, token=cluster.token))
        for name in ("read", "mapped", "native", "written"):
            (b / name).write_bytes(data)
        inode = (b / "read").stat().st_ino
        with ExitStack() as readers:
            reader = readers.enter_context((a / "read").open("rb", buffering=0))
            with (a / "mapped").open("rb") as file:
                mapped = readers.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            with (a / "written").open("r+b") as file:
                written = readers.enter_context(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
            native = readers.enter_context(fs.open("/native", "rb", buffering=0))
            for name in ("read", "mapped", "native", "written"):
                (b / name).unlink()
            remove_another(cluster, b)
            assert os.fstat(reader.fileno()).st_nlink == 0
            assert os.pread(reader.fileno(), SIZE, 0) == data
            assert mapped[:] == data
            assert written[:] == data
            assert native.pread(SIZE, 0) == data
            assert inode in stored(cluster)
        wait_until(lambda: stored(cluster) == set(), timeout_s=PATIENCE_S, what="the end of the chunks")


def test_what_a_dead_client_had_open_goes(cluster: LocalCluster, tmp_path: Path) -> None:
    data = os.urandom(SIZE)
    with mounted(cluster, tmp_path / "a") as a, mounted(cluster, tmp_path / "b") as b:
        for name in ("dead", "alive"):
            (b / name).write_bytes(data)
        inodes = {name: (b / name).stat().st_ino for name in ("dead", "alive")}
        held = os.open(a / "dead", os.O_RDONLY)
        with fs3.connect(cluster.url, token=cluster.token) as fs, fs.open("/alive", "rb", buffering=0) as alive:
            for name in inodes:
                (b / name).unlink()
            remove_another(cluster, b)
            assert stored(cluster) == set(inodes.values())
            os.kill(int(json.loads((cluster.directory / "mount-a.pid").read_text())["pid"]), signal.SIGKILL)
            wait_until(
                lambda: stored(cluster) == {inodes["alive"]}, timeout_s=PATIENCE_S, what="the end of the dead client"
            )
            assert alive.pread(SIZE, 0) == data
        with pytest.raises(OSError, match="not connected"):
            os.pread(held, SIZE, 0)
        os.close(held)
