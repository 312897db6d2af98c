"""Durable namespaces of the key-value cache while storage services die and start again."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

import fs3
import fs3.kvcache
from fs3.kvcache import KVCache
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.conftest import QUICK
from tests.workloads.kv_values import keys_of, make, put_all, version_of, versions

TIMEOUT_S = 10.0
WAIT_S = 30.0
STORAGE = ("storage-1", "storage-2", "storage-3")


@pytest.fixture
def cluster(make_cluster: Callable[..., LocalCluster]) -> LocalCluster:
    return make_cluster(replace(QUICK, lease_ms=2000))


@pytest.fixture
def cache(cluster: LocalCluster) -> Iterator[KVCache]:
    with (
        fs3.connect(cluster.url, token=cluster.token) as fs,
        fs3.kvcache.open(fs, "/kv", durable=True, chunk_bytes=1 << 20, timeout=TIMEOUT_S) as cache,
    ):
        yield cache


def test_what_was_put_survives_the_death_of_all_storage_services(cluster: LocalCluster, cache: KVCache) -> None:
    keys = keys_of(60)
    put_all(cache, keys, 1, 50_000)
    put_all(cache, keys[:10], 2, 1_500_000)
    assert cache.remove(keys[-1])
    for name in STORAGE:
        cluster.kill(name)
    for name in STORAGE:
        cluster.start(name)
    cluster.wait_serving()
    wait_until(lambda: cache.exists(keys[0]), timeout_s=WAIT_S, what="the head to be asked again")
    assert versions(cache, keys) == [2] * 10 + [1] * 49 + [None]
    # The heads know again what they have.
    wait_until(lambda: cache.stats().entries == 49 + 2 * 10, timeout_s=WAIT_S, what="entries to be counted")
    assert cache.evict().entries == 49 + 2 * 10
    assert versions(cache, keys) == [None] * 60


def test_nothing_stored_is_lost_or_stale_while_a_node_dies_and_comes_back(
    cluster: LocalCluster, cache: KVCache
) -> None:
    keys = keys_of(30)
    stored = dict.fromkeys(keys, 0)
    stopping, failures, rounds = threading.Event(), [], [0]

    def work() -> None:
        rng, issued = random.Random(1), dict.fromkeys(keys, 0)
        try:
            while not stopping.is_set():
                for key in keys:
                    issued[key] += 1
                    if cache.put(key, make(key, issued[key], rng.choice((100, 50_000, 200_000)))):
                        stored[key] = issued[key]
                    oldest, found = stored[key], cache.get(key)
                    # A get may fail while nobody serves; what is found is never old.
                    assert found is None or oldest <= version_of(key, found) <= issued[key]
                rounds[0] += 1
        except BaseException as e:
            failures.append(e)

    def progress() -> None:
        before = rounds[0]
        wait_until(lambda: bool(failures) or rounds[0] > before + 1, timeout_s=WAIT_S, what="rounds")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        progress()
        cluster.kill("storage-2")
        progress()
        assert all(version is not None for version in versions(cache, [key for key in keys if stored[key]]))
        cluster.start("storage-2")
        cluster.wait_serving()
        progress()
    finally:
        stopping.set()
        worker.join()
    assert not failures, failures
    assert all(stored.values())
    final = versions(cache, keys)
    assert all(version is not None and version >= stored[key] for key, version in zip(keys, final, strict=True))
