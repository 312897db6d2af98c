"""Namespaces of the key-value cache that live in the chunk store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

import fs3
import fs3.kvcache
from fs3.core.errors import Denied, Fs3Error
from fs3.kvcache import KVCache
from fs3.testing.cluster import LocalCluster
from fs3.testing.node_status import engine_statuses
from fs3.testing.process import wait_until
from fs3.v1.storage_pb2 import EngineStatus
from tests.cluster.command import fs3_command
from tests.workloads.kv_values import keys_of, put_all, version_of, versions

TIMEOUT_S = 10.0
WAIT_S = 30.0


@pytest.fixture(scope="module")
def cluster(shared_cluster: LocalCluster) -> LocalCluster:
    return shared_cluster


@pytest.fixture
def fs(cluster: LocalCluster) -> Iterator[fs3.FileSystem]:
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        yield fs


@pytest.fixture
def cache(fs: fs3.FileSystem) -> Iterator[KVCache]:
    """A fresh durable namespace."""
    path = f"/kv-{os.urandom(4).hex()}"
    with fs3.kvcache.open(fs, path, durable=True, chunk_bytes=1 << 20, timeout=TIMEOUT_S) as cache:
        yield cache


def counter(cluster: LocalCluster, name: str) -> int:
    """A counter of all storage nodes together."""
    statuses = engine_statuses(cluster, cluster.routing()).values()
    return sum(status.counters[name] for status in statuses if isinstance(status, EngineStatus))


def fsck(cluster: LocalCluster) -> list[dict[str, object]]:
    result = fs3_command("admin", "fsck", str(cluster.directory), "--json", check=False)
    findings: list[dict[str, object]] = json.loads(result.stdout)["findings"]
    return findings


def test_values_of_all_sizes_are_found_as_they_were_put_until_they_are_removed(cache: KVCache) -> None:
    piece = (1 << 20) - 8192
    for size in (0, 1, 4095, 4096, 70_000, piece, piece + 1, 3 * piece + 5):
        key, value = f"size-{size}", os.urandom(size)
        assert cache.get(key) is None
        assert not cache.exists(key)
        assert cache.put(key, value)
        assert cache.exists(key)
        assert cache.get(key) == value
        # Shorter, longer, and as it was.
        for other in (value[: size // 2], value + b"more", value):
            assert cache.put(key, other)
            assert cache.get(key) == other
        assert cache.remove(key)
        assert cache.get(key) is None
        assert not cache.exists(key)
        assert not cache.remove(key)


def test_long_keys_other_versions_and_other_namespaces_are_apart(fs: fs3.FileSystem, cache: KVCache) -> None:
    assert cache.put(b"k" * 4096, b"long")
    assert cache.put("key", b"one")
    assert cache.get(b"k" * 4096) == b"long"
    assert cache.get(b"k" * 4095) is None
    with fs3.kvcache.open(fs, cache.path, version="v" * 1024, timeout=TIMEOUT_S) as other:
        assert other.get("key") is None
        assert other.put(b"k" * 4096, b"two")
        assert other.get(b"k" * 4096) == b"two"
    assert cache.get("key") == b"one"
    assert cache.get(b"k" * 4096) == b"long"


def test_batches_go_into_memory_of_the_caller(cache: KVCache) -> None:
    keys, size = keys_of(100), 20_000
    put_all(cache, keys, 1, size)
    assert cache.exists_batch([*keys[:3], b"none"]) == [True, True, True, False]
    assert cache.match_prefix([*keys, b"none"]) == len(keys)
    pool = bytearray(len(keys) * size)
    windows = [(pool, number * size, size) for number in range(len(keys))]
    assert cache.get_batch_into(keys, windows) == [size] * len(keys)
    assert all(version_of(key, pool[at : at + size]) == 1 for key, (_, at, _) in zip(keys, windows, strict=True))
    with pytest.raises(ValueError, match="20000"):
        cache.get_into(keys[0], bytearray(100))
    listed = {entry.key: entry.bytes for entry in cache.keys("page-")}
    assert listed == dict.fromkeys(keys, size)
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.durable, stats.puts) == (len(keys), len(keys) * size, True, len(keys))


def test_a_namespace_comes_down_to_its_capacity_with_the_used_ones_kept(
    cluster: LocalCluster, fs: fs3.FileSystem
) -> None:
    capacity, size = 8 << 20, 32_768
    with fs3.kvcache.open(
        fs, "/small", durable=True, capacity=capacity, chunk_bytes=1 << 18, timeout=TIMEOUT_S
    ) as cache:
        evicted = counter(cluster, "kv_durable_evicted_capacity")
        keys, used = keys_of(2 * capacity // size), keys_of(20)
        for at in range(0, len(keys), 32):
            put_all(cache, keys[at : at + 32], 1, size)
            cache.get_batch(used)
        wait_until(lambda: cache.stats().bytes <= capacity, timeout_s=WAIT_S, what="the namespace to shrink")
        found = versions(cache, keys)
        assert set(found) <= {None, 1}
        hits = sum(version is not None for version in found)
        assert 0.3 * len(keys) < hits <= len(keys) / 2
        assert found[:20] == [1] * 20
        stats = cache.stats()
        assert stats.entries == hits
        assert stats.evicted_capacity == len(keys) - hits
        assert counter(cluster, "kv_durable_evicted_capacity") - evicted == len(keys) - hits


def test_entries_go_when_their_time_is_over_by_what_is_configured_now(cache: KVCache) -> None:
    put_all(cache, keys_of(20), 1, 10_000)
    cache.configure(ttl=0.5)
    wait_until(lambda: cache.stats().expired == 20, timeout_s=WAIT_S, what="entries to expire")
    assert versions(cache, keys_of(20)) == [None] * 20
    cache.configure(ttl=3600)
    put_all(cache, keys_of(20), 2, 10_000)
    assert versions(cache, keys_of(20)) == [2] * 20


def test_the_chunks_of_a_directory_that_is_removed_go(cluster: LocalCluster, fs: fs3.FileSystem) -> None:
    held = counter(cluster, "kv_durable_held_bytes")
    with fs3.kvcache.open(fs, "/gone", durable=True, timeout=TIMEOUT_S) as cache:
        put_all(cache, keys_of(50), 1, 100_000)
        assert counter(cluster, "kv_durable_held_bytes") > held
        assert fsck(cluster) == []
        fs.rmdir("/gone")
        wait_until(lambda: cache.get(b"page-7") is None, timeout_s=WAIT_S, what="entries to go")
        wait_until(
            lambda: counter(cluster, "kv_durable_held_bytes") <= held, timeout_s=WAIT_S, what="disk space to come back"
        )
        # Who has it open still gets no second life of it.
        assert not cache.put("late", b"value")
    assert fsck(cluster) == []


def test_entries_without_directory_are_found_by_the_audit(cluster: LocalCluster, fs: fs3.FileSystem) -> None:
    with fs3.kvcache.open(fs, "/orphaned", durable=True, timeout=TIMEOUT_S) as cache:
        put_all(cache, keys_of(5), 1, 10_000)
        fs.removexattr("/orphaned", "user.fs3.kvcache")
        fs.rmdir("/orphaned")
        found = fsck(cluster)
        assert [finding["kind"] for finding in found] == ["orphan-chunks"]
        assert "KV cache" in str(found[0]["where"])
        fs3_command("admin", "fsck", str(cluster.directory), "--repair-chunks", "--orphan-age", "0")
        assert fsck(cluster) == []
        assert versions(cache, keys_of(5)) == [None] * 5


def test_the_command_and_the_settings_say_of_which_kind_a_namespace_is(
    cluster: LocalCluster, fs: fs3.FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_CLUSTER", str(cluster.directory))
    fs3_command("kv", "create", "/made", "--durable", "--capacity", "64MiB")
    with fs3.kvcache.open(fs, "/made", durable=True, timeout=TIMEOUT_S) as cache:
        assert cache.put("key", b"value")
    with pytest.raises(Fs3Error, match="durable False"):
        fs3.kvcache.open(fs, "/made", durable=False)
    (found,) = json.loads(fs3_command("kv", "stat", "/made", "--json").stdout)
    assert (found["durable"], found["entries"], found["bytes"], found["replicas"]) == (True, 1, 5, 3)
    assert "durable" in fs3_command("kv", "stat", "/made").stdout
    assert json.loads(fs3_command("kv", "evict", "/made", "--all", "--json").stdout) == {"entries": 1, "bytes": 5}


def test_who_may_not_write_to_the_directory_only_gets(cluster: LocalCluster, fs: fs3.FileSystem) -> None:
    with fs3.kvcache.open(fs, "/mine", durable=True, timeout=TIMEOUT_S) as cache:
        assert cache.put("key", b"value")
    fs.chmod("/mine", 0o755)
    with (
        fs3.connect(cluster.url, token=cluster.token, uid=1234, gid=1234) as other,
        fs3.kvcache.open(other, "/mine", timeout=TIMEOUT_S) as cache,
    ):
        assert cache.get("key") == b"value"
        with pytest.raises(Denied):
            cache.put("key", b"other")
