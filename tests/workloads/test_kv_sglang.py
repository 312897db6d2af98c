"""SGLang's HiCache on the KV cache; against `sglang` where it can be imported, else against its restated interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fs3.testing.cluster import LocalCluster
from tests.workloads.interfaces.sglang import INSTALLED
from tests.workloads.kv_options import fresh_options

# isort: split
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
)

from fs3.kvcache.connectors.sglang import COPIED_PAGES_MAX, Fs3HiCache

PAGE_TOKENS, PAGES, LAYERS, HEADS, HEAD_DIM = 4, 40, 3, 2, 8
CONFIG = HiCacheStorageConfig(
    tp_rank=0,
    tp_size=2,
    pp_rank=0,
    pp_size=1,
    attn_cp_rank=0,
    attn_cp_size=1,
    is_mla_model=False,
    enable_storage_metrics=False,
    is_page_first_layout=True,
    model_name="llama/tiny",
)

EXTRA = {
    "backend_name": "fs3",
    "module_path": "fs3.kvcache.connectors.sglang",
    "class_name": "Fs3HiCache",
    "interface_v1": 1,
}


class MhaPool:
    """Host memory of a model with heads: K and V of each page, as SGLang's pools lay them out and describe them."""

    def __init__(self, layout: str = "page_first", dtype: torch.dtype = torch.bfloat16) -> None:
        self.layout, self.dtype, self.page_size = layout, dtype, PAGE_TOKENS
        tokens = PAGES * PAGE_TOKENS
        order = (tokens, LAYERS) if layout == "page_first" else (LAYERS, tokens)
        self.kv_buffer = torch.randn(2, *order, HEADS, HEAD_DIM).to(dtype)
        self.v_buffer = self.kv_buffer[1]

    def _page(self, index: int) -> torch.Tensor:
        tokens = slice(index, index + PAGE_TOKENS)
        return self.kv_buffer[:, tokens] if self.layout == "page_first" else self.kv_buffer[:, :, tokens]

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self._page(index).flatten() if flat else self._page(index)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self._page(0)).flatten()

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self._page(index).copy_(data_page.reshape(self._page(index).shape))

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        assert self.layout == "page_first"
        token_bytes = LAYERS * HEADS * HEAD_DIM * self.dtype.itemsize
        v_offset = self.kv_buffer[0].numel() * self.dtype.itemsize
        firsts = indices.tolist()[::PAGE_TOKENS]
        addresses = [
            self.kv_buffer.data_ptr() + first * token_bytes + part for first in firsts for part in (0, v_offset)
        ]
        return addresses, [PAGE_TOKENS * token_bytes] * len(addresses)


class MlaPool:
    """Host memory of a model with latent attention: one piece for each page."""

    def __init__(self) -> None:
        self.layout, self.dtype, self.page_size = "page_first", torch.bfloat16, PAGE_TOKENS
        self.kv_buffer = torch.randn(PAGES * PAGE_TOKENS, LAYERS, 1, HEAD_DIM).to(self.dtype)

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        token_bytes = LAYERS * HEAD_DIM * self.dtype.itemsize
        addresses = [self.kv_buffer.data_ptr() + first * token_bytes for first in indices.tolist()[::PAGE_TOKENS]]
        return addresses, [PAGE_TOKENS * token_bytes] * len(addresses)


def at(*pages: int) -> torch.Tensor:
    """Indices of the tokens of pages."""
    return torch.tensor([page * PAGE_TOKENS + token for page in pages for token in range(PAGE_TOKENS)])


def hashes(count: int, sequence: str = "s") -> list[str]:
    return [f"{sequence}{page:063x}" for page in range(count)]


def load(config: Any, pool: Any) -> Fs3HiCache:
    """As SGLang does."""
    if not INSTALLED:
        return Fs3HiCache(config, {})
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    made = StorageBackendFactory.create_backend("dynamic", config, pool)
    assert isinstance(made, Fs3HiCache)
    return made


Make = Callable[..., Fs3HiCache]


@pytest.fixture
def make(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Back ends of one namespace, each with a pool of its own; made as SGLang makes them."""
    monkeypatch.setenv("FS3_TOKEN", shared_cluster.token)
    options, made = fresh_options(shared_cluster), []

    def backend(pool: Any, **changed: Any) -> Fs3HiCache:
        made.append(load(dataclasses.replace(CONFIG, extra_config={**EXTRA, "fs3": options}, **changed), pool))
        made[-1].register_mem_pool_host(pool)
        return made[-1]

    yield backend
    for one in made:
        one.close()


def test_the_class_is_what_sglang_loads() -> None:
    assert issubclass(Fs3HiCache, HiCacheStorage)
    assert not Fs3HiCache.__abstractmethods__
    if INSTALLED:
        for name in ("batch_exists", "batch_get_v1", "batch_set_v1", "batch_exists_v2", "batch_get_v2", "batch_set_v2"):
            theirs, ours = getattr(HiCacheStorage, name).__code__, getattr(Fs3HiCache, name).__code__
            assert ours.co_varnames[: ours.co_argcount] == theirs.co_varnames[: theirs.co_argcount]


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_pages_come_back_in_another_process_memory(make: Make, layout: str) -> None:
    written, read = MhaPool(layout), MhaPool(layout)
    keys = hashes(COPIED_PAGES_MAX + 3)
    pages = list(range(len(keys)))
    assert make(written).batch_set_v1(keys, at(*pages)) == [True] * len(keys)
    reader = make(read)
    assert reader.batch_exists(keys) == len(keys)
    # To other places than they came from, in any order.
    places = [PAGES - 1 - page for page in pages]
    assert reader.batch_get_v1(keys, at(*places)) == [True] * len(keys)
    for page, place in zip(pages, places, strict=True):
        assert torch.equal(read.get_data_page(place * PAGE_TOKENS), written.get_data_page(page * PAGE_TOKENS))


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_a_page_that_is_missing_ends_the_prefix_and_leaves_its_neighbours(make: Make, layout: str) -> None:
    pool = MhaPool(layout)
    backend = make(pool)
    keys = hashes(5)
    backend.batch_set_v1([*keys[:2], *keys[3:]], at(0, 1, 3, 4))
    before = pool.kv_buffer.clone()
    assert backend.batch_exists(keys) == 2
    assert backend.batch_get_v1(keys, at(10, 11, 12, 13, 14)) == [True, True, False, True, True]
    assert torch.equal(
        pool.get_data_page(at(14)[0]),
        before[:, 16:20].flatten() if layout == "page_first" else before[:, :, 16:20].flatten(),
    )


def test_a_page_without_its_v_is_not_there(make: Make) -> None:
    backend = make(MhaPool())
    keys = hashes(2)
    backend.batch_set_v1(keys, at(0, 1))
    # The V of the first page.
    assert backend._cache.remove(backend._main.keys(keys)[1])
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, at(5, 6)) == [False, True]
    # Stored again, only what is missing is sent.
    assert backend.batch_set_v1(keys, at(0, 1)) == [True, True]
    assert backend.batch_exists(keys) == 2


@pytest.mark.parametrize(
    ("pool", "changed"),
    [
        (MhaPool(), {"tp_rank": 1}),
        (MhaPool(), {"tp_size": 4}),
        (MhaPool(), {"pp_rank": 1, "pp_size": 2}),
        (MhaPool(), {"attn_cp_rank": 1, "attn_cp_size": 2}),
        (MhaPool(), {"model_name": "llama/other"}),
        (MhaPool(dtype=torch.float16), {}),
        (MhaPool("layer_first"), {}),
        (MlaPool(), {}),
    ],
)
def test_pages_of_another_form_never_match(make: Make, pool: Any, changed: dict[str, Any]) -> None:
    make(MhaPool()).batch_set_v1(hashes(1), at(0))
    assert make(MhaPool()).batch_exists(hashes(1)) == 1
    other = make(pool, **changed)
    assert other.batch_exists(hashes(1)) == 0
    assert other.batch_get_v1(hashes(1), at(0)) == [False]


def test_ranks_share_the_pages_of_latent_attention(make: Make) -> None:
    written, read = MlaPool(), MlaPool()
    make(written, is_mla_model=True).batch_set_v1(hashes(3), at(0, 1, 2))
    reader = make(read, is_mla_model=True, tp_rank=1)
    assert reader.batch_get_v1(hashes(3), at(0, 1, 2)) == [True] * 3
    assert torch.equal(read.kv_buffer[: 3 * PAGE_TOKENS], written.kv_buffer[: 3 * PAGE_TOKENS])


def test_a_prefix_needs_all_pages_of_one_pool_and_the_last_of_another(make: Make) -> None:
    kv, state, index = MhaPool(), MlaPool(), MhaPool("layer_first")
    backend = make(kv)
    backend.register_mem_host_pool_v2(state, PoolName.MAMBA)
    backend.register_mem_host_pool_v2(index, PoolName.INDEXER)
    keys = hashes(6)
    backend.batch_set_v1(keys[:5], at(*range(5)))
    stored = backend.batch_set_v2(
        [
            PoolTransfer(PoolName.MAMBA, host_indices=at(0, 1), keys=[keys[1], keys[3]]),
            PoolTransfer(PoolName.INDEXER, host_indices=at(*range(6)), keys=keys),
        ]
    )
    assert stored == {PoolName.MAMBA: [True, True], PoolName.INDEXER: [True] * 6}
    wanted = [
        PoolTransfer(PoolName.MAMBA, keys=keys[:1], hit_policy=PoolHitPolicy.TRAILING_PAGES),
        PoolTransfer(PoolName.INDEXER),
    ]
    found = backend.batch_exists_v2(keys, wanted)
    # A state was kept after the second and the fourth page.
    assert found.kv_hit_pages == 4
    assert found.restorable_prefix_pages == [2, 4]
    assert found.extra_pool_hit_pages == {PoolName.KV: 5, PoolName.MAMBA: 4, PoolName.INDEXER: 5}

    expected = state.kv_buffer[PAGE_TOKENS : 2 * PAGE_TOKENS].clone()
    loaded = backend.batch_get_v2(
        [
            PoolTransfer(PoolName.MAMBA, host_indices=at(8), keys=[keys[3]]),
            PoolTransfer(PoolName.INDEXER, host_indices=at(9), keys=["absent"]),
        ]
    )
    assert loaded == {PoolName.MAMBA: [True], PoolName.INDEXER: [False]}
    assert torch.equal(state.kv_buffer[8 * PAGE_TOKENS : 9 * PAGE_TOKENS], expected)
    with pytest.raises(ValueError, match="draft"):
        backend.batch_get_v2([PoolTransfer(PoolName.DRAFT, host_indices=at(0), keys=keys[:1])])


@pytest.mark.parametrize("layout", ["page_first", "layer_first"])
def test_flat_pages_and_pages_in_place_are_the_same(make: Make, layout: str) -> None:
    pool = MhaPool(layout)
    backend = make(pool)
    keys = hashes(3)
    assert backend.batch_set(keys[:2], [pool.get_data_page(0), pool.get_data_page(PAGE_TOKENS)])
    assert backend.set(keys[2], pool.get_data_page(2 * PAGE_TOKENS))
    assert backend.exists(keys[2])
    assert not backend.exists("absent")
    assert backend.batch_get_v1(keys, at(7, 8, 9)) == [True] * 3
    for page in range(3):
        assert torch.equal(pool.get_data_page((7 + page) * PAGE_TOKENS), pool.get_data_page(page * PAGE_TOKENS))
    target = pool.get_dummy_flat_data_page()
    assert backend.get(keys[1], target) is target
    assert torch.equal(target, pool.get_data_page(PAGE_TOKENS))
    first, absent = backend.batch_get([keys[0], "absent"])
    assert torch.equal(first, pool.get_data_page(0))
    assert absent is None


def test_clearing_leaves_the_pages_of_others(make: Make) -> None:
    one, other = make(MhaPool()), make(MhaPool(), model_name="llama/other")
    for backend in (one, other):
        backend.batch_set_v1(hashes(2), at(0, 1))
    assert one.clear()
    assert (one.batch_exists(hashes(2)), other.batch_exists(hashes(2))) == (0, 2)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (None, '"fs3"'),
        ({"url": "fs3://x:1"}, '"fs3"'),
        ({"fs3": {"namespace": "/kv", "capactiy": 1}}, "'capactiy'; there are url, namespace"),
        ({"fs3": {"namespace": "/kv", "replicas": "2"}}, "replicas is '2', which is no int"),
        ({"fs3": {"namespace": "/kv", "timeout": True}}, "timeout is True"),
        ({"fs3": {"namespace": "kv"}}, "for example /kv/prod"),
        ({"fs3": {"namespace": "/kv", "capacity": "much"}}, "64MiB"),
    ],
)
def test_bad_options_are_refused_with_what_to_do(extra: dict[str, Any] | None, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        Fs3HiCache(dataclasses.replace(CONFIG, extra_config=extra), {})
