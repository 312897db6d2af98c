"""What a person sees of rot and of returning replicas: right reads, repairs that are counted, progress."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import fs3
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from fs3.testing.replicas import compare_replicas
from tests.cluster.command import fs3_command
from tests.cluster.conftest import QUICK, MakeCluster
from tests.cluster.writers import Writer

MIB = 1 << 20
SIZE = 6 * MIB


def flip_bits(directory: Path, patterns: list[bytes]) -> int:
    """Change the byte after the start of every pattern found in the data files below; returns how many."""
    flipped = 0
    for path in directory.rglob("*.blk"):
        content = path.read_bytes()
        with path.open("r+b") as file:
            for pattern in patterns:
                at = content.find(pattern)
                if at >= 0:
                    file.seek(at + 1)
                    file.write(bytes([pattern[1] ^ 0x10]))
                    flipped += 1
    return flipped


def status(cluster: LocalCluster) -> dict[str, Any]:
    """What `fs3 status --json` prints."""
    described: dict[str, Any] = json.loads(fs3_command("status", str(cluster.directory), "--json", check=False).stdout)
    return described


def total(storage: list[dict[str, Any]], counter: str) -> int:
    """Sum a counter over all nodes."""
    return sum(node["counters"][counter] for node in storage)


def test_bits_that_flip_under_load_are_repaired_and_counted_and_nobody_reads_them(cluster: LocalCluster) -> None:
    data = os.urandom(SIZE)
    writer = Writer(cluster, "/load", seed=7)
    writer.start()
    try:
        with fs3.connect(cluster.url, token=cluster.token) as fs:
            with fs.open("/f", "wb", buffering=0) as file:
                file.pwrite(data, 0)
                file.sync()
            patterns = [data[at : at + 64] for at in range(500_000, SIZE, MIB)]
            flipped = flip_bits(cluster.directory / "storage-1", patterns[:4])
            flipped += flip_bits(cluster.directory / "storage-2", patterns[2:])
            assert flipped == 8
            with fs.open("/f", "rb", buffering=0) as file:
                assert file.pread(SIZE, 0) == data
            scrubbed = json.loads(fs3_command("scrub", str(cluster.directory), "--wait", "--json").stdout)
            assert scrubbed["sound"]
            assert total(scrubbed["storage"], "repaired_chunks") == flipped
            assert total(scrubbed["storage"], "unrepairable_blocks") == 0
            writer.finish()
            writer.verify(fs)
            for victim in ("storage-3", "storage-2"):
                # The repaired replicas alone have it all.
                cluster.kill(victim)
                with fs.open("/f", "rb", buffering=0) as file:
                    assert file.pread(SIZE, 0) == data
                cluster.start(victim)
                cluster.wait_serving()
            assert compare_replicas(fs).differences == []
    finally:
        writer.stopping.set()
    assert status(cluster)["healthy"]


def test_a_returning_replica_shows_its_progress(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(replace(QUICK, resync_bytes_per_s=6 * MIB, targets_per_disk=1))
    data = os.urandom(24 * MIB)
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        cluster.kill("storage-1")
        with fs.open("/f", "wb", buffering=0) as file:
            file.pwrite(data, 0)
        cluster.start("storage-1")
        seen: list[dict[str, Any]] = []

        def progressing() -> bool:
            storage = status(cluster).get("storage", [])
            seen[:] = [r for node in storage for t in node.get("targets", ()) for r in t["resyncs"]]
            return any(0 < r["done_chunks"] < r["total_chunks"] for r in seen)

        wait_until(progressing, timeout_s=30, what="the progress of the resync")
        assert all(r["total_bytes"] >= len(data) and r["bytes_per_s"] > 0 for r in seen)
        assert "syncs from" in fs3_command("status", str(cluster.directory), check=False).stdout
        cluster.wait_serving()
        described = status(cluster)
        assert described["healthy"]
        assert total(described["storage"], "resync_bytes") >= len(data)
        assert compare_replicas(fs).differences == []
