"""Data between processes of one host goes through shared memory, and does not where that is switched off."""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import fs3
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.command import fs3_command
from tests.cluster.mounts import mounted

MIB = 1 << 20
SIZE = 6 * MIB
DATA = os.urandom(SIZE)


def storage(cluster: LocalCluster) -> list[dict[str, Any]]:
    """The storage nodes, as `fs3 status --json` describes them."""
    status = json.loads(fs3_command("status", str(cluster.directory), "--json", check=False).stdout)
    described: list[dict[str, Any]] = status["storage"]
    return described


def moved(cluster: LocalCluster) -> Counter[str]:
    """What all storage services together have counted."""
    total: Counter[str] = Counter()
    for node in storage(cluster):
        total.update({name: n for name, n in node["counters"].items() if name.startswith("shared_memory_")})
    return total


def read(fs: fs3.FileSystem, path: str) -> bytes:
    with fs.open(path, "rb", buffering=0) as file:
        return file.pread(SIZE, 0)


def test_what_a_client_reads_and_a_chain_forwards_goes_by_reference(shared_cluster: LocalCluster) -> None:
    before = moved(shared_cluster)
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
        # Counts are of the process, also those of its earlier connections.
        began = Counter(fs.stats())
        with fs.open("/native", "wb", buffering=0) as file:
            file.pwrite(DATA, 0)
        assert read(fs, "/native") == DATA
        stats = Counter(fs.stats()) - began
        assert stats["shared_memory_received_bytes"] >= SIZE
        # Memory of the program itself is never shared: what it writes is copied to such as is.
        assert stats["shared_memory_staged_bytes"] >= SIZE
        assert stats["shared_memory_sent_bytes"] >= SIZE
        connections = [c for node in storage(shared_cluster) for c in node["connections"]]
        assert {c["transport"] for c in connections if c["outgoing"]} == {"shared memory"}
        assert ("client", "shared memory") in {(c["peer"].split()[0], c["transport"]) for c in connections}
        told = fs3_command("status", str(shared_cluster.directory), check=False).stdout
        assert "shared memory" in told
    after = moved(shared_cluster) - before
    # Two of three replicas get what is written from another storage service.
    assert after["shared_memory_received_bytes"] >= 2 * SIZE
    assert after["shared_memory_sent_bytes"] >= 3 * SIZE


def test_a_forked_child_has_no_part_in_its_parents_memory(shared_cluster: LocalCluster) -> None:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
        with fs.open("/parents", "wb", buffering=0) as file:
            file.pwrite(DATA, 0)
        sent_bytes = fs.stats()["shared_memory_sent_bytes"]
        child = os.fork()
        if child == 0:
            os._exit(_write_in_child(fs, sent_bytes))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read(fs, "/childs") == DATA[::-1]
        # The parent goes on as before.
        before = fs.stats()["shared_memory_staged_bytes"]
        with fs.open("/parents", "wb", buffering=0) as file:
            file.pwrite(DATA, 0)
        assert fs.stats()["shared_memory_staged_bytes"] - before >= SIZE
        assert read(fs, "/parents") == DATA


def _write_in_child(fs: fs3.FileSystem, parents_sent_bytes: int) -> int:
    try:
        with fs.open("/childs", "wb", buffering=0) as file:
            file.pwrite(DATA[::-1], 0)
        assert read(fs, "/childs") == DATA[::-1]
        assert read(fs, "/parents") == DATA
        # The counts of its parent came with the fork.
        assert fs.stats()["shared_memory_sent_bytes"] == parents_sent_bytes
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def test_a_client_that_is_told_not_to_gets_the_same_bytes_by_tcp(shared_cluster: LocalCluster) -> None:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs, fs.open("/f", "wb", buffering=0) as file:
        file.pwrite(DATA, 0)
    with fs3.connect(shared_cluster.url, token=shared_cluster.token, shared_memory=False) as fs:
        before = moved(shared_cluster)
        assert read(fs, "/f") == DATA
        assert moved(shared_cluster)["shared_memory_sent_bytes"] == before["shared_memory_sent_bytes"]
        assert not [name for name in fs.stats() if name.startswith("shared_memory")]


def test_a_mount_writes_and_reads_by_reference(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    def counted(mountpoint: Path) -> dict[str, int]:
        counters: dict[str, int] = json.loads(fs3_command("stats", str(mountpoint), "--json").stdout)
        return counters

    with mounted(shared_cluster, tmp_path / "writer") as mountpoint:
        (mountpoint / "mounted").write_bytes(DATA)
        assert counted(mountpoint)["shared_memory_sent_bytes"] >= SIZE
    with mounted(shared_cluster, tmp_path / "reader") as mountpoint:
        assert (mountpoint / "mounted").read_bytes() == DATA
        assert counted(mountpoint)["shared_memory_received_bytes"] >= SIZE
    with mounted(shared_cluster, tmp_path / "plain", "shared_memory=false") as mountpoint:
        assert (mountpoint / "mounted").read_bytes() == DATA
        (mountpoint / "plain").write_bytes(DATA)
        assert "shared_memory_sent_bytes" not in counted(mountpoint)
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
        assert read(fs, "/plain") == DATA


def test_readers_see_only_right_bytes_while_services_are_killed(cluster: LocalCluster) -> None:
    files = [os.urandom(SIZE) for _ in range(4)]
    stopping = threading.Event()
    rounds = [0, 0]
    wrong: list[str] = []

    with fs3.connect(cluster.url, token=cluster.token) as fs:
        for number, data in enumerate(files):
            with fs.open(f"/{number}", "wb", buffering=0) as file:
                file.pwrite(data, 0)

        def reader(which: int) -> None:
            try:
                while not stopping.is_set():
                    for number, data in enumerate(files):
                        if read(fs, f"/{number}") != data:
                            wrong.append(f"/{number}")
                    rounds[which] += 1
            except Exception as e:
                wrong.append(repr(e))

        def advanced() -> None:
            before = list(rounds)
            wait_until(
                lambda: bool(wrong) or all(now > then + 1 for now, then in zip(rounds, before, strict=True)),
                timeout_s=60,
                what="progress of the readers",
            )

        threads = [threading.Thread(target=reader, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        try:
            for victim in ("storage-1", "storage-2"):
                advanced()
                cluster.kill(victim)
                advanced()
                cluster.start(victim)
                cluster.wait_serving()
            advanced()
        finally:
            stopping.set()
            for thread in threads:
                thread.join()
        assert not wrong
        assert fs.stats()["shared_memory_received_bytes"] > 0
        assert fs.stats()["checksum_failures"] == 0
