"""Settings changed while a cluster runs."""

from __future__ import annotations

import json
import time

import pytest

import fs3
from fs3.testing.cluster import LocalCluster
from fs3.testing.node_status import meta_statuses
from fs3.v1.meta_pb2 import MetaStatus
from fs3.v1.routing_pb2 import Routing
from tests.cluster.command import fs3_command

TOLD_S = 20.0


def test_a_setting_holds_for_new_files_without_a_restart(
    shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    assert "settings version" in fs3_command("admin", "config", "set", "meta.chunk_bytes=256KiB").stdout
    try:
        assert json.loads(fs3_command("admin", "config", "ls", "--json").stdout)["values"] == {
            "meta.chunk_bytes": "256KiB"
        }
        with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
            ends_s = time.monotonic() + TOLD_S
            chunk_bytes = 0
            for number in range(10_000):
                fs.open(f"/settings-{number}", "xb").close()
                layout = fs.layout(f"/settings-{number}")
                assert layout is not None
                chunk_bytes = layout.chunk_bytes
                if chunk_bytes == 256 << 10 or time.monotonic() > ends_s:
                    break
            assert chunk_bytes == 256 << 10
    finally:
        fs3_command("admin", "config", "unset", "meta.chunk_bytes")
    refused = fs3_command("admin", "config", "set", "meta.chunk_byte=1MiB", check=False)
    assert refused.returncode == 1
    assert "meta.chunk_bytes" in refused.stderr
    assert "meta.chunk_bytes" in fs3_command("admin", "config", "ls").stdout


def told_as_deltas(cluster: LocalCluster, routing: Routing) -> int:
    statuses = [status for status in meta_statuses(cluster, routing).values() if isinstance(status, MetaStatus)]
    return sum(status.routing_sent.deltas for status in statuses)


def test_a_client_that_is_told_changes_has_the_managers_routing(
    shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    before = shared_cluster.routing()
    deltas = told_as_deltas(shared_cluster, before)
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
        fs3_command("admin", "config", "set", "meta.stripe=3")
        fs3_command("admin", "config", "unset", "meta.stripe")
        ends_s = time.monotonic() + TOLD_S
        known = Routing()
        while known.version < before.version + 2 or known != shared_cluster.routing():
            assert time.monotonic() < ends_s, "the client does not follow"
            known = Routing.FromString(fs.client.routing())
        assert told_as_deltas(shared_cluster, known) > deltas
