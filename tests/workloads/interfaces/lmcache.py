"""LMCache 0.5.6: its remote connectors and the adapters of its second tier, restated.

Remote storage: an adapter that `can_parse` the URL ``plugin://<name>`` makes a connector from a context; the engine
then calls its coroutines on a loop of its own. Memory comes from `local_cpu_backend.allocate(shapes, dtypes, format)`,
with one reference; the caller of `put` releases what it gave.

Second tier: tasks are submitted and their results asked for by number, once; three event file descriptors, all
different, say that something has ended.
"""

from __future__ import annotations

import enum
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from tests.workloads.interfaces import offer


class Bitmap:
    """So many bits, all off."""

    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def set(self, index: int) -> None:
        """Turn one on."""
        self._bits[index] = True

    def test(self, index: int) -> bool:
        """Whether it is on."""
        return self._bits[index]


class L2StoreResult(int):
    """Bytes that were stored, or that it failed."""

    def __new__(cls, success: bool, bytes_transferred: int) -> L2StoreResult:
        """Both in one number."""
        return super().__new__(cls, bytes_transferred if success else -1)

    def is_successful(self) -> bool:
        """Whether all objects are stored."""
        return self >= 0

    def bytes_transferred(self) -> int:
        """Bytes that were stored."""
        return max(0, int(self))


@dataclass(frozen=True)
class AdapterUsage:
    """How much an adapter holds; without a capacity LMCache evicts nothing."""

    total_bytes_used: int
    total_capacity_bytes: int
    bytes_by_cache_salt: Mapping[str, int] = field(default_factory=dict)


class L2AdapterInterface(ABC):
    """What an adapter derives from."""

    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self._listeners: list[Any] = []

    def register_listener(self, listener: Any) -> None:
        """Who is told what is stored, read and deleted."""
        self._listeners.append(listener)

    def _notify_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
        for listener in self._listeners:
            listener.on_l2_keys_stored(keys, sizes)

    def _notify_keys_accessed(self, keys: list[Any]) -> None:
        for listener in self._listeners:
            listener.on_l2_keys_accessed(keys)

    def _notify_keys_deleted(self, keys: list[Any], sizes: list[int]) -> None:
        for listener in self._listeners:
            listener.on_l2_keys_deleted(keys)

    @abstractmethod
    def get_store_event_fd(self) -> int: ...

    @abstractmethod
    def get_lookup_and_lock_event_fd(self) -> int: ...

    @abstractmethod
    def get_load_event_fd(self) -> int: ...

    @abstractmethod
    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def pop_completed_store_tasks(self) -> dict[int, L2StoreResult]: ...

    @abstractmethod
    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int: ...

    @abstractmethod
    def query_lookup_and_lock_result(self, task_id: int) -> Bitmap | None: ...

    @abstractmethod
    def submit_unlock(self, keys: list[Any]) -> None: ...

    @abstractmethod
    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int: ...

    @abstractmethod
    def query_load_result(self, task_id: int) -> Bitmap | None: ...

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True)
class ObjectKey:
    """An object of the second tier."""

    chunk_hash: bytes
    model_name: str
    kv_rank: int
    object_group_id: int = 0
    cache_salt: str = ""


class MemoryFormat(enum.Enum):
    """Order of a chunk's dimensions (some of them)."""

    UNDEFINED = 0
    KV_2LTD = 1
    KV_MLA_FMT = 5


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.uint8]


@dataclass
class RemoteMetadata:
    """How the bytes of a chunk are to be understood."""

    length: int
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    fmt: MemoryFormat

    def serialize(self) -> bytes:
        """As bytes, for shapes of four dimensions."""
        forms = [struct.pack("5i", DTYPES.index(d), *s) for s, d in zip(self.shapes, self.dtypes, strict=True)]
        return struct.pack("2i", self.length, self.fmt.value) + b"".join(forms)

    @staticmethod
    def deserialize(s: bytes) -> RemoteMetadata:
        """From bytes."""
        length, layout = struct.unpack_from("2i", s)
        forms = [struct.unpack_from("5i", s, start) for start in range(8, len(s), 20)]
        shapes = [torch.Size(form[1:]) for form in forms]
        return RemoteMetadata(length, shapes, [DTYPES[form[0]] for form in forms], MemoryFormat(layout))


class RemoteConnector(ABC):
    """What a connector derives from."""

    def __init__(self, config: Any, metadata: Any) -> None:
        extra = config.extra_config
        self.save_chunk_meta = extra is None or extra.get("save_chunk_meta", True) or config.use_layerwise
        self.meta_shapes = metadata.get_shapes()
        self.meta_dtypes = metadata.get_dtypes()
        self.meta_fmt = MemoryFormat.KV_MLA_FMT if metadata.use_mla else MemoryFormat.KV_2LTD
        sizes = [
            shape.numel() * dtype.itemsize for shape, dtype in zip(self.meta_shapes, self.meta_dtypes, strict=True)
        ]
        self.full_chunk_size_bytes = sum(sizes)
        self.single_token_size = self.full_chunk_size_bytes // metadata.chunk_size

    def reshape_partial_chunk(self, memory_obj: Any, bytes_read: int) -> Any:
        """The chunk with as many tokens as were read; ValueError for a length that no chunk has."""
        if not 0 < bytes_read <= self.full_chunk_size_bytes or bytes_read % self.single_token_size:
            raise ValueError(f"{bytes_read} bytes")
        shape = list(memory_obj.meta.shape)
        shape[2] = bytes_read // self.single_token_size
        memory_obj.raw_data = memory_obj.raw_data[:bytes_read]
        memory_obj.meta.shape = torch.Size(shape)
        return memory_obj

    @abstractmethod
    async def exists(self, key: Any) -> bool: ...

    @abstractmethod
    def exists_sync(self, key: Any) -> bool: ...

    @abstractmethod
    async def get(self, key: Any) -> Any: ...

    @abstractmethod
    async def put(self, key: Any, memory_obj: Any) -> None: ...

    @abstractmethod
    async def list(self) -> list[str]: ...

    @abstractmethod
    async def close(self) -> None: ...


class ConnectorContext(SimpleNamespace):
    """url, loop, local_cpu_backend, config, metadata, plugin_name."""


class ConnectorAdapter(ABC):
    """Makes connectors for the URLs that it can parse."""

    def __init__(self, schema: str = "") -> None:
        self.schema = schema

    @abstractmethod
    def create_connector(self, context: ConnectorContext) -> RemoteConnector: ...


INSTALLED = offer(
    {
        "lmcache.lmcache_native": [Bitmap],
        "lmcache.v1.distributed.api": [ObjectKey],
        "lmcache.v1.distributed.internal_api": [L2StoreResult],
        "lmcache.v1.distributed.l2_adapters.base": [AdapterUsage, L2AdapterInterface],
        "lmcache.v1.memory_management": [MemoryFormat],
        "lmcache.v1.protocol": [RemoteMetadata],
        "lmcache.v1.storage_backend.connector": [ConnectorAdapter, ConnectorContext],
        "lmcache.v1.storage_backend.connector.base_connector": [RemoteConnector],
    }
)
