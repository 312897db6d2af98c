"""The Python interface of Mooncake's store, for software written for it: `MooncakeDistributedStore`.

Results are those of Mooncake 0.3: 0 or a number of bytes where something was done, a negative number where not. A
value is not moved between tiers, pinned or leased by its clients: the storage servers evict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from fs3.kvcache import KVCache
from fs3.kvcache.connectors.common import memory_at, open_cache

# As Mooncake's codes of the same meaning.
INVALID_PARAMS = -600
OBJECT_NOT_FOUND = -704
TRANSFER_FAIL = -800


class MooncakeDistributedStore:
    """A namespace of the KV cache with the methods of Mooncake's store; safe to use from several threads.

    Memory given by address must stay valid until the call returns; it needs no registration. The keys are the
    application's: it puts model, ranks and formats into them, as it does for Mooncake.
    """

    def __init__(self) -> None:
        self._opened: KVCache | None = None

    def setup(
        self,
        local_hostname: str = "",
        metadata_server: str = "",
        global_segment_size: int | None = None,
        local_buffer_size: int = 0,
        protocol: str = "",
        rdma_devices: str = "",
        master_server_addr: str = "",
        **options: Any,
    ) -> int:
        """Open the namespace that `metadata_server` names: ``fs3://host:port/directory?token_file=...``; 0.

        `options`: as :func:`fs3.kvcache.connectors.common.open_cache` takes them, `namespace` and `url` too, in place
        of `metadata_server`. The other arguments of Mooncake's are taken and not needed: capacity is the namespace's.
        Raises ValueError and OSError as it does.
        """
        if metadata_server:
            parts = urlsplit(metadata_server)
            options = {"url": urlunsplit(parts._replace(path="/")), "namespace": parts.path, **options}
        self._opened = open_cache(options, "setup()")
        return 0

    def put(self, key: str, value: Any, config: Any | None = None) -> int:
        """Store a value: 0, or a negative number."""
        return self.put_batch([key], [value])

    def put_batch(self, keys: Sequence[str], values: Sequence[Any], config: Any | None = None) -> int:
        """Store values: 0 when all are stored, else a negative number."""
        return 0 if all(self._cache.put_batch(list(keys), list(values))) else TRANSFER_FAIL

    def get(self, key: str) -> bytes:
        """The value, empty when there is none."""
        return self._cache.get(key) or b""

    def get_batch(self, keys: Sequence[str]) -> list[bytes]:
        """The values, empty for each that is not there."""
        return [value or b"" for value in self._cache.get_batch(list(keys))]

    def is_exist(self, key: str) -> int:
        """1 when the value is there, else 0."""
        return int(self._cache.exists(key))

    def batch_is_exist(self, keys: Sequence[str]) -> list[int]:
        """1 for each value that is there, else 0."""
        return [int(there) for there in self._cache.exists_batch(list(keys))]

    def put_from(self, key: str, buffer_ptr: int, size: int, config: Any | None = None) -> int:
        """Store `size` bytes at an address: 0, or a negative number."""
        return self.batch_put_from([key], [buffer_ptr], [size])[0]

    def batch_put_from(
        self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int], config: Any | None = None
    ) -> list[int]:
        """Store memory at addresses: 0 for each that is stored, else a negative number."""
        if not len(keys) == len(buffer_ptrs) == len(sizes):
            return [INVALID_PARAMS] * len(keys)
        stored = self._cache.put_batch(list(keys), list(map(memory_at, buffer_ptrs, sizes)))
        return [0 if done else TRANSFER_FAIL for done in stored]

    def get_into(self, key: str, buffer_ptr: int, size: int) -> int:
        """Read a value into `size` bytes at an address: its length, or a negative number."""
        return self.batch_get_into([key], [buffer_ptr], [size])[0]

    def batch_get_into(self, keys: Sequence[str], buffer_ptrs: Sequence[int], sizes: Sequence[int]) -> list[int]:
        """Read values into memory at addresses: the length of each, or a negative number."""
        if not len(keys) == len(buffer_ptrs) == len(sizes):
            return [INVALID_PARAMS] * len(keys)
        found = self._cache.get_batch_into(list(keys), list(map(memory_at, buffer_ptrs, sizes)))
        return [OBJECT_NOT_FOUND if length is None else length for length in found]

    def remove(self, key: str, force: bool = False) -> int:
        """Remove a value: 0, or a negative number when there was none."""
        return 0 if self._cache.remove(key) else OBJECT_NOT_FOUND

    def remove_all(self, force: bool = False) -> int:
        """Remove all values of the namespace: how many."""
        removed = [self._cache.remove(entry.key) for entry in self._cache.keys(b"")]
        return sum(removed)

    def register_buffer(self, buffer_ptr: int, size: int) -> int:
        """0: memory needs no registration."""
        return 0

    def unregister_buffer(self, buffer_ptr: int) -> int:
        """0: memory needs no registration."""
        return 0

    def close(self) -> int:
        """End the connection, 0; the values stay."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None
        return 0

    @property
    def _cache(self) -> KVCache:
        if self._opened is None:
            raise RuntimeError("call setup() before the store is used")
        return self._opened
