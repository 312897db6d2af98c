"""Inodes: as many names as they say, a way from each directory to the root, ids that are not handed out again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fs3.kv.api import Transaction
from fs3.meta import keys, model, tree, xattrs
from fs3.meta.context import OpContext
from fs3.meta.fsck.audit import SUSPECTS_MAX, Audit, Look
from fs3.meta.fsck.entries import subdirs_look
from fs3.meta.fsck.links import check_links
from fs3.meta.fsck.lost import adopt, lost_name
from fs3.meta.fsck.report import Finding
from fs3.meta.fsck.sorter import Sorter
from fs3.meta.paths import name_in, path_of
from fs3.meta.scan import Rows
from fs3.v1.disk_meta_pb2 import InodeRecord

# Directories that are remembered to lead to the root.
KNOWN_MAX: Final = 1 << 20
DEPTH_MAX: Final = 4096


async def check_inodes(audit: Audit, names: Sorter) -> None:
    """Look at every inode; `names` has the inodes that entries name."""
    audit.report.begin("inodes")
    links: set[int] = set()
    suspects: list[Look] = []
    known = set(keys.TOP_INODES)
    beyond: dict[bytes, tuple[int, int]] = {}
    counts = _Counts(names.counts())
    last = 0

    async def visit(tr: Transaction, rows: Rows) -> _Page:
        return await _page(tr, rows, last, known)

    async for page in audit.pages(keys.table(keys.INODE), visit):
        suspects += page.suspects
        links.update(page.forgotten)
        beyond |= {kind: max(found, beyond.get(kind, found)) for kind, found in page.beyond.items()}
        for record in page.records:
            last = record.attr.inode
            # What changed since the names were read says nothing.
            if counts.of(last) != _expected(record) and record.attr.ctime_ns < audit.started_ns:
                links.add(last)
        if len(suspects) >= SUSPECTS_MAX:
            await audit.confirm(suspects)
        if len(links) >= SUSPECTS_MAX:
            await check_links(audit, links)
        if len(known) > KNOWN_MAX:
            known.clear()
            known.update(keys.TOP_INODES)
    suspects += [allocator_look(ino) for _, ino in beyond.values()]
    await audit.confirm(suspects)
    await check_links(audit, links)


class _Counts:
    """How often inodes are named, asked for in ascending order."""

    def __init__(self, counts: Iterator[tuple[int, int]]) -> None:
        self._counts = counts
        self._next = next(counts, None)

    def of(self, ino: int) -> int:
        """The count of `ino`, which is not less than the one asked for before."""
        while self._next is not None and self._next[0] < ino:
            self._next = next(self._counts, None)
        return self._next[1] if self._next is not None and self._next[0] == ino else 0


def _expected(record: InodeRecord) -> int:
    """How many entries name the inode. Pure."""
    attr = record.attr
    if attr.type == model.DIRECTORY:
        return 0 if record.detached or attr.inode in keys.TOP_INODES else 1
    return attr.nlink


class _Page:
    """What a page of inode keys showed. `forgotten`: inodes without names that nobody is to remove."""

    def __init__(self) -> None:
        self.records: list[InodeRecord] = []
        self.suspects: list[Look] = []
        self.forgotten: list[int] = []
        # By allocator the greatest number that it has not handed out yet, and the inode that has it.
        self.beyond: dict[bytes, tuple[int, int]] = {}


async def _page(tr: Transaction, rows: Rows, last: int, known: set[int]) -> _Page:
    """`last`: the inode before the page. `known`: directories that lead to the root."""
    page = _Page()
    limits = await handed_out(tr)
    for key, value in rows:
        ino = keys.inode_of(key)
        if len(key) == keys.INODE_KEY_BYTES:
            last = ino
            await _record(tr, page, model.decode_inode(value), known, limits)
        elif ino != last:
            page.suspects.append(stray_look(key))
        elif key.endswith(keys.SUBDIRS_SUFFIX) and model.decode_count(value) and await tree.is_empty(tr, ino):
            page.suspects.append(subdirs_look(ino))
    return page


async def _record(tr: Transaction, page: _Page, record: InodeRecord, known: set[int], limits: tuple[int, int]) -> None:
    attr = record.attr
    page.records.append(record)
    if record.truncating and await tr.get(keys.truncation(attr.inode)) is None:
        page.suspects.append(truncating_look(attr.inode))
    # What has none is not looked at here: an attribute it does not tell of shows in the table of attributes.
    if attr.xattrs and await xattrs_look(attr.inode)(tr, None) is not None:
        page.suspects.append(xattrs_look(attr.inode))
    if not keys.is_handed_out(attr.inode, *limits):
        kind, number = keys.allocation_of(attr.inode)
        page.beyond[kind] = max(page.beyond.get(kind, (0, 0)), (number, attr.inode))
    directory = attr.type == model.DIRECTORY
    unlinked = record.detached if directory else not attr.nlink
    if unlinked and await tr.get(tree.gc_key(record)) is None and not await tree.is_kept(tr, attr.inode):
        page.forgotten.append(attr.inode)
    if directory and not await leads_to_root(tr, record, known):
        page.suspects.append(cycle_look(attr.inode))


async def leads_to_root(tr: Transaction, record: InodeRecord, known: set[int]) -> bool:
    """False when the parents of a directory form a circle. The others on the way are added to `known`."""
    way: list[int] = []
    current: InodeRecord | None = record
    while current is not None and current.attr.inode not in known:
        if current.attr.inode in way or len(way) > DEPTH_MAX:
            return False
        way.append(current.attr.inode)
        current = await tree.load(tr, current.attr.parent)
    known.update(way)
    return True


def cycle_look(ino: int) -> Look:
    """A look at a directory above which, it seems, there is no root."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        record = await tree.load(tr, ino)
        if record is None or await leads_to_root(tr, record, set(keys.TOP_INODES)):
            return None
        circle = await _circle(tr, record)
        # Each of a circle and what hangs on it is a suspect; one of them stands for all.
        if ino != min(circle):
            return None
        parent = record.attr.parent
        name = await name_in(tr, parent, ino)
        where = f"directory {ino:#x}" if name is None else await path_of(tr, parent, name)
        if ctx is not None:
            # Read once more, so that a rename at the same time conflicts.
            if name is not None and await tr.get(keys.dirent(parent, name)) is not None:
                tree.remove_entry(tr, parent, name, model.DIRECTORY)
            await adopt(tr, ctx, record)
            tree.store(tr, record)
        place = f"/lost+found/{lost_name(ino).decode()}"
        return Finding("circle", ino, where, f"lies below itself, {len(circle)} levels up", f"move it to {place}")

    return look


async def _circle(tr: Transaction, record: InodeRecord) -> list[int]:
    """The directories of the circle that the parents of `record` lead into."""
    way: list[int] = []
    current = record
    while current.attr.inode not in way:
        way.append(current.attr.inode)
        above = await tree.load(tr, current.attr.parent)
        assert above is not None
        current = above
    return way[way.index(current.attr.inode) :]


def stray_look(key: bytes) -> Look:
    """A look at a key of a directory that does not exist."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        ino = keys.inode_of(key)
        if await tr.get(key) is None or await tree.load(tr, ino) is not None:
            return None
        if ctx is not None:
            tr.clear(key)
        what = "counter" if key.endswith(keys.SUBDIRS_SUFFIX) else "times"
        return Finding(
            "stray-key", ino, f"key {key.hex()}", f"{what} of directory {ino:#x}, which is gone", "remove it"
        )

    return look


def truncating_look(ino: int) -> Look:
    """A look at an inode that waits for a truncation."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        record = await tree.load(tr, ino)
        if record is None or not record.truncating or await tr.get(keys.truncation(ino)) is not None:
            return None
        if ctx is not None:
            # How far it was cut is not known: chunks are looked for everywhere when the file goes.
            record.truncating, record.loose = False, True
            tree.store(tr, record)
        problem = "waits for a truncation that does not exist, and cannot be opened for writing"
        return Finding("truncating", ino, f"inode {ino:#x}", problem, "let it be opened")

    return look


def xattrs_look(ino: int) -> Look:
    """A look at what an inode tells of its extended attributes."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        record = await tree.load(tr, ino)
        if record is None or not await xattrs.recount(tr, record):
            return None
        if ctx is not None:
            tree.store(tr, record)
        problem = "tells of other extended attributes than it has"
        return Finding("xattrs", ino, f"inode {ino:#x}", problem, "count them")

    return look


async def handed_out(tr: Transaction) -> tuple[int, int]:
    """Next numbers of blocks and pieces of inode ids that nobody has."""
    blocks = await tr.get(keys.allocator(b"b"), snapshot=True)
    pieces = await tr.get(keys.allocator(b"p"), snapshot=True)
    return model.decode_count(blocks), model.decode_count(pieces)


def allocator_look(ino: int) -> Look:
    """A look at the inode with the greatest id of those that, it seems, will be handed out once more."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        if await tree.load(tr, ino) is None or keys.is_handed_out(ino, *await handed_out(tr)):
            return None
        kind, number = keys.allocation_of(ino)
        if ctx is not None:
            tr.add_read_conflict_key(keys.allocator(kind))
            tr.set(keys.allocator(kind), model.encode_count(number + 1))
        problem = "ids up to this one have not been handed out yet and would be used again"
        return Finding("allocator", ino, f"inode {ino:#x}", problem, "raise the allocator beyond it")

    return look
