"""SGLang 0.5.23, `sglang.srt.mem_cache.hicache_storage`: the storage behind HiCache, restated.

A page is named by the hash of its tokens and of those before it. SGLang constructs a dynamic back end as
``cls(storage_config, {})``, registers the pools of host memory, and then calls it from its threads with up to 128 pages
at a time; `host_indices` has one index for each token, those of a page adjacent.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from tests.workloads.interfaces import offer


@dataclass
class HiCacheStorageConfig:
    """Who asks: the rank and the model."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool
    enable_storage_metrics: bool
    is_page_first_layout: bool
    model_name: str | None
    tp_lcm_size: int | None = None
    should_split_heads: bool = False
    dp_rank: int = 0
    extra_config: dict[str, Any] | None = None
    dcp_size: int = 1
    dcp_rank: int = 0
    logical_page_size: int | None = None


@dataclass
class HiCacheStorageExtraInfo:
    """Hashes of the pages before those of the call."""

    prefix_keys: list[str] | None = None
    extra_info: dict[str, Any] | None = None


class PoolName(enum.StrEnum):
    """Pools of host memory (some of them)."""

    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"
    DRAFT = "draft"


class PoolHitPolicy(enum.StrEnum):
    """Which pages of a pool a prefix needs: all, or those at its end."""

    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    """Pages of one pool."""

    name: PoolName
    host_indices: Any = None
    device_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    """Pages of the usable prefix; by pool, its own; lengths of all usable prefixes."""

    kv_hit_pages: int
    extra_pool_hit_pages: dict[str, int]
    restorable_prefix_pages: list[int] | None = None


class HiCacheStorage(ABC):
    """What a back end derives from."""

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of KV pages."""
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Another pool."""
        if not hasattr(self, "registered_pools"):
            self.registered_pools: dict[Any, Any] = {}
        self.registered_pools[host_pool_name] = host_pool

    @abstractmethod
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """A flat page, or None."""

    @abstractmethod
    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> Any:
        """Flat pages, None for each that is not there."""

    @abstractmethod
    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Whether it is stored."""

    @abstractmethod
    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Whether all are stored."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether it is there."""


INSTALLED = offer(
    {
        "sglang.srt.mem_cache.hicache_storage": [
            HiCacheStorage,
            HiCacheStorageConfig,
            HiCacheStorageExtraInfo,
            PoolHitPolicy,
            PoolName,
            PoolTransfer,
            PoolTransferResult,
        ]
    }
)
