"""SGLang: the storage of HiCache (`--hicache-storage-backend dynamic`), pages straight between host pool and cache.

The interface is SGLang's `HiCacheStorage` (0.5.23). Where the host pool keeps a page in one piece for each of K and V
(the page-first layouts) bytes move without a copy, and each piece is an entry; in other layouts a page is copied once,
and is one entry. Pages that are stored already are not sent again: a page's hash names its content.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from fs3.kvcache.connectors.common import key_prefix, memory_at, open_cache

# Layouts of a host pool in which each part of a page is one piece of memory.
IN_PLACE_LAYOUTS = ("page_first", "page_first_direct", "page_head")
# Pages that are copied at a time, where pages are copied: what it costs in memory.
COPIED_PAGES_MAX = 16
# Changes when values of the same form would mean something else.
FORMAT = 1


class Fs3HiCache(HiCacheStorage):  # type: ignore[misc]
    """HiCache's storage in a namespace of the KV cache; safe to use from several threads.

    The options are those of :func:`fs3.kvcache.connectors.common.open_cache`, under `"fs3"` in SGLang's extra config.
    Every rank opens the namespace by itself. With `"interface_v1": 1` in the extra config pages move in place.
    """

    def __init__(self, storage_config: HiCacheStorageConfig, kwargs: Mapping[str, Any] | None = None) -> None:
        options = (storage_config.extra_config or {}).get("fs3")
        if not isinstance(options, Mapping):
            raise ValueError('HiCache\'s extra config needs "fs3": {"url": "fs3://...", "namespace": "/..."}')
        self._config = storage_config
        self._pools: dict[str, _Pool] = {}
        self._cache = open_cache(options, '"fs3" of HiCache\'s extra config')

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Take the pool of the KV pages themselves."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools[PoolName.KV.value] = _Pool(PoolName.KV.value, mem_pool_host, self._config)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take another pool whose pages are kept."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._pools[_name(host_pool_name)] = _Pool(_name(host_pool_name), host_pool, self._config)

    # ---- pages of the KV pool

    def batch_exists(self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None) -> int:
        """How many pages from the first on are whole."""
        return _leading(self._present([(self._main, keys)])[0])

    def batch_get_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Fill the pages at `host_indices`; which are filled. What a page that is not holds then is undefined."""
        return self._load([(self._main, keys, host_indices)])[0]

    def batch_set_v1(
        self, keys: list[str], host_indices: torch.Tensor, extra_info: HiCacheStorageExtraInfo | None = None
    ) -> list[bool]:
        """Store the pages at `host_indices`; which are stored."""
        return self._store([(self._main, keys, host_indices)])[0]

    # ---- pages of several pools

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """The longest prefix of `keys` that every pool can serve, and all other prefixes that can be served, too."""
        transfers = pool_transfers or []
        main, *others = self._present([(self._main, keys), *((self._pool(t.name), keys) for t in transfers)])
        pages = _leading(main)
        hits: dict[Any, int] = {PoolName.KV: pages} if pages else {}
        servable = set(range(1, pages + 1))
        for transfer, there in zip(transfers, others, strict=True):
            of_pool = _servable(transfer, there[:pages])
            if of_pool:
                hits[transfer.name] = max(of_pool)
            servable &= of_pool
        return PoolTransferResult(max(servable, default=0), hits, sorted(servable))

    def batch_get_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """As :meth:`batch_get_v1`, for each pool."""
        found = self._load([(self._pool(t.name), t.keys or [], t.host_indices) for t in transfers])
        return {t.name: pages for t, pages in zip(transfers, found, strict=True)}

    def batch_set_v2(
        self, transfers: list[PoolTransfer], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> dict[str, list[bool]]:
        """As :meth:`batch_set_v1`, for each pool."""
        stored = self._store([(self._pool(t.name), t.keys or [], t.host_indices) for t in transfers])
        return {t.name: pages for t, pages in zip(transfers, stored, strict=True)}

    # ---- flat pages: what SGLang uses without `interface_v1`

    def get(
        self, key: str, target_location: torch.Tensor | None = None, target_sizes: Any | None = None
    ) -> torch.Tensor | None:
        """The page, in `target_location` where one is given; None when it is not there."""
        return self.batch_get([key], None if target_location is None else [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Sequence[torch.Tensor] | None = None, target_sizes: Any | None = None
    ) -> list[torch.Tensor | None]:
        """The pages, in `target_locations` where they are given; None for each that is not there."""
        pool = self._main
        pages = list(target_locations or (pool.host.get_dummy_flat_data_page() for _ in keys))
        found = self._get(pool.keys(keys), [piece for page in pages for piece in pool.split(page)])
        whole = pool.whole(found, len(keys))
        return [page if there else None for page, there in zip(pages, whole, strict=True)]

    def set(
        self, key: str, value: Any | None = None, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> bool:
        """Store the flat page `value`; whether it is stored."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[Any] | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Store flat pages; whether all are stored."""
        pool = self._main
        pieces = [piece for page in values or () for piece in pool.split(page.contiguous())]
        return all(self._put(pool.keys(keys), pieces))

    def exists(self, key: str) -> bool:
        """Whether the page is there."""
        return self.batch_exists([key]) == 1

    # ---- the rest

    def clear(self) -> bool:
        """Remove all pages of this rank's form; what others keep in the namespace stays."""
        for pool in self._pools.values():
            for entry in self._cache.keys(pool.prefix):
                self._cache.remove(entry.key)
        return True

    def close(self) -> None:
        """End the connection; the pages stay."""
        self._cache.close()

    @property
    def _main(self) -> _Pool:
        return self._pool(PoolName.KV)

    def _pool(self, name: Any) -> _Pool:
        pool = self._pools.get(_name(name))
        if pool is None:
            raise ValueError(f"the host pool {_name(name)!r} was not registered; there are {sorted(self._pools)}")
        return pool

    def _present(self, wanted: Sequence[tuple[_Pool, Sequence[str]]]) -> list[list[bool]]:
        """Which pages of each pool are whole: one question for all of them."""
        found = iter(self._cache.exists_batch([key for pool, keys in wanted for key in pool.keys(keys)]))
        return [pool.whole(islice(found, pool.entries(keys)), len(keys)) for pool, keys in wanted]

    def _load(self, wanted: Sequence[tuple[_Pool, Sequence[str], Any]]) -> list[list[bool]]:
        """Fill pages of pools; those in place in one request for all pools."""
        in_place = [(pool, keys, indices) for pool, keys, indices in wanted if pool.in_place]
        found = iter(
            self._get(
                [key for pool, keys, _ in in_place for key in pool.keys(keys)],
                [piece for pool, keys, indices in in_place for piece in pool.pieces(len(keys), indices)],
            )
        )
        return [
            pool.whole(islice(found, pool.entries(keys)), len(keys)) if pool.in_place else self._copy_in(pool, keys, at)
            for pool, keys, at in wanted
        ]

    def _copy_in(self, pool: _Pool, keys: Sequence[str], indices: Any) -> list[bool]:
        if pool.logical:
            return [True] * len(keys)
        firsts = pool.firsts(len(keys), indices)
        filled: list[bool] = []
        with pool.copying:
            for start in range(0, len(keys), COPIED_PAGES_MAX):
                part = keys[start : start + COPIED_PAGES_MAX]
                pages = pool.scratch(len(part))
                found = self._get(pool.keys(part), pages)
                for first, page, there in zip(firsts[start:], pages, found, strict=False):
                    if there:
                        pool.host.set_from_flat_data_page(first, page)
                filled += found
        return filled

    def _store(self, wanted: Sequence[tuple[_Pool, Sequence[str], Any]]) -> list[list[bool]]:
        stored = []
        for pool, keys, indices in wanted:
            if pool.logical:
                stored.append([True] * len(keys))
            elif pool.in_place:
                done = self._put(pool.keys(keys), list(pool.pieces(len(keys), indices)))
                stored.append(pool.whole(done, len(keys)))
            else:
                stored.append(self._copy_out(pool, keys, indices))
        return stored

    def _copy_out(self, pool: _Pool, keys: Sequence[str], indices: Any) -> list[bool]:
        firsts = pool.firsts(len(keys), indices)
        stored: list[bool] = []
        for start in range(0, len(keys), COPIED_PAGES_MAX):
            part = keys[start : start + COPIED_PAGES_MAX]
            there = self._cache.exists_batch(pool.keys(part))
            absent = [i for i, known in enumerate(there) if not known]
            pages = [pool.host.get_data_page(firsts[start + i], flat=True).contiguous() for i in absent]
            for i, done in zip(absent, self._cache.put_batch(pool.keys([part[i] for i in absent]), pages), strict=True):
                there[i] = done
            stored += there
        return stored

    def _get(self, keys: list[bytes], targets: Sequence[Any]) -> list[bool]:
        """Which values are there and fill their targets: one of another length is none of ours."""
        if not keys:
            return []
        found = self._cache.get_batch_into(keys, list(targets))
        return [got == _length(target) for got, target in zip(found, targets, strict=True)]

    def _put(self, keys: list[bytes], values: Sequence[Any]) -> list[bool]:
        """Store what is not there yet; which are there then."""
        there = self._cache.exists_batch(keys)
        absent = [i for i, known in enumerate(there) if not known]
        if absent:
            stored = self._cache.put_batch([keys[i] for i in absent], [values[i] for i in absent])
            for i, done in zip(absent, stored, strict=True):
                there[i] = done
        return there


class _Pool:
    """A host pool: the keys of its pages, and where the pieces of a page are."""

    def __init__(self, name: str, host: Any, config: HiCacheStorageConfig) -> None:
        self.host = host
        # A pool without memory stands for its pages only: others of the same model carry the bytes.
        self.logical = name == PoolName.KV.value and getattr(host, "kv_buffer", True) is None
        self.page_tokens: int = getattr(host, "page_size", 1) or 1
        self.sizes = () if self.logical else _piece_sizes(host, self.page_tokens)
        self.in_place = len(self.sizes) > 0
        self.copying = threading.Lock()
        self._scratch: list[torch.Tensor] = []
        form = {
            "format": FORMAT,
            "pool": name,
            "kind": type(host).__name__,
            "layout": getattr(host, "layout", None),
            "page_tokens": self.page_tokens,
            "logical_page_tokens": config.logical_page_size,
            "dtype": getattr(host, "dtype", None),
            "sizes": self.sizes or (_length(host.get_dummy_flat_data_page()) if not self.logical else None),
            **_ranks(name, host, config),
        }
        self.prefix = key_prefix("sglang", config.model_name, form)

    def entries(self, keys: Sequence[str]) -> int:
        """Entries that the pages `keys` have together."""
        return 0 if self.logical else len(keys) * max(1, len(self.sizes))

    def keys(self, pages: Iterable[str]) -> list[bytes]:
        """The keys of the pages' entries, page by page."""
        if self.logical:
            return []
        parts = [b"/%d" % i for i in range(len(self.sizes))] or [b""]
        return [self.prefix + page.encode() + part for page in pages for part in parts]

    def whole(self, entries: Iterable[bool], pages: int) -> list[bool]:
        """Which pages have all their entries."""
        if self.logical:
            return [True] * pages
        found = iter(entries)
        return [all(list(islice(found, max(1, len(self.sizes))))) for _ in range(pages)]

    def firsts(self, pages: int, indices: Any) -> list[int]:
        """The index of each page's first token in the pool."""
        if indices is None or len(indices) != pages * self.page_tokens:
            count = "no" if indices is None else len(indices)
            raise ValueError(f"{count} indices for {pages} pages of {self.page_tokens} tokens")
        firsts: list[int] = indices[:: self.page_tokens].tolist()
        return firsts

    def pieces(self, pages: int, indices: Any) -> Iterator[memoryview]:
        """The memory of the pages' pieces, page by page."""
        self.firsts(pages, indices)
        addresses, sizes = self.host.get_page_buffer_meta(indices)
        if tuple(sizes) != self.sizes * pages:
            raise ValueError("the host pool's pages have changed their form since it was registered")
        return (memory_at(address, size) for address, size in zip(addresses, sizes, strict=True))

    def split(self, page: Any) -> list[memoryview]:
        """The pieces of a flat page: its entries are the same as of a page in place."""
        whole = memory_at(page.data_ptr(), _length(page))
        sizes = self.sizes or (len(whole),)
        if sum(sizes) != len(whole):
            raise ValueError(f"a page has {sum(sizes)} bytes, not {len(whole)}")
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def scratch(self, pages: int) -> list[torch.Tensor]:
        """Flat pages to read into, kept for the next time; `copying` is held."""
        while len(self._scratch) < pages:
            self._scratch.append(self.host.get_dummy_flat_data_page())
        return self._scratch[:pages]


def _name(pool: Any) -> str:
    return str(getattr(pool, "value", pool))


def _length(memory: Any) -> int:
    if isinstance(memory, memoryview):
        return memory.nbytes
    return int(memory.numel()) * int(memory.element_size())


def _piece_sizes(host: Any, page_tokens: int) -> tuple[int, ...]:
    """Bytes of each piece of a page, of a pool whose pages can be used where they are; else nothing."""
    if getattr(host, "layout", None) not in IN_PLACE_LAYOUTS:
        return ()
    try:
        found = host.get_page_buffer_meta(torch.zeros(page_tokens, dtype=torch.int64))
    except (NotImplementedError, ValueError):
        return ()
    return tuple(found[1]) if found else ()


def _ranks(name: str, host: Any, config: HiCacheStorageConfig) -> dict[str, Any]:
    """Whose the values are.

    Ranks of a tensor-parallel group have the same MLA pages, so they share them; state-space pools and pools with a
    K and a V, heads divided among ranks, are each rank's own.
    """
    ranks = {
        "pp": (config.pp_rank, config.pp_size),
        "cp": (config.attn_cp_rank, config.attn_cp_size),
        "dcp": (getattr(config, "dcp_rank", 0), getattr(config, "dcp_size", 1)),
    }
    shared = config.is_mla_model and name != PoolName.MAMBA.value and not hasattr(host, "v_buffer")
    return ranks if shared else {**ranks, "tp": (config.tp_rank, config.tp_size)}


def _leading(there: Sequence[bool]) -> int:
    """How many from the first on are there."""
    return next((i for i, found in enumerate(there) if not found), len(there))


def _servable(transfer: PoolTransfer, there: Sequence[bool]) -> set[int]:
    """Lengths of the prefixes, in pages, that a pool with these pages can serve."""
    if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
        return set(range(1, _leading(there) + 1))
    if transfer.hit_policy == PoolHitPolicy.TRAILING_PAGES:
        # Only the state at the end of the prefix is wanted.
        tail = max(1, len(transfer.keys or ()))
        return {length for length in range(1, len(there) + 1) if all(there[max(0, length - tail) : length])}
    raise ValueError(f"the hit policy {transfer.hit_policy} is not supported")
