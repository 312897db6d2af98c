"""The names of inodes: link counts, inodes without names, directories with several.

An inode does not know its names, so all entries are read to find those of the suspects. What they show counts only if
the inode did not change meanwhile: every change of a name writes its record, or the times of a directory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fs3.kv.api import Transaction
from fs3.meta import keys, model, scan, tree
from fs3.meta.context import OpContext
from fs3.meta.fsck.audit import LOOKS, Audit, Look, Unsettled
from fs3.meta.fsck.lost import adopt, lost_name
from fs3.meta.fsck.report import Finding
from fs3.meta.paths import path_of
from fs3.v1.disk_meta_pb2 import InodeRecord

SCAN_ROWS: Final = 1000

Entry = tuple[int, bytes]
State = tuple[bytes | None, bytes | None]


async def check_links(audit: Audit, suspects: set[int]) -> None:
    """Look again at the names of inodes, all together. Empties the set."""
    wrong = sorted(suspects)
    suspects.clear()
    for turn in range(1, LOOKS):
        if not wrong:
            return
        await audit.pause()
        last = turn == LOOKS - 1
        before = await audit.read(lambda tr, wrong=wrong: _states(tr, wrong))  # type: ignore[misc]
        names = await _names(audit, wrong)
        still = []
        for ino in wrong:
            look = links_look(ino, before[ino], names.get(ino, []))
            try:
                finding = await audit.look(look, repair=False)
                if finding is not None and last:
                    await audit.settle(look, finding)
            except Unsettled:
                audit.report.unsettled += last
                still.append(ino)
                continue
            if finding is not None:
                still.append(ino)
        wrong = still


async def _state(tr: Transaction, ino: int) -> State:
    """What changes whenever a name of the inode does."""
    return await tr.get(keys.inode(ino)), await tr.get(keys.directory_times(ino))


async def _states(tr: Transaction, inodes: Iterable[int]) -> dict[int, State]:
    return {ino: await _state(tr, ino) for ino in inodes}


async def _names(audit: Audit, inodes: Iterable[int]) -> dict[int, list[Entry]]:
    """Every entry that names one of `inodes`."""
    wanted = set(inodes)
    names: dict[int, list[Entry]] = {}
    async for rows in scan.pages(audit.store, keys.table(keys.DIRENT), limit=SCAN_ROWS):
        for key, value in rows:
            ino, _ = model.decode_dirent(value)
            if ino in wanted:
                names.setdefault(ino, []).append((keys.inode_of(key), keys.dirent_name(key)))
    return names


def links_look(ino: int, before: State, names: list[Entry]) -> Look:
    """A look at one inode, whose state was `before` when the search for its `names` began."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        record = await tree.load(tr, ino)
        if record is None:
            return None
        alive = [entry for entry in names if await _is_name(tr, entry, ino)]
        directory = record.attr.type == model.DIRECTORY
        finding = await (_directory if directory else _file)(tr, None, record, alive)
        if finding is None:
            return None
        if await _state(tr, ino) != before:
            raise Unsettled
        if ctx is not None:
            await (_directory if directory else _file)(tr, ctx, record, alive)
        return finding

    return look


async def _is_name(tr: Transaction, entry: Entry, ino: int) -> bool:
    value = await tr.get(keys.dirent(*entry))
    if value is None or model.decode_dirent(value)[0] != ino:
        return False
    directory = await tree.load(tr, entry[0])
    return directory is not None and directory.attr.type == model.DIRECTORY


async def _file(tr: Transaction, ctx: OpContext | None, record: InodeRecord, alive: list[Entry]) -> Finding | None:
    attr = record.attr
    if len(alive) == attr.nlink:
        return None if alive else await _unlinked(tr, ctx, record)
    if not alive:
        return await _lost(tr, ctx, record)
    problem = f"has {len(alive)} names, its link count says {attr.nlink}"
    if ctx is not None:
        attr.nlink = len(alive)
        attr.ctime_ns = ctx.now_ns
        tree.dequeue(tr, record)
        tree.store(tr, record)
    return Finding("link-count", attr.inode, await path_of(tr, *alive[0]), problem, "set the link count")


async def _directory(tr: Transaction, ctx: OpContext | None, record: InodeRecord, alive: list[Entry]) -> Finding | None:
    attr = record.attr
    root = attr.inode in keys.TOP_INODES
    if not alive:
        if root:
            return None
        return await (_unlinked if record.detached else _lost)(tr, ctx, record)
    if record.detached:
        if ctx is not None:
            record.detached = False
            tree.dequeue(tr, record)
            tree.store(tr, record)
        problem = "is marked as removed and has a name"
        return Finding("removed-directory", attr.inode, await path_of(tr, *alive[0]), problem, "keep the directory")
    if len(alive) == 1 and not root:
        return None
    kept = next((entry for entry in alive if entry[0] == attr.parent), alive[0])
    extra = [entry for entry in alive if root or entry != kept]
    where = ", ".join([await path_of(tr, *entry) for entry in extra])
    if ctx is not None:
        for parent, name in extra:
            tree.remove_entry(tr, parent, name, model.DIRECTORY)
            tree.touch_directory(tr, parent, ctx.now_ns)
    own = "/" if root else await path_of(tr, *kept)
    return Finding("directory-names", attr.inode, where, f"further names of directory {own}", "remove these names")


async def _unlinked(tr: Transaction, ctx: OpContext | None, record: InodeRecord) -> Finding | None:
    """An inode that is to go has to be queued, or kept by a session or hold."""
    attr = record.attr
    if await tr.get(tree.gc_key(record)) is not None or await tree.is_kept(tr, attr.inode):
        return None
    if ctx is not None:
        await tree.enqueue(tr, ctx, record)
    problem = "has no name, is not open and waits for no removal"
    return Finding("not-queued", attr.inode, f"inode {attr.inode:#x}", problem, "queue it for removal")


async def _lost(tr: Transaction, ctx: OpContext | None, record: InodeRecord) -> Finding:
    """An inode that should have a name."""
    attr = record.attr
    if ctx is not None:
        await adopt(tr, ctx, record)
        tree.dequeue(tr, record)
        tree.store(tr, record)
    place = f"/lost+found/{lost_name(attr.inode).decode()}"
    return Finding("no-name", attr.inode, f"inode {attr.inode:#x}", "no entry names it", f"name it {place}")
