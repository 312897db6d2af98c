"""What the synchronous and the asyncio cache have in common: arguments, results, and the native handle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fs3 import native
from fs3.client.buffers import Readable, Writable, exported, flat
from fs3.client.connection import Connection
from fs3.client.finish import name_paths
from fs3.client.paths import StrPath
from fs3.kvcache.namespace import Namespace, read_only
from fs3.kvcache.records import Entry

Key = bytes | str
Target = Any
"""Memory for one value: a writable buffer of any kind, or (buffer, offset, length) with a length that may be None."""

# Keys looked at together by match_prefix: enough for one round trip to pay, few enough not to look far behind a miss.
PREFIX_STEP = 1024
LIST_PAGE = 1000


class Base:
    """An open namespace."""

    def __init__(
        self, connection: Connection, path: StrPath, namespace: Namespace, version: bytes, timeout: float
    ) -> None:
        self._connection = connection
        self.path = path
        self._namespace = namespace
        self._version = version
        self._timeout = timeout
        self._made: tuple[native.Client, native.KvCache] | None = None
        self._closed = False

    @property
    def namespace(self) -> Namespace:
        """Where its entries are, and its settings as this handle knows them."""
        return self._namespace

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def _native(self) -> native.KvCache:
        """The handle of this process. A forked child makes its own."""
        if self._closed:
            raise ValueError("I/O operation on a closed cache")
        client, made = self._connection.client(), self._made
        if made is not None and made[0] is client:
            return made[1]
        known = self._namespace
        cache = native.KvCache(
            client,
            id=known.inode,
            table=known.table,
            first=known.first,
            chains=known.chains,
            chunk_bytes=known.chunk_bytes,
            replicas=known.replicas,
            durable=known.durable,
            version=self._version,
            capacity_bytes=known.capacity_bytes,
            ttl_ms=known.ttl_ms,
            generation=known.generation,
            timeout_s=self._timeout,
        )
        self._made = (client, cache)
        return cache

    def _writer(self) -> native.KvCache:
        """As :meth:`_native`. Raises Denied for who may only read."""
        if not self._namespace.writable:
            denied = read_only()
            name_paths(denied, self.path)
            raise denied
        return self._native()

    def _put(self, key: Key, value: Readable) -> native.Operation[bool]:
        return self._writer().put(as_key(key), exported(value))

    def _put_batch(self, keys: Sequence[Key], values: Sequence[Readable]) -> native.Operation[list[bool]]:
        return self._writer().put_many([as_key(key) for key in keys], [exported(value) for value in values])

    def _get(self, key: Key) -> native.Operation[bytes | None]:
        return self._native().get(as_key(key))

    def _get_batch(self, keys: Sequence[Key]) -> native.Operation[list[bytes | None]]:
        return self._native().get_many([as_key(key) for key in keys])

    def _get_into(self, key: Key, buffer: Writable, offset: int, length: int | None) -> native.Operation[int | None]:
        return self._native().get_into(as_key(key), window(buffer, offset, length))

    def _get_batch_into(self, keys: Sequence[Key], targets: Sequence[Target]) -> native.Operation[list[int | None]]:
        windows = [window(*target) if isinstance(target, tuple) else exported(target) for target in targets]
        return self._native().get_many_into([as_key(key) for key in keys], windows)

    def _exists(self, keys: Sequence[Key]) -> native.Operation[list[bool]]:
        return self._native().exists([as_key(key) for key in keys])

    def _remove(self, key: Key) -> native.Operation[list[bool | OSError]]:
        return self._writer().remove([as_key(key)])

    def _removed(self, results: list[bool | OSError]) -> bool:
        (result,) = results
        if isinstance(result, OSError):
            name_paths(result, self.path)
            raise result
        return result

    def _evict(self, fraction: float, left_bytes: int | None) -> native.Operation[tuple[int, int]]:
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction must be 0.0 to 1.0, not {fraction}")
        return self._writer().evict(keep_bytes=left_bytes, keep_part=1.0 - fraction)


def as_key(key: Key) -> bytes:
    """A key as bytes; str is UTF-8."""
    return key if isinstance(key, bytes) else key.encode() if isinstance(key, str) else bytes(key)


def window(buffer: Writable, offset: int = 0, length: int | None = None) -> Any:
    """A part of writable memory. Raises ValueError when the memory does not have it."""
    if offset == 0 and length is None:
        return exported(buffer)
    whole = flat(buffer)
    end = len(whole) if length is None else offset + length
    if not 0 <= offset <= end <= len(whole):
        raise ValueError(f"bytes {offset} to {end} are not within the buffer of {len(whole)} bytes")
    return whole[offset:end]


def fitting(key: Key, count: int | None) -> int | None:
    """The length of a value. Raises ValueError when the value did not fit its memory."""
    if count is not None and count < 0:
        raise ValueError(f"the value of {key!r} has {-count} bytes, more than the memory for it")
    return count


def leading(found: Sequence[bool]) -> int:
    """How many are true from the first on."""
    return next((number for number, there in enumerate(found) if not there), len(found))


def entry(raw: tuple[bytes, int, int, int]) -> Entry:
    """An entry of a listing."""
    key, size, age_ms, idle_ms = raw
    return Entry(key, size, age_ms / 1000, idle_ms / 1000)
