"""A metadata engine over a store in memory, with fake chunks, and an audit of everything that is stored."""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from fs3.core.clock import RealClock, VirtualClock
from fs3.core.errors import Fs3Error, error
from fs3.core.layout import chains_of, place_of
from fs3.kv.api import KvStore
from fs3.kv.faults import KvFaults
from fs3.kv.memory import MemoryKv
from fs3.meta import acl, keys, model, quotas
from fs3.meta.engine import Engine
from fs3.meta.placement import RoutingPlacement
from fs3.meta.registry import OPERATIONS
from fs3.meta.routing import RoutingHolder
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from fs3.v1.routing_pb2 import ChainTable, Disk, Routing
from fs3.v1.storage_pb2 import ChunkInfo

from .engines import new_store

BY_NAME = {operation.name: operation for operation in OPERATIONS}
CHUNK = 64 << 10
CHAINS = [101, 102, 103, 104]
ROOT = pb.Caller(uid=0, gid=0)
T = TypeVar("T")


def run(coro: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coro)


def user(uid: int, gid: int | None = None, *groups: int) -> pb.Caller:
    return pb.Caller(uid=uid, gid=uid if gid is None else gid, groups=groups)


class FakeChunks:
    """ChunkStore in memory. `down`: chains that do not answer. `calls`: what was asked, in order."""

    def __init__(self, table: list[int] = CHAINS) -> None:
        self.table = table
        # (chain, inode, index) -> length
        self.chunks: dict[tuple[int, int, int], int] = {}
        self.down: set[int] = set()
        self.calls: list[tuple[Any, ...]] = []
        self.before_call: Any = None
        # (target, inode, index) -> committed version, where it is not 1
        self.versions: dict[tuple[int, int, int], int] = {}

    def stripe(self, layout: pb.Layout) -> list[int]:
        return chains_of(layout, self.table)

    async def _answer(self, chain: int, *call: Any) -> None:
        self.calls.append((call[0], chain, *call[1:]))
        if self.before_call is not None:
            await self.before_call(*call)
        await asyncio.sleep(0)
        if chain in self.down:
            raise error(Code.CODE_UNAVAILABLE, f"chain {chain} is down")

    async def remove(self, chain_id: int, inode: int, first_index: int, *, ends_s: float, space: int = 0) -> int:
        await self._answer(chain_id, "remove", inode, first_index, *([space] if space else []))
        gone = [k for k in self.chunks if k[0] == chain_id and k[1] == inode and k[2] >= first_index]
        for key in gone:
            del self.chunks[key]
        return len(gone)

    async def truncate_chunk(
        self, chain_id: int, inode: int, index: int, *, chunk_bytes: int, length: int, ends_s: float
    ) -> None:
        await self._answer(chain_id, "truncate", inode, index, length)
        key = (chain_id, inode, index)
        if key in self.chunks:
            self.chunks[key] = min(self.chunks[key], length)

    async def query_last(self, chain_id: int, inode: int, *, ends_s: float) -> tuple[int, int] | None:
        await self._answer(chain_id, "query", inode)
        return max(((k[2], v) for k, v in self.chunks.items() if k[:2] == (chain_id, inode)), default=None)

    def chains(self) -> list[int]:
        return self.table

    def replicas(self, chain_id: int) -> list[int]:
        return [chain_id * 10 + i for i in range(2)]

    async def list_chunks(
        self, chain_id: int, target_id: int, after: bytes, limit: int, *, ends_s: float
    ) -> list[ChunkInfo]:
        """Every replica holds the same, but for what `versions` says."""
        await self._answer(chain_id, "list", target_id)
        found = []
        for (chain, ino, index), length in sorted(self.chunks.items()):
            chunk_id = struct.pack(">IQI", 0, ino, index)
            version = self.versions.get((target_id, ino, index), 1)
            if chain == chain_id and chunk_id > after:
                info = ChunkInfo(chunk_id=chunk_id, committed_version=version, length=length, chunk_bytes=CHUNK)
                found.append(info)
        return found[:limit]

    def write(self, attr: pb.Attr, end: int, start: int = 0) -> None:
        """Put the chunks of bytes [start, end) of a file where its layout says."""
        size = attr.layout.chunk_bytes
        stripe = self.stripe(attr.layout)
        for index in range(start // size, -(-end // size)):
            key = (stripe[place_of(attr.layout, index)], attr.inode, index)
            self.chunks[key] = max(self.chunks.get(key, 0), min(size, end - index * size))

    def of(self, inode: int) -> dict[int, int]:
        """Chunk lengths by index."""
        return {k[2]: v for k, v in self.chunks.items() if k[1] == inode}


def routing(version: int = 1, chains: list[int] = CHAINS) -> Routing:
    return Routing(
        version=version,
        cluster_id="test",
        tables=[ChainTable(table_id=1, table_version=1, chain_ids=chains, replicas=3)] if chains else [],
        disks=[Disk(uuid=bytes([i]) * 16, node_id=i, capacity_bytes=3 << 30, free_bytes=3 << 29) for i in range(3)],
    )


class Meta:
    """One metadata server and one client of it. Several may share a store and chunks."""

    def __init__(
        self,
        *,
        store: KvStore | None = None,
        chunks: FakeChunks | None = None,
        clock: Any = None,
        seed: int = 1,
        chains: list[int] = CHAINS,
        **engine: Any,
    ) -> None:
        self.clock = clock or RealClock()
        if store is None:
            # Virtual time passes in turns of the event loop; answers from outside would come too late for it.
            store = MemoryKv(now_ms=self._now_ms) if isinstance(clock, VirtualClock) else new_store(self._now_ms)
        self.store = store
        self.chunks = chunks or FakeChunks()
        self.holder = RoutingHolder()
        self.holder.take(routing(chains=chains))
        placement = RoutingPlacement(self.holder, chunk_bytes=CHUNK)
        self.rng = random.Random(seed)
        engine = {"gc_delay_ms": 0} | engine
        self.engine = Engine(self.store, self.chunks, placement, clock=self.clock, rng=self.rng, **engine)
        self.client_id = self.rng.randbytes(16)
        # Ids in the trash, where a test prepares some.
        self.trashed: list[bytes] = []
        self._sequences = itertools.count(1)

    def _now_ms(self) -> int:
        return int(self.clock.monotonic_ns() // 1_000_000)

    @classmethod
    async def start(cls, **options: Any) -> Meta:
        meta = cls(**options)
        await meta.engine.bootstrap()
        return meta

    async def peer(self, seed: int = 2, **engine: Any) -> Meta:
        """Another server over the same store and chunks."""
        return await Meta.start(store=self.store, chunks=self.chunks, clock=self.clock, seed=seed, **engine)

    def op(self) -> pb.OpId:
        return pb.OpId(client_id=self.client_id, sequence=next(self._sequences))

    async def call(self, name: str, request: Any) -> Any:
        return await self.engine.call(BY_NAME[name], request)

    def request(
        self,
        name: str,
        path: str | bytes | None = None,
        /,
        *,
        inode: int | None = None,
        follow: bool = False,
        caller: pb.Caller = ROOT,
        **fields: Any,
    ) -> Any:
        operation = BY_NAME[name]
        if path is not None:
            raw = path.encode() if isinstance(path, str) else path
            fields["at"] = pb.PathAt(inode=1 if inode is None else inode, path=raw, follow=follow)
        elif inode is not None:
            fields["inode"] = inode
        if operation.mutates and "op" not in fields:
            fields["op"] = self.op()
        if "caller" in operation.request.DESCRIPTOR.fields_by_name:
            fields["caller"] = caller
        return operation.request(**fields)

    async def do(self, name: str, path: str | bytes | None = None, /, **fields: Any) -> Any:
        return await self.call(name, self.request(name, path, **fields))

    async def stat(self, path: str | bytes = "", *, follow: bool = True, **fields: Any) -> pb.Attr:
        attr: pb.Attr = (await self.do("Stat", path, follow=follow, **fields)).attr
        return attr

    async def mkdir(self, path: str, mode: int = 0o755, **fields: Any) -> pb.Attr:
        attr: pb.Attr = (await self.do("Mkdir", path, mode=mode, **fields)).attr
        return attr

    async def create(self, path: str | bytes, mode: int = 0o644, **fields: Any) -> pb.OpenResponse:
        response: pb.OpenResponse = await self.do("Create", path, mode=mode, **fields)
        return response

    async def rename(self, source: str, dest: str, caller: pb.Caller = ROOT, **fields: Any) -> pb.RenameResponse:
        paths = {"from": pb.PathAt(inode=1, path=source.encode()), "to": pb.PathAt(inode=1, path=dest.encode())}
        response: pb.RenameResponse = await self.do("Rename", caller=caller, **paths, **fields)
        return response

    async def link(self, source: str, dest: str, caller: pb.Caller = ROOT, **fields: Any) -> pb.Attr:
        paths = {"from": pb.PathAt(inode=1, path=source.encode()), "to": pb.PathAt(inode=1, path=dest.encode())}
        attr: pb.Attr = (await self.do("Link", caller=caller, **paths, **fields)).attr
        return attr

    async def keep(self, path: str, seconds: float) -> None:
        """Keep what is removed from a directory."""
        await self.do("Setattr", path, trash_ms=int(seconds * 1000))

    async def trash(self, caller: pb.Caller = ROOT, **fields: Any) -> list[pb.TrashEntry]:
        """Everything in the trash, read in small pages."""
        entries: list[pb.TrashEntry] = []
        after = b""
        while True:
            page = await self.call("TrashList", pb.TrashListRequest(caller=caller, after=after, limit=2, **fields))
            entries += page.entries
            if not (after := page.next):
                return entries

    async def restore(self, entry: pb.TrashEntry, to: str | None = None, caller: pb.Caller = ROOT) -> pb.Attr:
        request = pb.TrashRestoreRequest(caller=caller, op=self.op(), id=entry.id)
        if to is not None:
            request.to.CopyFrom(pb.PathAt(inode=1, path=to.encode()))
        attr: pb.Attr = (await self.call("TrashRestore", request)).attr
        return attr

    async def purge(self, *entries: pb.TrashEntry, caller: pb.Caller = ROOT) -> int:
        request = pb.TrashPurgeRequest(caller=caller, op=self.op(), ids=[entry.id for entry in entries])
        purged: int = (await self.call("TrashPurge", request)).purged
        return purged

    async def names(self, path: str = "", **fields: Any) -> list[bytes]:
        return [entry.name for entry in (await self.do("List", path, **fields)).entries]

    async def code(self, name: str, path: str | bytes | None = None, /, **fields: Any) -> int:
        """The error code of an operation, 0 if it succeeds."""
        return await code(self.do(name, path, **fields))

    async def set_quota(self, path: str, **limits: int) -> pb.QuotaInfo:
        quota: pb.QuotaInfo = (await self.do("QuotaSet", path, **limits)).quota
        return quota

    async def quotas(self, path: str) -> list[pb.QuotaInfo]:
        """Those that count an inode, the innermost first."""
        return list((await self.do("QuotaGet", path)).quotas)

    async def used(self, path: str) -> tuple[int, int]:
        """(inodes, bytes) that the innermost quota of an inode counts."""
        quota = (await self.quotas(path))[0]
        return quota.inodes, quota.bytes

    async def write(self, path: str, length: int) -> None:
        """Make a file, if need be, and write up to `length` bytes."""
        made = await self.create(path, open_write=True)
        self.chunks.write(made.attr, length)
        report = pb.WriteReport(wrote=True, length=length, truncate_version=made.attr.truncate_version)
        await self.do("Close", inode=made.attr.inode, session=made.session, report=report)

    async def settle_quotas(self) -> None:
        """Restamp until there is nothing to do but to wait for inodes to go."""
        for _ in range(100):
            if not await self.engine.quota_walker.step():
                return
        raise AssertionError("the quotas do not settle")

    async def collect(self) -> None:
        """Run the garbage collector until it finds nothing to do."""
        for _ in range(100):
            if not await self.engine.collector.step() and not self.engine.collector.queued:
                return
        raise AssertionError("the gc queue does not become empty")

    async def rows(self, prefix: bytes) -> list[tuple[bytes, bytes]]:
        tr = self.store.transaction()
        try:
            return await tr.get_range(*keys.table(prefix))
        finally:
            tr.cancel()

    async def has_session(self, inode: int) -> bool:
        return any(keys.inode_of(key) == inode for key, _ in await self.rows(keys.SESSION))


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def code(coro: Coroutine[Any, Any, Any]) -> int:
    try:
        await coro
    except Fs3Error as exc:
        return exc.code
    return 0


def memory_of(meta: Meta) -> MemoryKv:
    """The store of a test that injects faults into it; skips the test on an engine that takes none."""
    if not isinstance(meta.store, MemoryKv):
        pytest.skip("injects faults into the store in memory")
    return meta.store


def faults(seed: int, rate: float = 0.08) -> KvFaults:
    """Everything a store may do to a transaction."""
    return KvFaults(
        random.Random(seed),
        commit_conflict=rate,
        commit_too_old=rate / 4,
        unknown_applied=rate,
        unknown_not_applied=rate,
        read_too_old=rate / 20,
        read_unavailable=rate / 20,
    )


async def audit(meta: Meta) -> None:
    """The namespace holds together: entries and inodes match, no cycle, counters are right, nothing dangles."""
    inodes: dict[int, Any] = {}
    subdirs: dict[int, int] = {}
    for key, value in await meta.rows(keys.INODE):
        ino = keys.inode_of(key)
        if len(key) == keys.INODE_KEY_BYTES:
            inodes[ino] = model.decode_inode(value)
        elif key.endswith(keys.SUBDIRS_SUFFIX):
            subdirs[ino] = model.decode_count(value)
    queued = {keys.gc_parts(key)[1] for key, _ in await meta.rows(keys.GC)}
    held = {keys.inode_of(key) for table in (keys.SESSION, keys.HOLD) for key, _ in await meta.rows(table)}
    links: dict[int, int] = {}
    counted: dict[int, int] = {}
    for key, value in await meta.rows(keys.DIRENT):
        parent = keys.inode_of(key)
        ino, kind = model.decode_dirent(value)
        assert parent in inodes, f"entry {key!r} of directory {parent:#x}, which is gone"
        assert inodes[parent].attr.type == model.DIRECTORY
        assert ino in inodes, f"entry {key!r} names inode {ino:#x}, which is gone"
        assert inodes[ino].attr.type == kind
        links[ino] = links.get(ino, 0) + 1
        if kind == model.DIRECTORY:
            counted[parent] = counted.get(parent, 0) + 1
            assert inodes[ino].attr.parent == parent
    for ino, record in inodes.items():
        attr = record.attr
        if attr.type == model.DIRECTORY:
            expected = 0 if ino in keys.TOP_INODES or record.detached else 1
            assert links.get(ino, 0) == expected, f"directory {ino:#x} has {links.get(ino, 0)} entries"
            assert subdirs.get(ino, 0) == counted.get(ino, 0)
            assert not record.detached or ino in queued
            seen = set()
            while ino not in keys.TOP_INODES and not inodes[ino].detached:
                assert ino not in seen, f"directory {ino:#x} is its own ancestor"
                seen.add(ino)
                ino = inodes[ino].attr.parent
        else:
            assert links.get(ino, 0) == attr.nlink, f"inode {ino:#x}: {attr.nlink} links, {links.get(ino, 0)} entries"
            assert attr.nlink or ino in queued or ino in held, f"inode {ino:#x} is an orphan"
    assert queued <= inodes.keys()
    assert not queued & held
    await _audit_trash(meta)
    await _audit_xattrs(meta, inodes)
    await _audit_quotas(meta, inodes)
    total = sum(model.decode_count(value) for _, value in await meta.rows(keys.COUNTER))
    assert total == len(inodes)


async def _audit_trash(meta: Meta) -> None:
    """Each entry of the trash has its record, and the other way round."""
    entries = {
        keys.dirent_name(key) for key, _ in await meta.rows(keys.DIRENT) if keys.inode_of(key) == keys.TRASH_INODE
    }
    assert entries == {keys.trash_entry_name(key) for key, _ in await meta.rows(keys.TRASH)}


async def _audit_quotas(meta: Meta, inodes: dict[int, Any]) -> None:
    """Quotas count what is stamped; once all is walked, what is in a directory has its stamp."""
    records = {record.id: record for record in (model.decode_quota(v) for _, v in await meta.rows(keys.QUOTA))}
    stamped = dict.fromkeys(records, quotas.NOTHING)
    for record in inodes.values():
        quota = record.quota
        while quota in records:
            stamped[quota] = stamped[quota].plus(quotas.of(record))
            quota = records[quota].outer
    counted = dict.fromkeys(records, quotas.NOTHING)
    for key, value in await meta.rows(keys.QUOTA_COUNTER):
        assert keys.inode_of(key) in records
        counted[keys.inode_of(key)] = counted[keys.inode_of(key)].plus(quotas.total([(key, value)]))
    if not any(record.carries for record in records.values()):
        assert counted == stamped
    if await meta.rows(keys.QUOTA_WALK):
        return
    for key, value in await meta.rows(keys.DIRENT):
        parent, child = inodes[keys.inode_of(key)], inodes[model.decode_dirent(value)[0]]
        inner = records.get(child.quota)
        stamp = inner.outer if inner is not None and inner.directory == child.attr.inode else child.quota
        several = child.attr.type != model.DIRECTORY and (child.attr.nlink > 1 or child.lost_names)
        kept = parent.attr.inode == keys.TRASH_INODE
        assert parent.detached or kept or several or stamp == parent.quota, f"inode {child.attr.inode:#x}: {child}"


async def _audit_xattrs(meta: Meta, inodes: dict[int, Any]) -> None:
    """Extended attributes belong to inodes, whose records count them and tell which there are."""
    kept: dict[int, dict[bytes, bytes]] = {}
    for ino, record in inodes.items():
        in_record = {
            b"security.capability": record.capability,
            b"system.posix_acl_access": record.attr.access_acl,
            b"system.posix_acl_default": record.default_acl,
        }
        if found := {name: value for name, value in in_record.items() if value}:
            kept[ino] = found
    for key, value in await meta.rows(keys.XATTR):
        kept.setdefault(keys.inode_of(key), {})[keys.xattr_name(key)] = model.decode_xattr(value)
    assert kept.keys() <= inodes.keys()
    for ino, record in inodes.items():
        found = kept.get(ino, {})
        assert record.xattr_name_bytes == sum(len(name) + 1 for name in found)
        assert record.xattr_bytes == sum(len(name) + len(value) for name, value in found.items())
        assert bool(record.attr.xattrs & pb.XATTR_BIT_ANY) == bool(found)
        assert bool(record.attr.xattrs & pb.XATTR_BIT_CAPABILITY) == bool(record.capability)
        assert bool(record.attr.xattrs & pb.XATTR_BIT_ACCESS_ACL) == bool(record.attr.access_acl)
        assert bool(record.attr.xattrs & pb.XATTR_BIT_DEFAULT_ACL) == bool(record.default_acl)
        if record.attr.access_acl:
            assert acl.mode_of(acl.decode(record.attr.access_acl)) == record.attr.mode & 0o777


__all__ = [
    "BY_NAME",
    "CHAINS",
    "CHUNK",
    "ROOT",
    "FakeChunks",
    "Meta",
    "VirtualClock",
    "audit",
    "code",
    "faults",
    "memory_of",
    "run",
    "until",
    "user",
]
