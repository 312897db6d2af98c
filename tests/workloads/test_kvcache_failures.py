"""The key-value cache while storage services are killed, stopped and started again."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

import fs3
import fs3.kvcache
from fs3.core.errors import Fs3Error
from fs3.kvcache import KVCache
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from fs3.v1.routing_pb2 import PublicState, Routing
from tests.cluster.conftest import QUICK
from tests.workloads.kv_values import make, version_of

KEYS = 24
PROGRESS_S = 30.0
# How long an operation may take: what the caches below are told, and what a busy machine adds.
TIMEOUT_S = 0.5
STALL_S = 2.0

MakeCluster = Callable[..., LocalCluster]


class Load:
    """Threads that overwrite keys with rising versions, and others that read them; each notices what must not be."""

    def __init__(self, cluster: LocalCluster, path: str, replicas: int) -> None:
        self._cluster = cluster
        self._path = path
        self._replicas = replicas
        self._stopping = threading.Event()
        self._threads = [
            *(threading.Thread(target=self._run, args=(self._write, number)) for number in range(2)),
            *(threading.Thread(target=self._run, args=(self._read, number)) for number in range(2)),
        ]
        self.issued = [0] * KEYS
        self.acknowledged = [0] * KEYS
        self.stored = self.hits = 0
        self.slowest_s = 0.0
        self.failures: list[BaseException] = []

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def wait_for_progress(self) -> None:
        """Wait until values are stored and found."""
        stored, hits = self.stored + 3 * KEYS, self.hits + 3 * KEYS
        wait_until(
            lambda: bool(self.failures) or (self.stored >= stored and self.hits >= hits),
            timeout_s=PROGRESS_S,
            what="puts and hits",
        )
        if self.failures:
            raise self.failures[0]

    def _run(self, work: Callable[[KVCache, int, random.Random], None], number: int) -> None:
        try:
            with (
                fs3.connect(self._cluster.url, token=self._cluster.token) as fs,
                fs3.kvcache.open(fs, self._path, replicas=self._replicas, timeout=TIMEOUT_S) as cache,
            ):
                rng = random.Random(number)
                while not self._stopping.is_set():
                    began = time.monotonic()
                    work(cache, number, rng)
                    self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        except BaseException as e:
            self.failures.append(e)

    def _write(self, cache: KVCache, number: int, rng: random.Random) -> None:
        # Each key has one writer, so that its versions have an order.
        slot = rng.randrange(KEYS // 2) * 2 + number
        key = b"key-%d" % slot
        self.issued[slot] += 1
        version = self.issued[slot]
        if cache.put(key, make(key, version, rng.choice((100, 50_000, 200_000)))):
            self.acknowledged[slot] = version
            self.stored += 1

    def _read(self, cache: KVCache, number: int, rng: random.Random) -> None:
        slot = rng.randrange(KEYS)
        key = b"key-%d" % slot
        oldest = self.acknowledged[slot]
        found = cache.get(key)
        if found is not None:
            version = version_of(key, found)
            assert version >= oldest, f"{key!r}: version {version} was read after {oldest} was stored"
            assert version <= self.issued[slot]
            self.hits += 1


def node_of(cluster: LocalCluster, name: str) -> int:
    """The number that the cluster knows a storage service by."""
    ready = cluster.service(name).ready()
    assert ready is not None
    return int(str(ready["node_id"]))


def routing_of(cluster: LocalCluster) -> Routing:
    """The routing now. A busy machine may keep the manager from answering in time."""
    deadline = time.monotonic() + PROGRESS_S
    while True:
        try:
            return cluster.routing()
        except Fs3Error:
            if time.monotonic() > deadline:
                raise


def serving_nodes(cluster: LocalCluster) -> set[int]:
    """Nodes with targets that serve."""
    routing = routing_of(cluster)
    place = {target.target_id: target.node_id for target in routing.targets}
    serving = PublicState.PUBLIC_STATE_SERVING
    return {place[t.target_id] for chain in routing.chains for t in chain.targets if t.state == serving}


def first_to_be_asked(cluster: LocalCluster) -> str:
    """A storage service that keeps some of the keys when each is kept once."""
    routing = routing_of(cluster)
    target = routing.chains[0].targets[0].target_id
    node = next(t.node_id for t in routing.targets if t.target_id == target)
    names = [f"storage-{number + 1}" for number in range(cluster.spec.storage)]
    return next(name for name in names if node_of(cluster, name) == node)


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Iterator[LocalCluster]:
    return make_cluster(replace(QUICK, lease_ms=2000))


@pytest.mark.parametrize("replicas", [1, 2])
def test_no_value_is_older_than_what_was_stored_while_nodes_die_and_come_back(
    cluster: LocalCluster, replicas: int
) -> None:
    with Load(cluster, "/kv", replicas) as load:
        load.wait_for_progress()
        # Each time the one that is asked first, so that the one that was stopped becomes that again.
        for number in (signal.SIGSTOP, signal.SIGKILL, signal.SIGKILL):
            name = first_to_be_asked(cluster)
            node = node_of(cluster, name)
            cluster.kill(name, number)
            wait_until(lambda node=node: node not in serving_nodes(cluster), timeout_s=30, what="chains without it")
            load.wait_for_progress()
            if number == signal.SIGSTOP:
                # It has all its memory still, and has heard nothing.
                cluster.kill(name, signal.SIGCONT)
            else:
                cluster.start(name)
            load.wait_for_progress()
            cluster.wait_serving()
            load.wait_for_progress()
    assert not load.failures, load.failures
    assert load.slowest_s < STALL_S


def test_a_silent_node_is_a_miss_and_not_stored_and_its_keys_come_back(cluster: LocalCluster) -> None:
    keys = [b"key-%d" % number for number in range(60)]
    with (
        fs3.connect(cluster.url, token=cluster.token) as fs,
        fs3.kvcache.open(fs, "/kv", timeout=TIMEOUT_S) as cache,
    ):
        wait_until(
            lambda: all(cache.put_batch(keys, [make(key, 1, 1000) for key in keys])), timeout_s=20, what="all stored"
        )
        victim = first_to_be_asked(cluster)
        cluster.kill(victim, signal.SIGSTOP)
        began = time.monotonic()
        found = cache.get_batch(keys)
        assert time.monotonic() - began < STALL_S
        assert 0 < sum(value is not None for value in found) < len(keys)
        missing = [key for key, value in zip(keys, found, strict=True) if value is None]
        with pytest.raises(OSError, match="no answer"):
            cache.remove(missing[0])

        def all_stored() -> bool:
            return all(cache.put_batch(missing, [make(key, 2, 1000) for key in missing]))

        wait_until(all_stored, timeout_s=30, what="the other nodes to keep its keys")
        versions = [version_of(key, value or b"") for key, value in zip(missing, cache.get_batch(missing), strict=True)]
        assert versions == [2] * len(missing)
        cluster.kill(victim, signal.SIGCONT)
        cluster.wait_serving()
        for key, value in zip(missing, cache.get_batch(missing), strict=True):
            assert value is None or version_of(key, value) == 2
