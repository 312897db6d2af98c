"""A namespace: a directory with an extended attribute that says where its entries are.

What opening and configuring do is written as generators of native operations, which the synchronous cache waits for and
the one for asyncio awaits.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Awaitable, Generator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, cast

from fs3 import native
from fs3.client.connection import Connection
from fs3.client.finish import name_paths
from fs3.client.paths import StrPath
from fs3.core.errors import Fs3Error, error
from fs3.core.kv_namespaces import ATTRIBUTE, FORMAT_DURABLE, FORMAT_MEMORY
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileType
from fs3.v1.routing_pb2 import Routing

FORMATS = (FORMAT_MEMORY, FORMAT_DURABLE)
CHUNK_BYTES_MAX = 64 << 20
# A namespace has no more chains than leave each so many of its chunks: below that, evictions would depend on luck.
CHUNKS_PER_CHAIN = 16
CAPACITY_MAX = 1 << 62

T = TypeVar("T")
Steps = Generator["native.Operation[Any]", Any, T]


@dataclass(frozen=True)
class Namespace:
    """What the attribute says. Only capacity, ttl and generation ever change."""

    inode: int
    table: tuple[int, int]
    """Id and version of the chain table."""
    first: int
    """Position of the first chain in it."""
    chains: int
    chunk_bytes: int
    replicas: int
    capacity_bytes: int
    """Of values, each counted once; 0: as many as the nodes can keep."""
    ttl_ms: int
    """0: entries do not expire."""
    generation: int
    """Raised by every change."""
    durable: bool = False
    """Entries are chunks on the disks of their chain, which replicates them."""
    writable: bool = False
    """Whether the caller may write, when it was opened."""

    def attribute(self) -> bytes:
        """The value of the attribute."""
        fields = asdict(self)
        del fields["inode"], fields["writable"], fields["durable"]
        return json.dumps({"format": FORMAT_DURABLE if self.durable else FORMAT_MEMORY, **fields}).encode()


@dataclass(frozen=True)
class Wanted:
    """The arguments of :func:`fs3.kvcache.open`."""

    create: bool
    capacity: int | None
    ttl: float | None
    replicas: int | None
    chunk_bytes: int | None
    durable: bool | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None and not 0 < self.capacity <= CAPACITY_MAX:
            raise ValueError(f"capacity must be a positive number of bytes, not {self.capacity}")
        if self.ttl is not None and not 0.001 <= self.ttl < 1e12:
            raise ValueError(f"ttl must be a positive number of seconds, not {self.ttl}")
        if self.replicas is not None and not 1 <= self.replicas <= 16:
            raise ValueError(f"replicas must be 1 to 16, not {self.replicas}")
        if self.durable and self.replicas is not None:
            raise ValueError("a durable namespace has the replicas of the cluster's chains; leave replicas out")

    @property
    def ttl_ms(self) -> int | None:
        """The ttl in milliseconds."""
        return None if self.ttl is None else round(self.ttl * 1000)


def run(steps: Steps[T], path: StrPath) -> T:
    """Do the steps, waiting for each. Errors name `path`."""
    try:
        operation = next(steps)
        while True:
            try:
                result = operation.wait()
            except OSError as e:
                operation = steps.throw(e)
            else:
                operation = steps.send(result)
    except StopIteration as end:
        return cast(T, end.value)
    except OSError as e:
        name_paths(e, path)
        raise


async def run_async(steps: Steps[T], path: StrPath) -> T:
    """As :func:`run`, for asyncio."""
    try:
        operation: Awaitable[Any] = next(steps)
        while True:
            try:
                result = await operation
            except OSError as e:
                operation = steps.throw(e)
            else:
                operation = steps.send(result)
    except StopIteration as end:
        return cast(T, end.value)
    except OSError as e:
        name_paths(e, path)
        raise


def opening(connection: Connection, path: StrPath, wanted: Wanted) -> Steps[Namespace]:
    """Find the namespace, or make it. Raises what :func:`fs3.kvcache.open` does."""
    client, where = connection.client(), connection.path(path)
    try:
        attr = yield client.stat(where)
    except FileNotFoundError:
        if not wanted.create:
            raise
        attr = yield client.mkdir(
            where, mode=0o777, umask=connection.umask, parents=True, chunk_bytes=wanted.chunk_bytes or 0
        )
    if attr.type != FileType.FILE_TYPE_DIRECTORY:
        raise error(Code.CODE_NOT_DIRECTORY, "a cache's namespace is a directory")
    found = yield from _attribute(client, attr.inode)
    if found is None:
        if not wanted.create:
            raise error(Code.CODE_NOT_FOUND, "the directory is no namespace of a cache; open it with create=True")
        statfs = yield client.statfs(where)
        fresh = _fresh(client, attr, statfs.chunk_bytes, wanted)
        yield from _exclusively(client, attr.inode, fresh.attribute())
        found = yield from _attribute(client, attr.inode)
        if found is None:
            raise error(Code.CODE_NOT_FOUND, "the namespace was removed while it was made")
    namespace = parse(attr.inode, found)
    _check_same(namespace, wanted)
    writable = yield from _may_write(client, attr.inode, found)
    return replace(namespace, writable=writable)


def configuring(
    connection: Connection, namespace: Namespace, capacity: int | None, ttl_ms: int | None
) -> Steps[Namespace]:
    """Change settings; None leaves one as it is. Raises Denied without the permission to write."""
    client = connection.client()
    found = yield from _attribute(client, namespace.inode)
    if found is None:
        raise error(Code.CODE_NOT_FOUND, "the namespace was removed")
    known = parse(namespace.inode, found)
    changed = replace(
        known,
        capacity_bytes=known.capacity_bytes if capacity is None else capacity,
        ttl_ms=known.ttl_ms if ttl_ms is None else ttl_ms,
        generation=known.generation + 1,
    )
    yield client.setxattr(b"", ATTRIBUTE, changed.attribute(), os.XATTR_REPLACE, inode=namespace.inode)
    return replace(changed, writable=True)


def parse(inode: int, value: bytes) -> Namespace:
    """The namespace of an attribute. Raises NOT_SUPPORTED for one of a later version, INTERNAL for nonsense."""
    try:
        fields = json.loads(value)
        version = fields.pop("format")
        if version not in FORMATS:
            raise error(
                Code.CODE_NOT_SUPPORTED, f"the namespace has format {version}, this is fs3 for up to {FORMATS[-1]}"
            )
        durable = version == FORMAT_DURABLE
        return Namespace(inode=inode, durable=durable, **{**fields, "table": tuple(fields["table"])})
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise error(Code.CODE_INTERNAL, f"the attribute {ATTRIBUTE.decode()} cannot be understood: {e}") from e


def _attribute(client: native.Client, inode: int) -> Steps[bytes | None]:
    try:
        value: bytes = yield client.getxattr(b"", ATTRIBUTE, inode=inode)
    except OSError as e:
        if e.errno != errno.ENODATA:
            raise
        return None
    return value


def _exclusively(client: native.Client, inode: int, value: bytes) -> Steps[bool]:
    """Set the attribute unless it is there; whether it was there."""
    try:
        yield client.setxattr(b"", ATTRIBUTE, value, os.XATTR_CREATE, inode=inode)
    except FileExistsError:
        return True
    return False


def _may_write(client: native.Client, inode: int, value: bytes) -> Steps[bool]:
    """Whether the caller may write to the directory: the service looks at that before it finds the attribute there."""
    try:
        yield from _exclusively(client, inode, value)
    except PermissionError:
        return False
    return True


def _fresh(client: native.Client, attr: native.Attr, chunk_bytes: int, wanted: Wanted) -> Namespace:
    """A new namespace, with what new files of the directory would get: its table and chunk size, or the cluster's."""
    routing = Routing.FromString(client.routing())
    table, count = _table(routing, attr.layout)
    if attr.layout is not None and attr.layout.chunk_bytes:
        chunk_bytes = attr.layout.chunk_bytes
    durable = bool(wanted.durable)
    if durable and not wanted.chunk_bytes:
        # A value of a chunk and its header are one piece then.
        chunk_bytes = min(2 * chunk_bytes, CHUNK_BYTES_MAX)
    replicas = max((len(chain.targets) for chain in routing.chains), default=1) if durable else wanted.replicas or 1
    capacity = wanted.capacity or 0
    enough = capacity // (CHUNKS_PER_CHAIN * chunk_bytes) if capacity else count
    return Namespace(
        inode=attr.inode,
        table=table,
        first=attr.inode % count,
        chains=max(1, min(count, enough)),
        chunk_bytes=chunk_bytes,
        replicas=replicas,
        capacity_bytes=capacity,
        ttl_ms=wanted.ttl_ms or 0,
        generation=1,
        durable=durable,
    )


def _table(routing: Routing, layout: native.Layout | None) -> tuple[tuple[int, int], int]:
    """The chain table of a directory, and how many chains it has. Of one that names none, the newest."""
    table_id, version = (layout.table_id, layout.table_version) if layout else (0, 0)
    fitting = {
        (table.table_id, table.table_version): len(table.chain_ids)
        for table in routing.tables
        if table_id in (0, table.table_id) and version in (0, table.table_version) and table.chain_ids
    }
    if not fitting:
        raise error(Code.CODE_UNAVAILABLE, "the cluster has no chains for the directory yet; try again later")
    table = max(fitting, key=lambda known: (-known[0], known[1]))
    return table, fitting[table]


def _check_same(namespace: Namespace, wanted: Wanted) -> None:
    """Raise INVALID_ARGUMENT when something else is there than what was asked for."""
    pairs = {
        "capacity": (wanted.capacity, namespace.capacity_bytes),
        "ttl": (wanted.ttl_ms, namespace.ttl_ms),
        "replicas": (wanted.replicas, namespace.replicas),
        "chunk_bytes": (wanted.chunk_bytes, namespace.chunk_bytes),
        "durable": (wanted.durable, namespace.durable),
    }
    differing = [f"{name} {given} (it has {has})" for name, (given, has) in pairs.items() if given not in (None, has)]
    if differing:
        raise error(
            Code.CODE_INVALID_ARGUMENT,
            f"the namespace exists with other settings: {', '.join(differing)}; leave them out, or change capacity and "
            "ttl with configure(), or `fs3 kv set`",
        )


def read_only() -> Fs3Error:
    """The error of a caller that may only read."""
    return error(Code.CODE_ACCESS, "this user may only read the namespace: its directory needs the permission to write")
