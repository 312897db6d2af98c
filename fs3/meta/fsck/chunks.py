"""Chunks on storage: each belongs to an inode, lies where its layout says and within its extent, and replicas agree.

The listings of the serving replicas of a chain come in the order of chunk ids and are read side by side, a page of each
in memory. The inodes of a batch of chunks are read after the chunks were listed: an inode that is missing then was
there when its chunks were made, and its id is never used again.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final, Protocol

from fs3.core.errors import Fs3Error, error
from fs3.core.layout import place_of
from fs3.kv.api import Transaction
from fs3.meta import keys, model, tree
from fs3.meta.chunks import SPACE_FILES
from fs3.meta.clock import monotonic_s
from fs3.meta.context import OpContext
from fs3.meta.fsck.audit import LOOKS, SUSPECTS_MAX, Audit
from fs3.meta.fsck.inodes import handed_out
from fs3.meta.fsck.report import Finding
from fs3.meta.ops.list import attributes
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Layout
from fs3.v1.storage_pb2 import ChunkInfo

PAGE_CHUNKS: Final = 1024
BATCH_CHUNKS: Final = 512
CALL_S: Final = 30.0
# With the pauses between them longer than a lease, so that a replica that failed is not asked any more.
CHAIN_TURNS: Final = 8
REPLICAS: Final = "replicas"
LAYOUT: Final = "chunk-layout"
EXTENT: Final = "chunk-extent"
_ID = struct.Struct(">IQI")


class ChunkLister(Protocol):
    """What storage has, and a way to remove it. Methods raise Fs3Error when a node does not answer."""

    def chains(self) -> list[int]:
        """Every chain."""

    def replicas(self, chain_id: int) -> list[int]:
        """Targets that serve, head first."""

    def stripe(self, layout: Layout) -> list[int]:
        """See :class:`fs3.meta.chunks.ChunkStore`."""

    async def list_chunks(
        self, chain_id: int, target_id: int, after: bytes, limit: int, *, ends_s: float
    ) -> list[ChunkInfo]:
        """Chunks of a target whose ids are greater than `after`, in order; fewer than `limit` at the end only."""

    async def remove(
        self, chain_id: int, inode: int, first_index: int, *, ends_s: float, space: int = SPACE_FILES
    ) -> int:
        """See :class:`fs3.meta.chunks.ChunkStore`."""


Held = dict[int, ChunkInfo]


@dataclass
class _Orphan:
    """Chunks of an inode that is gone. `since_s`: when that was seen first."""

    since_s: float
    chains: set[int] = field(default_factory=set)
    chunks: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Suspect:
    """A chunk that looked wrong. `held`: what each replica had."""

    kind: str
    chain_id: int
    chunk_id: bytes
    held: dict[int, bytes]


class ChunkAudit:
    """One pass over everything stored. Belongs to one event loop."""

    def __init__(self, audit: Audit, lister: ChunkLister) -> None:
        self._audit = audit
        self._lister = lister
        # By space and inode.
        self._orphans: dict[tuple[int, int], _Orphan] = {}
        # By kind and chunk: a chain may be looked at more than once.
        self._suspects: dict[tuple[str, int, bytes], _Suspect] = {}

    async def run(self) -> None:
        """Look at every chain. One that cannot be listed is a finding."""
        report = self._audit.report
        for chain_id in self._lister.chains():
            problem = await self._chain_in_time(chain_id)
            if problem is not None:
                report.add(Finding("chain", 0, f"chain {chain_id}", problem), repaired=False)
        await self._confirm()
        await self._confirm_orphans()

    async def _chain_in_time(self, chain_id: int) -> str | None:
        """Look at a chain, again from its beginning when a replica leaves it; why that was not possible."""
        problem = None
        for turn in range(CHAIN_TURNS):
            self._audit.report.begin(f"chunks of chain {chain_id}")
            if turn:
                await self._audit.pause()
            try:
                await self._chain(chain_id)
                return None
            except Fs3Error as exc:
                problem = f"cannot be looked at: {exc.message}"
        return problem

    async def _chain(self, chain_id: int) -> None:
        batch: list[tuple[bytes, Held]] = []
        replicas = self._lister.replicas(chain_id)
        if not replicas:
            raise error(Code.CODE_UNAVAILABLE, "no replica serves")
        async for chunk_id, held in self._merged(chain_id, replicas):
            batch.append((chunk_id, held))
            if len(batch) == BATCH_CHUNKS:
                await self._batch(chain_id, replicas, batch)
                batch = []
        await self._batch(chain_id, replicas, batch)

    async def _merged(self, chain_id: int, replicas: list[int]) -> AsyncIterator[tuple[bytes, Held]]:
        """Each chunk with what every replica has of it, in order."""
        listings = {target: self._listing(chain_id, target) for target in replicas}
        heads = {target: await anext(listing, None) for target, listing in listings.items()}
        while present := [info.chunk_id for info in heads.values() if info is not None]:
            chunk_id = min(present)
            held = {target: info for target, info in heads.items() if info is not None and info.chunk_id == chunk_id}
            yield chunk_id, held
            for target in held:
                heads[target] = await anext(listings[target], None)

    async def _listing(self, chain_id: int, target_id: int) -> AsyncIterator[ChunkInfo]:
        after = b""
        while True:
            infos = await self._list(chain_id, target_id, after, PAGE_CHUNKS)
            for info in infos:
                yield info
            if len(infos) < PAGE_CHUNKS:
                return
            after = infos[-1].chunk_id

    async def _list(self, chain_id: int, target_id: int, after: bytes, limit: int) -> list[ChunkInfo]:
        ends_s = monotonic_s(self._audit.clock) + CALL_S
        return await self._lister.list_chunks(chain_id, target_id, after, limit, ends_s=ends_s)

    async def _batch(self, chain_id: int, replicas: list[int], batch: list[tuple[bytes, Held]]) -> None:
        """Look at chunks that were listed a moment ago."""
        self._audit.report.looked_at += len(batch)
        inodes = {_ID.unpack(chunk_id)[1] for chunk_id, _ in batch}
        records, written = await self._audit.read(lambda tr: _living(tr, inodes))
        for chunk_id, held in batch:
            space, ino, index = _ID.unpack(chunk_id)
            if (kind := differs(replicas, held)) is not None:
                self._suspect(kind, chain_id, chunk_id, held)
            record = records.get(ino)
            if record is None:
                self._orphan((space, ino), chain_id)
            elif space == SPACE_FILES:
                kind = self._misplaced(record, chain_id, index, next(iter(held.values())))
                if kind is not None and not (kind == EXTENT and ino in written):
                    self._suspect(kind, chain_id, chunk_id, held)
        if len(self._suspects) >= SUSPECTS_MAX:
            await self._confirm()

    def _suspect(self, kind: str, chain_id: int, chunk_id: bytes, held: Held) -> None:
        self._suspects[kind, chain_id, chunk_id] = _Suspect(kind, chain_id, chunk_id, _frozen(held))

    def _orphan(self, owner: tuple[int, int], chain_id: int) -> None:
        orphan = self._orphans.get(owner)
        if orphan is None:
            if len(self._orphans) >= SUSPECTS_MAX:
                self._audit.report.unsettled += 1
                return
            orphan = self._orphans[owner] = _Orphan(monotonic_s(self._audit.clock))
        orphan.chains.add(chain_id)

    def _misplaced(self, record: InodeRecord, chain_id: int, index: int, info: ChunkInfo) -> str | None:
        """The kind of what is wrong with the place of a chunk of a living inode."""
        if not info.committed_version:
            return None
        layout = record.attr.layout
        stripe = self._lister.stripe(layout) if record.attr.type == model.FILE else []
        if not stripe or stripe[place_of(layout, index)] != chain_id or info.chunk_bytes != layout.chunk_bytes:
            return LAYOUT
        if not record.loose and not record.truncating and _end(record, index, info) > record.extent_bytes:
            return EXTENT
        return None

    async def _confirm(self) -> None:
        """Look again at single chunks; report what was wrong every time and did not change."""
        suspects = list(self._suspects.values())
        self._suspects.clear()
        for turn in range(1, LOOKS):
            if not suspects:
                return
            await self._audit.pause()
            last = turn == LOOKS - 1
            suspects = [suspect for suspect in suspects if await self._again(suspect, last)]

    async def _again(self, suspect: _Suspect, last: bool) -> bool:
        try:
            finding = await self._look(suspect)
        except Fs3Error as exc:
            finding = Finding(suspect.kind, 0, _where(suspect), f"cannot be looked at again: {exc.message}")
        if finding is not None and last:
            await self._settle(suspect, finding)
        return finding is not None

    async def _look(self, suspect: _Suspect) -> Finding | None:
        _, ino, index = _ID.unpack(suspect.chunk_id)
        before = await self._audit.read(lambda tr: _state(tr, ino))
        replicas = self._lister.replicas(suspect.chain_id)
        held = await self._held(suspect.chain_id, replicas, suspect.chunk_id)
        if not held or _frozen(held) != suspect.held:
            return None
        if suspect.kind == REPLICAS:
            problem = "; ".join(f"target {target}: {_describe(held.get(target))}" for target in replicas)
            return Finding(REPLICAS, ino, _where(suspect), problem) if differs(replicas, held) else None
        record, sessions = before
        if record is None or (record, sessions) != await self._audit.read(lambda tr: _state(tr, ino)):
            return None
        info = next(iter(held.values()))
        kind = self._misplaced(record, suspect.chain_id, index, info)
        if kind != suspect.kind or (kind == EXTENT and sessions):
            return None
        if kind == LAYOUT:
            problem = f"is not where the layout of the file has chunk {index}, or of another size"
            return Finding(kind, ino, _where(suspect), problem, bytes=info.length)
        problem = f"reaches to byte {_end(record, index, info)} of a file with bytes up to {record.extent_bytes}"
        return Finding(kind, ino, _where(suspect), problem, "look for it everywhere when the file goes")

    async def _held(self, chain_id: int, replicas: list[int], chunk_id: bytes) -> Held:
        """What the replicas have of one chunk now."""
        held: Held = {}
        for target in replicas:
            infos = await self._list(chain_id, target, _before(chunk_id), 1)
            if infos and infos[0].chunk_id == chunk_id:
                held[target] = infos[0]
        return held

    async def _settle(self, suspect: _Suspect, finding: Finding) -> None:
        ino = finding.inode

        async def loosen(tr: Transaction, ctx: OpContext | None) -> Finding | None:
            record = await tree.load(tr, ino)
            if record is not None and ctx is not None:
                record.loose = True
                tree.store(tr, record)
            return finding

        await self._audit.settle(loosen, finding)

    async def _confirm_orphans(self) -> None:
        """Count what inodes that are gone have left, LOOKS - 1 times; remove it if told to and old enough."""
        self._audit.report.begin("chunks without inode")
        for _ in range(1, LOOKS):
            if not self._orphans:
                return
            await self._audit.pause()
            for owner in list(self._orphans):
                try:
                    await self._recount(owner, self._orphans[owner])
                except Fs3Error:
                    del self._orphans[owner]
                    self._audit.report.unsettled += 1
        limits = await self._audit.read(handed_out)
        for (space, ino), orphan in sorted(self._orphans.items()):
            await self._report_orphan(space, ino, orphan, foreign=not keys.is_handed_out(ino, *limits))

    async def _recount(self, owner: tuple[int, int], orphan: _Orphan) -> None:
        """Count the chunks that are still there of an inode that is still gone, or forget it."""
        orphan.chunks = orphan.bytes = 0
        space, ino = owner
        gone = await self._audit.read(lambda tr: tree.load(tr, ino)) is None
        for chain_id in orphan.chains if gone else ():
            replicas = self._lister.replicas(chain_id)
            after = _before(_ID.pack(space, ino, 0))
            while replicas:
                infos = await self._list(chain_id, replicas[-1], after, PAGE_CHUNKS)
                own = [info for info in infos if _ID.unpack(info.chunk_id)[:2] == owner]
                orphan.chunks += len(own)
                orphan.bytes += sum(info.length for info in own)
                if len(own) < PAGE_CHUNKS:
                    break
                after = own[-1].chunk_id
        if not orphan.chunks:
            del self._orphans[owner]

    async def _report_orphan(self, space: int, ino: int, orphan: _Orphan, *, foreign: bool) -> None:
        audit = self._audit
        where = f"{'chunks' if space == SPACE_FILES else 'entries of the KV cache'} of inode {ino:#x}"
        problem = f"{orphan.chunks} chunks, {orphan.bytes} bytes on each replica, of an inode that is gone"
        if foreign:
            problem += "; this metadata store never made it: is the store older than the chunks?"
            audit.report.add(Finding("foreign-chunks", ino, where, problem, bytes=orphan.bytes), repaired=False)
            return
        finding = Finding("orphan-chunks", ino, where, problem, "remove them (--repair-chunks)", bytes=orphan.bytes)
        repaired = audit.options.repair_chunks and await self._remove(space, ino, orphan)
        audit.report.add(finding, repaired=repaired)

    async def _remove(self, space: int, ino: int, orphan: _Orphan) -> bool:
        """Remove the chunks once the inode has been gone for long enough; False when a chain does not answer."""
        audit = self._audit
        audit.report.step = "waiting until chunks of removed inodes are old enough"
        await audit.clock.sleep(max(0.0, orphan.since_s + audit.options.orphan_age_s - monotonic_s(audit.clock)))
        if await audit.read(lambda tr: tree.load(tr, ino)) is not None:
            return False
        try:
            for chain_id in sorted(orphan.chains):
                await self._lister.remove(chain_id, ino, 0, ends_s=monotonic_s(audit.clock) + CALL_S, space=space)
        except Fs3Error:
            return False
        return True


async def _living(tr: Transaction, inodes: set[int]) -> tuple[dict[int, InodeRecord], set[int]]:
    """The records of `inodes`, and which of them have sessions."""
    return await attributes(tr, list(inodes)), {ino for ino in inodes if await tree.has_sessions(tr, ino)}


async def _state(tr: Transaction, ino: int) -> tuple[InodeRecord | None, bool]:
    return await tree.load(tr, ino), await tree.has_sessions(tr, ino)


def differs(replicas: list[int], held: Held) -> str | None:
    """REPLICAS when the serving replicas differ in a chunk that nobody is updating. Pure."""
    if any(info.pending_version for info in held.values()):
        return None
    contents = {(info.committed_version, info.length, info.chunk_crc32c) for info in held.values()}
    return REPLICAS if len(contents) > 1 or len(held) < len(replicas) else None


def _end(record: InodeRecord, index: int, info: ChunkInfo) -> int:
    """End of a chunk in the file, bytes; 0 for an empty one, which holds nothing."""
    return index * record.attr.layout.chunk_bytes + info.length if info.length else 0


def _frozen(held: Held) -> dict[int, bytes]:
    return {target: info.SerializeToString(deterministic=True) for target, info in held.items()}


def _before(chunk_id: bytes) -> bytes:
    """The greatest chunk id less than `chunk_id`."""
    return (int.from_bytes(chunk_id, "big") - 1).to_bytes(_ID.size, "big")


def _where(suspect: _Suspect) -> str:
    _, ino, index = _ID.unpack(suspect.chunk_id)
    return f"chunk {index} of inode {ino:#x} on chain {suspect.chain_id}"


def _describe(info: ChunkInfo | None) -> str:
    if info is None:
        return "nothing"
    return f"version {info.committed_version}, {info.length} bytes, crc {info.chunk_crc32c:08x}"
