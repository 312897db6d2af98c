"""The synchronous cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fs3.client import FileSystem, connect
from fs3.client.buffers import Readable, Writable
from fs3.client.connection import Connection, connect_options
from fs3.client.finish import finish
from fs3.client.paths import StrPath, join
from fs3.core.kv_namespaces import ATTRIBUTE
from fs3.kvcache.base import LIST_PAGE, PREFIX_STEP, Base, Key, Target, entry, fitting, leading
from fs3.kvcache.namespace import Namespace, Wanted, configuring, opening, run
from fs3.kvcache.records import Entry, Evicted, Stats, stats_of

if TYPE_CHECKING:
    from types import TracebackType


def open(
    fs: FileSystem | str | None,
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
) -> KVCache:
    """Open a namespace, and make it if need be.

    `fs`: a connected file system, which stays open when the cache is closed, or a URL (None: that of FS3_URL).
    `path`: a directory. `create`: make it when it is not there. What follows is taken when it is made; given for one
    that exists it must be what that has: `capacity`, bytes of values, each counted once (default: as much as the
    nodes have memory for); `ttl`, seconds after which entries expire (default: never); `replicas`, storage nodes
    that keep each value (1); `chunk_bytes`, the largest piece of a value, a power of two (default: that of the
    directory); `durable`: keep entries on the disks, on all replicas of a chain, instead of in memory (False).

    `version` is part of every key: values put under another one are never found. `timeout`: how long an operation
    may take, in seconds; a node that does not answer in that time is a miss, and its values are not stored.

    Who may read the directory may get, who may write to it may put and remove. Raises FileNotFoundError, Denied,
    NOT_DIRECTORY, INVALID_ARGUMENT for other settings than it has, and ValueError.
    """
    wanted = Wanted(create, capacity, ttl, replicas, chunk_bytes, durable)
    own = None if isinstance(fs, FileSystem) else connect(fs)
    connection = (own or fs)._connection  # type: ignore[union-attr]
    try:
        namespace = run(opening(connection, path, wanted), path)
        return KVCache(connection, path, namespace, as_version(version), timeout, own)
    except BaseException:
        if own is not None:
            own.close()
        raise


def as_version(version: str | bytes) -> bytes:
    """The bytes of a version."""
    return version.encode() if isinstance(version, str) else version


def namespaces(fs: FileSystem, path: StrPath = "/") -> Iterator[str]:
    """Paths of the namespaces in and below a directory, as far as this user may read them."""
    with contextlib.suppress(OSError):
        if ATTRIBUTE.decode() in fs.listxattr(path):
            yield join(path, "").rstrip("/") or "/"
            return
    with contextlib.suppress(PermissionError):
        for item in fs.scandir(path):
            if item.is_dir(follow_symlinks=False):
                yield from namespaces(fs, join(path, item.name))


def _unpickle(
    given: tuple[str, str | None, dict[str, Any]], path: StrPath, namespace: Namespace, version: bytes, timeout: float
) -> KVCache:
    url, token, options = given
    own = FileSystem(Connection(connect_options(url, token, **options)))
    return KVCache(own._connection, path, namespace, version, timeout, own)


class KVCache(Base):
    """An open namespace; see :func:`open`. Thread-safe; a context manager that closes it.

    Keys are bytes, or str as UTF-8, of up to 4096 bytes. A value is found as a whole, exactly as it was put last, or
    not at all: a get never returns an older value than that of the last put that returned True. After a fork the
    child connects anew by itself. A pickled copy connects by itself at its first call.

    A cache may forget anything at any time, and does not wait: what a node that is down kept is a miss, and a put
    that it was to keep is False. Such a put may have reached other replicas, and be found. Buffers must not change
    during a call.
    """

    def __init__(
        self,
        connection: Connection,
        path: StrPath,
        namespace: Namespace,
        version: bytes,
        timeout: float,
        own: FileSystem | None = None,
    ) -> None:
        super().__init__(connection, path, namespace, version, timeout)
        # To be closed with the cache.
        self._own = own

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        given = self._connection.options.given
        return _unpickle, (given, self.path, self._namespace, self._version, self._timeout)

    def __repr__(self) -> str:
        return f"<fs3.kvcache.KVCache path={self.path!r}{' closed' if self._closed else ''}>"

    def close(self) -> None:
        """End its use. Entries stay."""
        self._closed = True
        self._made = None
        own, self._own = self._own, None
        if own is not None:
            own.close()

    def put(self, key: Key, value: Readable) -> bool:
        """Keep a value; True when all its replicas have it. It replaces the one there was. Raises Denied."""
        return finish(self._put(key, value), self.path)

    def put_batch(self, keys: Sequence[Key], values: Sequence[Readable]) -> list[bool]:
        """Keep many values, all on their way at the same time; for each as :meth:`put`."""
        return finish(self._put_batch(keys, values), self.path)

    def get(self, key: Key) -> bytes | None:
        """The value, None when it is not there."""
        return finish(self._get(key), self.path)

    def get_batch(self, keys: Sequence[Key]) -> list[bytes | None]:
        """Many values, in few round trips."""
        return finish(self._get_batch(keys), self.path)

    def get_into(self, key: Key, buffer: Writable, offset: int = 0, length: int | None = None) -> int | None:
        """Read a value into `buffer` from `offset` on; its length in bytes, None when it is not there.

        `buffer` is any writable memory: bytearray, memoryview, NumPy array, tensor on the CPU; `length` bytes of it may
        be used, default: all behind `offset`. Bytes behind the value stay as they are; for a miss they are
        undefined. Raises ValueError when the value is longer.
        """
        return fitting(key, finish(self._get_into(key, buffer, offset, length), self.path))

    def get_batch_into(self, keys: Sequence[Key], targets: Sequence[Target]) -> list[int | None]:
        """Read many values, each into its own memory: a buffer, or (buffer, offset, length); as :meth:`get_into`."""
        counts = finish(self._get_batch_into(keys, targets), self.path)
        return [fitting(key, count) for key, count in zip(keys, counts, strict=True)]

    def exists(self, key: Key) -> bool:
        """Whether the value is there. It counts as used."""
        return finish(self._exists([key]), self.path)[0]

    def exists_batch(self, keys: Sequence[Key]) -> list[bool]:
        """Whether each value is there."""
        return finish(self._exists(keys), self.path)

    def match_prefix(self, keys: Sequence[Key]) -> int:
        """How many of the values are there, counted from the first one until the first that is not."""
        for start in range(0, len(keys), PREFIX_STEP):
            step = keys[start : start + PREFIX_STEP]
            count = leading(self.exists_batch(step))
            if count < len(step):
                return start + count
        return len(keys)

    def remove(self, key: Key) -> bool:
        """Forget a value; whether it was there. Raises OSError when it may still be found, as a node did not answer."""
        return self._removed(finish(self._remove(key), self.path))

    def keys(self, prefix: Key = b"") -> Iterator[Entry]:
        """The entries whose keys begin with `prefix`, in no order, for a person: it asks all nodes, page by page.

        What is put or removed meanwhile may be missed. With replicas, an entry is shown once for each.
        """
        start = prefix.encode() if isinstance(prefix, str) else prefix
        cache = self._native()
        for node in cache.nodes():
            after: int | None = 0
            while after is not None:
                raw, after = finish(cache.list_page(node, start, after, LIST_PAGE), self.path)
                yield from map(entry, raw)

    def stats(self) -> Stats:
        """What the nodes that answer count, and what this handle did."""
        cache = self._native()
        return stats_of(self._namespace, finish(cache.stat(), self.path), cache.calls())

    def evict(self, fraction: float = 1.0, *, bytes: int | None = None) -> Evicted:
        """Forget what was used the longest ago: this part of all, or so many bytes, on each node its share.

        Raises Denied, and OSError when a node does not answer; the others have done it.
        """
        left = None if bytes is None else max(0, self.stats().bytes - bytes)
        return Evicted(*finish(self._evict(fraction, left), self.path))

    def configure(self, *, capacity: int | None = None, ttl: float | None = None) -> None:
        """Change settings of the namespace, for everybody; 0 means no limit, and None leaves one as it is.

        Nodes that do not answer now hear of it with later puts. Raises Denied.
        """
        if (capacity or 0) < 0 or (ttl or 0) < 0:
            raise ValueError("capacity and ttl must not be negative")
        ttl_ms = None if ttl is None else round(ttl * 1000)
        changed = run(configuring(self._connection, self._namespace, capacity, ttl_ms), self.path)
        self._namespace = replace(changed, inode=self._namespace.inode)
        with contextlib.suppress(OSError):
            self._native().configure(changed.capacity_bytes, changed.ttl_ms, changed.generation).wait()
