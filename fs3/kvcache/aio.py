"""The cache for asyncio: the same names and contracts as :class:`KVCache`, as coroutines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fs3.client import AsyncFileSystem, FileSystem, connect_async
from fs3.client.buffers import Readable, Writable
from fs3.client.connection import Connection, connect_options
from fs3.client.finish import finished
from fs3.client.paths import StrPath
from fs3.kvcache.base import LIST_PAGE, PREFIX_STEP, Base, Key, Target, entry, fitting, leading
from fs3.kvcache.cache import as_version
from fs3.kvcache.namespace import Namespace, Wanted, configuring, opening, run_async
from fs3.kvcache.records import Entry, Evicted, Stats, stats_of

if TYPE_CHECKING:
    from types import TracebackType


async def open_async(
    fs: AsyncFileSystem | FileSystem | str | None,
    path: StrPath,
    *,
    create: bool = True,
    capacity: int | None = None,
    ttl: float | None = None,
    replicas: int | None = None,
    chunk_bytes: int | None = None,
    durable: bool | None = None,
    version: str | bytes = "",
    timeout: float = 1.0,
) -> AsyncKVCache:
    """Open a namespace; arguments and errors as for :func:`fs3.kvcache.open`."""
    wanted = Wanted(create, capacity, ttl, replicas, chunk_bytes, durable)
    own = None if isinstance(fs, AsyncFileSystem | FileSystem) else await connect_async(fs)
    connection = (own or fs)._connection  # type: ignore[union-attr]
    try:
        namespace = await run_async(opening(connection, path, wanted), path)
        return AsyncKVCache(connection, path, namespace, as_version(version), timeout, own)
    except BaseException:
        if own is not None:
            await own.close()
        raise


def _unpickle(
    given: tuple[str, str | None, dict[str, Any]], path: StrPath, namespace: Namespace, version: bytes, timeout: float
) -> AsyncKVCache:
    url, token, options = given
    own = AsyncFileSystem(Connection(connect_options(url, token, **options)))
    return AsyncKVCache(own._connection, path, namespace, version, timeout, own)


class AsyncKVCache(Base):
    """An open namespace; see :class:`fs3.kvcache.KVCache` for what its methods promise. Calls may overlap.

    Cancelling a call gives up on its result: a put may or may not take place, and buffers stay pinned until nothing
    uses them. Also an asynchronous context manager that closes it.
    """

    def __init__(
        self,
        connection: Connection,
        path: StrPath,
        namespace: Namespace,
        version: bytes,
        timeout: float,
        own: AsyncFileSystem | None = None,
    ) -> None:
        super().__init__(connection, path, namespace, version, timeout)
        # To be closed with the cache.
        self._own = own

    async def __aenter__(self) -> AsyncKVCache:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        given = self._connection.options.given
        return _unpickle, (given, self.path, self._namespace, self._version, self._timeout)

    def __repr__(self) -> str:
        return f"<fs3.kvcache.AsyncKVCache path={self.path!r}{' closed' if self._closed else ''}>"

    async def close(self) -> None:
        """End its use; see :meth:`KVCache.close`."""
        self._closed = True
        self._made = None
        own, self._own = self._own, None
        if own is not None:
            await own.close()

    async def put(self, key: Key, value: Readable) -> bool:
        """Keep a value; see :meth:`KVCache.put`."""
        return await finished(self._put(key, value), self.path)

    async def put_batch(self, keys: Sequence[Key], values: Sequence[Readable]) -> list[bool]:
        """Keep many values; see :meth:`KVCache.put_batch`."""
        return await finished(self._put_batch(keys, values), self.path)

    async def get(self, key: Key) -> bytes | None:
        """The value; see :meth:`KVCache.get`."""
        return await finished(self._get(key), self.path)

    async def get_batch(self, keys: Sequence[Key]) -> list[bytes | None]:
        """Many values; see :meth:`KVCache.get_batch`."""
        return await finished(self._get_batch(keys), self.path)

    async def get_into(self, key: Key, buffer: Writable, offset: int = 0, length: int | None = None) -> int | None:
        """Read a value into memory; see :meth:`KVCache.get_into`."""
        return fitting(key, await finished(self._get_into(key, buffer, offset, length), self.path))

    async def get_batch_into(self, keys: Sequence[Key], targets: Sequence[Target]) -> list[int | None]:
        """Read many values into memory; see :meth:`KVCache.get_batch_into`."""
        counts = await finished(self._get_batch_into(keys, targets), self.path)
        return [fitting(key, count) for key, count in zip(keys, counts, strict=True)]

    async def exists(self, key: Key) -> bool:
        """Whether the value is there; see :meth:`KVCache.exists`."""
        return (await finished(self._exists([key]), self.path))[0]

    async def exists_batch(self, keys: Sequence[Key]) -> list[bool]:
        """Whether each value is there."""
        return await finished(self._exists(keys), self.path)

    async def match_prefix(self, keys: Sequence[Key]) -> int:
        """How many values are there before the first that is not; see :meth:`KVCache.match_prefix`."""
        for start in range(0, len(keys), PREFIX_STEP):
            step = keys[start : start + PREFIX_STEP]
            count = leading(await self.exists_batch(step))
            if count < len(step):
                return start + count
        return len(keys)

    async def remove(self, key: Key) -> bool:
        """Forget a value; see :meth:`KVCache.remove`."""
        return self._removed(await finished(self._remove(key), self.path))

    async def keys(self, prefix: Key = b"") -> AsyncIterator[Entry]:
        """Entries, for a person; see :meth:`KVCache.keys`."""
        start = prefix.encode() if isinstance(prefix, str) else prefix
        cache = self._native()
        for node in cache.nodes():
            after: int | None = 0
            while after is not None:
                raw, after = await finished(cache.list_page(node, start, after, LIST_PAGE), self.path)
                for item in raw:
                    yield entry(item)

    async def stats(self) -> Stats:
        """Counters; see :meth:`KVCache.stats`."""
        cache = self._native()
        return stats_of(self._namespace, await finished(cache.stat(), self.path), cache.calls())

    async def evict(self, fraction: float = 1.0, *, bytes: int | None = None) -> Evicted:
        """Forget the oldest; see :meth:`KVCache.evict`."""
        left = None if bytes is None else max(0, (await self.stats()).bytes - bytes)
        return Evicted(*await finished(self._evict(fraction, left), self.path))

    async def configure(self, *, capacity: int | None = None, ttl: float | None = None) -> None:
        """Change settings; see :meth:`KVCache.configure`."""
        if (capacity or 0) < 0 or (ttl or 0) < 0:
            raise ValueError("capacity and ttl must not be negative")
        ttl_ms = None if ttl is None else round(ttl * 1000)
        steps = configuring(self._connection, self._namespace, capacity, ttl_ms)
        self._namespace = changed = await run_async(steps, self.path)
        with contextlib.suppress(OSError):
            await self._native().configure(changed.capacity_bytes, changed.ttl_ms, changed.generation)
