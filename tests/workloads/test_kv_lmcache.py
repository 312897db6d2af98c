"""LMCache on the KV cache; against `lmcache` where it can be imported, else against its restated interface."""

from __future__ import annotations

import asyncio
import os
import select
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fs3.testing.cluster import LocalCluster
from tests.workloads.interfaces.lmcache import INSTALLED
from tests.workloads.kv_options import fresh_options

# isort: split
if INSTALLED:  # its native module needs PyTorch's libraries, and so comes after them
    import lmcache  # noqa: F401
from lmcache.v1.distributed.api import ObjectKey
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from fs3.kvcache.connectors.lmcache import Fs3Connector, Fs3ConnectorAdapter, Fs3L2Adapter

CHUNK_TOKENS, LAYERS, HIDDEN = 16, 2, 64
SHAPE = torch.Size([2, LAYERS, CHUNK_TOKENS, HIDDEN])
WAIT_S = 10.0


class Chunk:
    """Memory of LMCache's, with what a connector uses of it."""

    def __init__(self, shape: torch.Size = SHAPE, dtype: torch.dtype = torch.bfloat16) -> None:
        self.raw_data = torch.zeros(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        self.meta = SimpleNamespace(shape=shape, dtype=dtype)
        self.references = 1

    @property
    def byte_array(self) -> memoryview:
        return memoryview(self.raw_data.numpy())

    def get_shapes(self) -> list[torch.Size]:
        return [self.meta.shape]

    def get_dtypes(self) -> list[torch.dtype]:
        return [self.meta.dtype]

    def get_memory_format(self) -> Any:
        return MemoryFormat.KV_2LTD

    def get_size(self) -> int:
        return len(self.raw_data)

    def ref_count_down(self) -> None:
        self.references -= 1


class Memory:
    """Makes chunks, and remembers them."""

    def __init__(self) -> None:
        self.made: list[Chunk] = []

    def allocate(self, shapes: list[torch.Size], dtypes: list[torch.dtype], layout: Any) -> Chunk:
        self.made.append(Chunk(shapes[0], dtypes[0]))
        return self.made[-1]


class Key:
    """A chunk's name, as LMCache writes it."""

    def __init__(self, number: int, dtype: str = "bfloat16") -> None:
        self.text = f"llama/tiny@2@0@{number:x}@{dtype}"

    def to_string(self) -> str:
        return self.text


def filled(number: int, tokens: int = CHUNK_TOKENS) -> Chunk:
    chunk = Chunk(torch.Size([2, LAYERS, tokens, HIDDEN]))
    chunk.raw_data.copy_(torch.randint(0, 256, chunk.raw_data.shape, generator=torch.Generator().manual_seed(number)))
    return chunk


def context(options: dict[str, Any], *, described: bool = True, **metadata: Any) -> Any:
    """What LMCache makes connectors from, for a plug-in of the name `fs3.tests`."""
    extra = {f"remote_storage_plugin.fs3.tests.{name}": value for name, value in options.items()}
    extra |= {"remote_storage_plugin.fs3.tests.class_name": "Fs3ConnectorAdapter", "save_chunk_meta": described}
    extra |= {"remote_storage_plugin.fs3.tests.module_path": "fs3.kvcache.connectors.lmcache"}
    given = {
        "model_name": "llama/tiny",
        "chunk_size": CHUNK_TOKENS,
        "use_mla": False,
        "get_shapes": lambda: [SHAPE],
        "get_dtypes": lambda: [torch.bfloat16],
        "get_num_groups": lambda: 1,
        **metadata,
    }
    return ConnectorContext(
        url="plugin://fs3.tests",
        loop=None,
        local_cpu_backend=Memory(),
        config=SimpleNamespace(
            extra_config=extra, use_layerwise=False, remote_serde="naive", remote_storage_plugins=["fs3.tests"]
        ),
        metadata=SimpleNamespace(**given),
        plugin_name="fs3.tests",
    )


@pytest.fixture
def options(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("FS3_TOKEN", shared_cluster.token)
    return fresh_options(shared_cluster)


def connect(where: Any) -> tuple[Fs3Connector, Memory]:
    """As LMCache does, from its configuration."""
    if not INSTALLED:
        return Fs3ConnectorAdapter().create_connector(where), where.local_cpu_backend
    from lmcache.v1.storage_backend.connector import CreateConnector

    given = (where.url, where.loop, where.local_cpu_backend, where.config, where.metadata, where.plugin_name)
    return CreateConnector(*given).getWrappedConnector(), where.local_cpu_backend


def test_the_classes_are_what_lmcache_loads() -> None:
    assert issubclass(Fs3ConnectorAdapter, ConnectorAdapter)
    assert issubclass(Fs3Connector, RemoteConnector)
    assert issubclass(Fs3L2Adapter, L2AdapterInterface)
    for made in (Fs3ConnectorAdapter, Fs3Connector, Fs3L2Adapter):
        assert not made.__abstractmethods__
    adapter = Fs3ConnectorAdapter()
    assert [adapter.can_parse(u) for u in ("plugin://fs3", "plugin://fs", "plugin://fs30", "redis://fs3")] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("described", [True, False])
def test_chunks_come_back_the_last_one_shorter(options: dict[str, Any], described: bool) -> None:
    async def work() -> None:
        connector, memory = connect(context(options, described=described))
        keys, chunks = [Key(1), Key(2), Key(3)], [filled(1), filled(2), filled(3, tokens=5)]
        await connector.put(keys[0], chunks[0])
        await connector.batched_put(keys[1:], chunks[1:])
        assert await connector.exists(keys[0])
        assert not await connector.exists(Key(4))
        assert not connector.exists_sync(Key(4))
        assert connector.batched_contains([*keys, Key(4)]) == 3
        assert await connector.batched_async_contains("lookup", [keys[0], Key(4), keys[1]]) == 1
        one = await connector.get(keys[0])
        found = await connector.batched_get([*keys, Key(4)])
        assert found[3] is None
        for chunk, original in zip([one, *found[:3]], [chunks[0], *chunks], strict=True):
            assert torch.equal(chunk.raw_data, original.raw_data)
            assert chunk.meta.shape == original.meta.shape
            assert chunk.references == 1
        # Memory that was not filled is released.
        assert sum(chunk.references for chunk in memory.made) == 4
        assert sorted(await connector.list()) == sorted(key.to_string() for key in keys)
        assert connector.remove_sync(keys[0])
        assert not connector.remove_sync(keys[0])
        assert await connector.get(keys[0]) is None
        assert await connector.ping() == 0
        await connector.close()

    asyncio.run(work())


def test_only_the_leading_chunks_are_kept_of_a_prefetch(options: dict[str, Any]) -> None:
    async def work() -> None:
        connector, memory = connect(context(options))
        await connector.batched_put([Key(1), Key(3)], [filled(1), filled(3)])
        found = await connector.batched_get_non_blocking("lookup", [Key(1), Key(2), Key(3)])
        assert [bytes(chunk.byte_array) for chunk in found] == [bytes(filled(1).byte_array)]
        assert sum(chunk.references for chunk in memory.made) == 1
        await connector.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    "changed",
    [
        {"chunk_size": 8, "get_shapes": lambda: [torch.Size([2, LAYERS, 8, HIDDEN])]},
        {"get_dtypes": lambda: [torch.float16]},
        {"use_mla": True},
        {"model_name": "llama/other"},
    ],
)
def test_chunks_of_another_form_never_match(options: dict[str, Any], changed: dict[str, Any]) -> None:
    async def work() -> None:
        connector, _ = connect(context(options))
        await connector.put(Key(1), filled(1))
        other, memory = connect(context(options, **changed))
        assert not await other.exists(Key(1))
        assert await other.get(Key(1)) is None
        assert await other.list() == []
        assert not memory.made
        await connector.close()
        await other.close()

    asyncio.run(work())


@pytest.mark.skipif(not INSTALLED, reason="LMCache is not installed; see make test-connectors")
def test_the_remote_backend_of_lmcache_itself_works_on_it(options: dict[str, Any]) -> None:
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_allocators.host_memory_allocator import HostMemoryAllocator
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
    from lmcache.v1.storage_backend.remote_backend import RemoteBackend

    where = {"module_path": "fs3.kvcache.connectors.lmcache", "class_name": "Fs3ConnectorAdapter", **options}
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=256,
        local_cpu=False,
        remote_serde="naive",
        remote_storage_plugins=["fs3"],
        extra_config={f"remote_storage_plugin.fs3.{name}": value for name, value in where.items()},
    )
    metadata = LMCacheMetadata("llama/tiny", 1, 1, 0, 0, torch.bfloat16, (4, 2, 256, 8, 64))
    memory = LocalCPUBackend(config, metadata, "cpu", memory_allocator=HostMemoryAllocator(64 << 20))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        backend = RemoteBackend(config, metadata, loop, memory, "cpu", plugin_name="fs3")
        keys = [CacheEngineKey("llama/tiny", 1, 0, number, torch.bfloat16) for number in range(4)]
        (shape,) = metadata.get_shapes()
        chunks = [memory.allocate([shape], [torch.bfloat16], MemoryFormat.KV_2LTD) for _ in keys[:3]]
        for chunk in chunks:
            chunk.tensor.copy_(torch.randn(shape))
        for key, chunk in zip(keys, chunks, strict=False):
            backend.submit_put_task(key, chunk).result(WAIT_S)
        assert backend.batched_contains(keys) == 3
        found = backend.batched_get_blocking(keys)
        assert [torch.equal(got.tensor, chunk.tensor) for got, chunk in zip(found, chunks, strict=False)] == [True] * 3
        assert found[3] is None
        assert backend.remove(keys[0])
        assert not backend.contains(keys[0])
        # LMCache counts references; what is not given back is leaked memory of its own.
        assert [chunk.get_ref_count() for chunk in (*chunks, *found[:3])] == [1] * 6
        for chunk in (*chunks, *found[:3]):
            chunk.ref_count_down()
        backend.close()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_bad_options_of_the_plugin_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"remote_storage_plugin\.fs3\.tests has the unknown option 'name'"):
        connect(context({**options, "name": "/kv"}))


# ---- the second tier


def tier(options: dict[str, Any]) -> Fs3L2Adapter:
    """As LMCache makes it from the description of an adapter."""
    if not INSTALLED:
        return Fs3L2Adapter(options)
    from lmcache.v1.distributed.l2_adapters.factory import create_l2_adapter_from_registry
    from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig

    where = {"module_path": "fs3.kvcache.connectors.lmcache", "class_name": "Fs3L2Adapter"}
    return create_l2_adapter_from_registry(PluginL2AdapterConfig.from_dict({**where, "adapter_params": options}))


@pytest.fixture
def adapter(options: dict[str, Any]) -> Iterator[Fs3L2Adapter]:
    made = tier(options)
    yield made
    made.close()


class Listener:
    """Notes what an adapter tells."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        self.told.append(("stored", sum(sizes)))

    def on_l2_keys_accessed(self, keys: list[Any]) -> None:
        self.told.append(("read", len(keys)))

    def on_l2_keys_deleted(self, keys: list[Any]) -> None:
        self.told.append(("deleted", len(keys)))


def signalled(event: int) -> None:
    """Wait until something has ended, as LMCache's controllers do."""
    poll = select.poll()
    poll.register(event, select.POLLIN)
    assert poll.poll(WAIT_S * 1000), "nothing ended"
    os.eventfd_read(event)


def objects(*numbers: int, salt: str = "") -> list[Any]:
    return [ObjectKey(bytes([n]) * 32, "llama/tiny", kv_rank=0x02000200, cache_salt=salt) for n in numbers]


def looked_up(adapter: Fs3L2Adapter, keys: list[Any]) -> list[bool]:
    task = adapter.submit_lookup_and_lock_task(keys, {})
    signalled(adapter.get_lookup_and_lock_event_fd())
    bits = adapter.query_lookup_and_lock_result(task)
    assert adapter.query_lookup_and_lock_result(task) is None
    adapter.submit_unlock(keys)
    return [bits.test(i) for i in range(len(keys))]


def store(adapter: Fs3L2Adapter, keys: list[Any], chunks: list[Chunk]) -> Any:
    task = adapter.submit_store_task(keys, chunks)
    signalled(adapter.get_store_event_fd())
    return adapter.pop_completed_store_tasks()[task]


def test_the_second_tier_stores_looks_up_and_loads(adapter: Fs3L2Adapter) -> None:
    listener = Listener()
    adapter.register_listener(listener)
    events = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(events) == 3
    result = store(adapter, objects(1, 2), [filled(1), filled(2)])
    assert result.is_successful()
    assert result.bytes_transferred() == 2 * filled(1).get_size()
    # What is there already is not sent again.
    assert store(adapter, objects(2, 3), [filled(2), filled(3)]).bytes_transferred() == filled(3).get_size()
    assert adapter.pop_completed_store_tasks() == {}
    assert looked_up(adapter, objects(1, 9, 3)) == [True, False, True]
    assert looked_up(adapter, objects(1, salt="tenant")) == [False]

    into = [Chunk(), Chunk(), Chunk(torch.Size([2, LAYERS, 2 * CHUNK_TOKENS, HIDDEN]))]
    task = adapter.submit_load_task(objects(3, 9, 1), into)
    signalled(adapter.get_load_event_fd())
    bits = adapter.query_load_result(task)
    # The third wants more bytes than were stored.
    assert [bits.test(i) for i in range(3)] == [True, False, False]
    assert torch.equal(into[0].raw_data, filled(3).raw_data)

    adapter.delete(objects(1, 9))
    assert looked_up(adapter, objects(1, 2)) == [False, True]
    size = filled(1).get_size()
    assert listener.told == [("stored", 2 * size), ("stored", size), ("read", 1), ("deleted", 1)]
    assert adapter.get_usage().total_bytes_used >= 2 * size
    assert adapter.report_status()["is_healthy"]


def test_the_form_of_the_second_tier_is_part_of_its_keys(adapter: Fs3L2Adapter, options: dict[str, Any]) -> None:
    store(adapter, objects(1), [filled(1)])
    other = tier({**options, "form": "fp8"})
    assert looked_up(other, objects(1)) == [False]
    other.close()
