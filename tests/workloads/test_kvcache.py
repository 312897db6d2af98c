"""The key-value cache on a real cluster."""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

import fs3
import fs3.kvcache
from fs3.kvcache import KVCache
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.conftest import QUICK
from tests.workloads.kv_values import make, version_of

MIB = 1 << 20
OpenCache = Callable[..., KVCache]


@pytest.fixture(scope="module")
def fs(shared_cluster: LocalCluster) -> Iterator[fs3.FileSystem]:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as connected:
        yield connected


@pytest.fixture
def cache(fs: fs3.FileSystem, request: pytest.FixtureRequest) -> Iterator[KVCache]:
    """A namespace for this test alone."""
    with fs3.kvcache.open(fs, f"/kv/{request.node.name}", timeout=10) as opened:
        yield opened


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 40_000, 100_001, MIB, MIB + 1, 5 * MIB + 17])
def test_a_value_of_any_size_is_found_as_it_was_put(cache: KVCache, size: int) -> None:
    value = os.urandom(size)
    assert cache.get("key") is None
    assert not cache.exists("key")
    assert cache.put("key", value)
    assert cache.exists(b"key")
    assert cache.get("key") == value
    buffer = bytearray(size + 10)
    assert cache.get_into("key", buffer, offset=3) == size
    assert buffer[3 : 3 + size] == value
    assert cache.put("key", b"another")
    assert cache.get("key") == b"another"
    assert cache.remove("key")
    assert not cache.remove("key")
    assert cache.get("key") is None


def test_batches_keep_the_order_of_their_keys(cache: KVCache) -> None:
    sizes = [10, 70_000, 300, MIB, 2 * MIB + 5, 33_000, 0] * 5
    keys = [f"batch-{number}" for number in range(len(sizes))]
    values = [os.urandom(size) for size in sizes]
    assert cache.put_batch(keys, values) == [True] * len(keys)
    mixed = [name for key in keys for name in (key, f"no-{key}")]
    expected = [found for value in values for found in (value, None)]
    assert cache.get_batch(mixed) == expected
    assert cache.exists_batch(mixed) == [found is not None for found in expected]
    assert cache.match_prefix([*keys, "none", keys[0]]) == len(keys)
    assert cache.match_prefix(["none", *keys]) == 0
    assert cache.get_batch([]) == []
    assert cache.put_batch([], []) == []
    assert cache.match_prefix([]) == 0


def test_a_long_prefix_is_matched_in_steps(cache: KVCache) -> None:
    keys = [f"page-{number}" for number in range(2500)]
    assert all(cache.put_batch(keys, [b"x"] * len(keys)))
    assert cache.match_prefix(keys) == 2500
    cache.remove(keys[1300])
    assert cache.match_prefix(keys) == 1300


def test_values_are_scattered_into_memory_of_the_caller(cache: KVCache) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(1000, dtype=torch.float32).reshape(10, 100).to(torch.bfloat16)
    array = np.arange(500, dtype=np.int64)
    assert cache.put_batch(["t", "a", "b"], [tensor, array, b"bytes"]) == [True, True, True]
    tensor_out, array_out, buffer = torch.zeros_like(tensor), np.zeros(600, np.int64), bytearray(b"." * 20)
    targets = [tensor_out, (array_out, 800, 4000), (buffer, 4, 5), (buffer, 10, None), bytearray(1)]
    found = cache.get_batch_into(["t", "a", "b", "b", "missing"], targets)
    assert found == [2000, 4000, 5, 5, None]
    assert torch.equal(tensor_out, tensor)
    assert np.array_equal(array_out[100:], array)
    assert not array_out[:100].any()
    assert buffer == b"....bytes.bytes....."
    with pytest.raises(ValueError, match="5 bytes, more than"):
        cache.get_into("b", bytearray(4))
    with pytest.raises(ValueError, match="not within the buffer"):
        cache.get_into("b", bytearray(4), offset=2, length=3)
    with pytest.raises(ValueError, match="read-only"):
        cache.get_into("b", b"12345")


def test_bad_keys_are_refused(cache: KVCache) -> None:
    for key in (b"", b"x" * 5000):
        with pytest.raises(OSError, match="a key has 1 to 4096 bytes"):
            cache.put(key, b"")
    with pytest.raises(ValueError, match="one for each"):
        cache.put_batch(["a"], [])


def test_another_client_finds_values_and_another_version_does_not(cache: KVCache, shared_cluster: LocalCluster) -> None:
    assert cache.put("key", b"value")
    url = f"{shared_cluster.url}?token_file={shared_cluster.token_file}"
    with fs3.kvcache.open(url, cache.path, create=False) as other:
        assert other.get("key") == b"value"
        assert other.put("key", b"newer")
    with fs3.kvcache.open(url, cache.path, version="float8-v2") as other:
        assert other.get("key") is None
        assert other.put("key", b"other format")
        assert [entry.key for entry in other.keys("")] == [b"key"]
    assert cache.get("key") == b"newer"


def test_threads_share_a_cache(cache: KVCache) -> None:
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for number in range(60):
                key = f"{thread}-{number}".encode()
                size = 100 + number * 3001
                assert cache.put(key, make(key, 1, size))
                assert version_of(key, cache.get(key) or b"") == 1
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_asyncio_has_the_same_methods(fs: fs3.FileSystem) -> None:
    async def work() -> None:
        async with await fs3.kvcache.open_async(fs, "/kv/asyncio", timeout=10) as cache:
            assert await cache.put("key", b"value")
            assert await cache.put_batch(["a", "b"], [b"1", b"2"]) == [True, True]
            assert await asyncio.gather(*(cache.get(key) for key in ("key", "a", "b", "c"))) == [
                b"value",
                b"1",
                b"2",
                None,
            ]
            buffer = bytearray(5)
            assert await cache.get_into("key", buffer) == 5
            assert buffer == b"value"
            assert await cache.get_batch_into(["a", "c"], [(buffer, 0, 1), bytearray(1)]) == [1, None]
            assert await cache.get_batch(["a", "c"]) == [b"1", None]
            assert await cache.exists("a")
            assert await cache.exists_batch(["b", "c"]) == [True, False]
            assert await cache.match_prefix(["a", "b", "c"]) == 2
            assert sorted([entry.key async for entry in cache.keys("")]) == [b"a", b"b", b"key"]
            assert await cache.remove("a")
            assert not await cache.remove("a")
            assert (await cache.stats()).entries == 2
            await cache.configure(ttl=100)
            assert (await cache.evict()).entries == 2
            copy = pickle.loads(pickle.dumps(cache))
            assert await copy.get("key") is None
            await copy.close()
            with pytest.raises(ValueError, match="closed"):
                await copy.get("key")

    asyncio.run(work())


def test_a_pickled_copy_and_a_forked_child_connect_by_themselves(cache: KVCache) -> None:
    assert cache.put("key", b"value")
    with pickle.loads(pickle.dumps(cache)) as copy:
        assert copy.get("key") == b"value"
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if cache.get("key") == b"value" and cache.put("child", b"1") else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert cache.get("child") == b"1"


def test_the_settings_of_a_namespace_hold_for_everybody(fs: fs3.FileSystem) -> None:
    path = "/kv/settings"
    with pytest.raises(FileNotFoundError):
        fs3.kvcache.open(fs, path, create=False)
    fs.makedirs(path)
    with pytest.raises(FileNotFoundError, match="no namespace"):
        fs3.kvcache.open(fs, path, create=False)
    with fs3.kvcache.open(fs, path, capacity=64 * MIB, ttl=1000, replicas=2, timeout=10) as first:
        assert first.put("key", b"value")
        with fs3.kvcache.open(fs, path, capacity=64 * MIB) as second:
            assert second.namespace.replicas == 2
        with pytest.raises(OSError, match=r"capacity 1 \(it has 67108864\)"):
            fs3.kvcache.open(fs, path, capacity=1)
        second = fs3.kvcache.open(fs, path)
        second.configure(ttl=0.05)
        assert first.stats().ttl == 1000
        assert second.stats().ttl == 0.05
        wait_until(lambda: first.get("key") is None, timeout_s=10, what="the end of the entry's time")
        # A handle that knows older settings does not bring them back.
        assert first.put("key", b"value")
        wait_until(lambda: first.stats().entries == 0, timeout_s=10, what="the sweep")
        assert first.stats().expired == 4
    for wrong in ({"capacity": 0}, {"ttl": 0}, {"replicas": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fs3.kvcache.open(fs, path, **wrong)  # type: ignore[arg-type]
    fs.open("/kv/file", "w").close()
    with pytest.raises(NotADirectoryError):
        fs3.kvcache.open(fs, "/kv/file")
    assert path in list(fs3.kvcache.namespaces(fs))


def test_permissions_of_the_directory_say_who_may_do_what(cache: KVCache, shared_cluster: LocalCluster) -> None:
    url, token = shared_cluster.url, shared_cluster.token
    assert cache.put("key", b"secret")
    with fs3.connect(url, token=token) as root:
        for mode, reads, writes in ((0o700, False, False), (0o755, True, False), (0o777, True, True)):
            root.chmod(cache.path, mode)
            with fs3.connect(url, token=token, uid=4242, gid=4242, groups=()) as user:
                if not reads:
                    with pytest.raises(PermissionError) as denied:
                        fs3.kvcache.open(user, cache.path)
                    assert denied.value.filename == cache.path
                    continue
                opened = fs3.kvcache.open(user, cache.path)
                assert opened.get("key") == b"secret"
                if writes:
                    assert opened.put("mine", b"1")
                    assert opened.remove("mine")
                    continue
                for change in (lambda o: o.put("k", b""), lambda o: o.remove("k"), lambda o: o.evict()):
                    with pytest.raises(PermissionError):
                        change(opened)
                with pytest.raises(PermissionError):
                    opened.configure(ttl=5)


def test_counters_tell_what_happened(cache: KVCache) -> None:
    keys = [f"k{number}" for number in range(10)]
    cache.put_batch(keys, [b"x" * 100] * 10)
    cache.get_batch([*keys, "none"])
    stats = cache.stats()
    assert (stats.entries, stats.bytes, stats.puts, stats.hits, stats.misses) == (10, 1000, 10, 10, 1)
    assert (stats.client.hits, stats.client.misses, stats.client.stored, stats.nodes_silent) == (10, 1, 10, 0)
    assert 0 < stats.client.get_p50_s <= stats.client.get_p99_s
    assert stats.hit_rate == pytest.approx(10 / 11)
    listed = list(cache.keys("k"))
    assert sorted(entry.key.decode() for entry in listed) == keys
    assert not list(cache.keys("other"))
    assert all(entry.bytes == 100 and 0 <= entry.idle_s <= entry.age_s < 60 for entry in listed)
    assert cache.evict(bytes=300).entries >= 3
    left = cache.stats()
    assert left.bytes <= 700
    assert left.evicted == left.evicted_asked == 10 - left.entries
    cache.evict()
    assert cache.stats().entries == 0
    assert not cache.exists_batch(keys)[0]


def test_a_working_set_twice_the_capacity_gives_right_values_and_half_the_hits(fs: fs3.FileSystem) -> None:
    size, capacity = 50_000, 12 * MIB
    count = 2 * capacity // size
    rng = np.random.default_rng(7)
    with fs3.kvcache.open(fs, "/kv/pressure", capacity=capacity, chunk_bytes=64 << 10, timeout=10) as cache:
        for batch in np.array_split(rng.integers(0, count, 6 * count), 200):
            keys = [b"page-%d" % number for number in batch]
            found = cache.get_batch(keys)
            for key, value in zip(keys, found, strict=True):
                assert value is None or version_of(key, value) == 1
            missing = [key for key, value in zip(keys, found, strict=True) if value is None]
            assert all(cache.put_batch(missing, [make(key, 1, size) for key in missing]))
        stats = cache.stats()
        assert stats.bytes <= capacity
        assert stats.bytes > 0.85 * capacity
        assert stats.evicted_capacity > 0
        assert stats.evicted_memory == 0
        # Of the gets some are the first of their key.
        assert 0.35 < stats.hit_rate < 0.5


def test_a_value_of_which_a_piece_was_evicted_is_a_miss(fs: fs3.FileSystem) -> None:
    with fs3.kvcache.open(fs, "/kv/pieces", capacity=2 * MIB, chunk_bytes=64 << 10, timeout=10) as cache:
        keys = [b"large-%d" % number for number in range(12)]
        for key in keys:
            cache.put(key, make(key, 1, 400_000))
        for key, value in zip(keys, cache.get_batch(keys), strict=True):
            assert value is None or version_of(key, value) == 1
        assert cache.stats().evicted_capacity > 0
        assert cache.get(keys[0]) is None
        assert cache.get(keys[-1]) is not None


def test_the_memory_of_a_node_is_bounded(make_cluster: Callable[..., LocalCluster]) -> None:
    spec = replace(QUICK, storage=1, replicas=1, kv_memory_bytes=32 * MIB)
    cluster = make_cluster(spec)
    with fs3.connect(cluster.url, token=cluster.token) as fs, fs3.kvcache.open(fs, "/kv", timeout=10) as cache:
        for round_number in range(3):
            for size in (700, 5000, 40_000, 300_000, MIB):
                keys = [b"%d-%d-%d" % (round_number, size, number) for number in range(40 * MIB // size // 4)]
                assert all(cache.put_batch(keys, [make(key, 1, size) for key in keys]))
                last = keys[-8:]
                for key, value in zip(last, cache.get_batch(last), strict=True):
                    assert value is not None
                    assert version_of(key, value) == 1
        stats = cache.stats()
        assert stats.bytes < 32 * MIB
        assert stats.evicted_memory > 100
