"""A cluster's life in its directory, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import fs3
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import ClusterSpec, LocalCluster
from tests.cluster.command import fs3_command as run
from tests.cluster.conftest import MakeCluster


def test_all_data_survives_down_and_up(cluster: LocalCluster) -> None:
    data = os.urandom(5 << 20)
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        fs.makedirs("/a/b")
        with fs.open("/a/b/file", "wb") as file:
            file.write(data)
        fs.symlink("b/file", "/a/link")
    for _ in range(2):
        cluster.down()
        cluster.up()
        with fs3.connect(cluster.url, token=cluster.token) as fs:
            assert fs.readlink("/a/link") == "b/file"
            with fs.open("/a/link", "rb") as file:
                assert file.read() == data


def test_starting_twice_is_refused_and_harmless(cluster: LocalCluster) -> None:
    again = run("up", str(cluster.directory), check=False)
    assert again.returncode == 1
    assert "runs already" in again.stderr
    status = json.loads(run("status", str(cluster.directory), "--json").stdout)
    assert status["healthy"] is True
    assert {s["state"] for s in status["services"]} == {"up"}
    assert [set(node) >= {"served", "gc_waiting", "gc_refused"} for node in status["meta"]] == [True]


def test_the_command_line_starts_reports_and_stops_a_cluster(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    try:
        up = json.loads(run("up", str(directory), "--lease-ms", "3000", "--json").stdout)
        assert up["url"].startswith("fs3://127.0.0.1:")
        assert run("status", str(directory)).stdout.splitlines()[-1] == "healthy"
    finally:
        run("down", str(directory))
    status = run("status", str(directory), "--json", check=False)
    assert status.returncode == 1
    assert {s["state"] for s in json.loads(status.stdout)["services"]} == {"down"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "/nowhere/at/all"], "holds no cluster"),
        (["up", "{tmp}/x", "--replicas", "4", "--storage", "3"], "replicas need as many storage services"),
        (["ls", "--url", "fs3://127.0.0.1:1/", "/"], "127.0.0.1:1"),
        (["ls", "--url", "http://127.0.0.1:1/", "/"], "fs3://"),
        (["storage", "--config", "/nowhere.toml"], "does not exist"),
        (["meta", "--set", "chunk_byte=1"], "chunk_bytes"),
        (["mount", "--url", "fs3://127.0.0.1:1/", "{tmp}/absent"], "absent"),
    ],
)
def test_bad_input_gets_one_clear_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run(*[a.format(tmp=tmp_path) for a in arguments], check=False)
    assert result.returncode in (1, 2)
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 3


def test_a_wrong_token_or_cluster_id_is_refused(cluster: LocalCluster) -> None:
    with pytest.raises(PermissionError, match="token"):
        fs3.connect(cluster.url, token="wrong")
    with pytest.raises(Fs3Error, match="cluster"):
        fs3.connect(cluster.url, token=cluster.token, cluster_id="another")


def test_a_storage_service_refuses_the_disk_of_another_cluster(make_cluster: MakeCluster) -> None:
    single = ClusterSpec(storage=1, replicas=1, lease_ms=3000, heartbeat_ms=300, targets_per_disk=1, kv_durable=False)
    first = make_cluster(single, name="first")
    first.down()
    second = make_cluster(single, name="second", start=False)
    shutil.copytree(first.directory / "storage-1" / "disk-1", second.directory / "storage-1" / "disk-1")
    with pytest.raises(Fs3Error, match="cluster"):
        second.up()
    assert second.pids() == []


def test_a_second_storage_service_on_one_disk_is_refused(cluster: LocalCluster) -> None:
    config = cluster.service("storage-1").config
    result = run("storage", "--config", str(config), "--ready-file", str(config.parent / "other.json"), check=False)
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) >= 1
    assert cluster.service("storage-1").process() is not None


def test_replicas_and_storage_counts_are_as_asked(make_cluster: MakeCluster) -> None:
    spec = ClusterSpec(
        storage=4, replicas=2, meta=2, lease_ms=3000, heartbeat_ms=300, targets_per_disk=2, kv_durable=False
    )
    cluster = make_cluster(spec)
    routing = cluster.routing()
    assert {len(c.targets) for c in routing.chains} == {2}
    assert len(routing.chains) == 4
    assert sorted(n.role for n in routing.nodes).count("meta") == 2
    node_of = {t.target_id: t.node_id for t in routing.targets}
    assert all(len({node_of[t.target_id] for t in c.targets}) == 2 for c in routing.chains)
