"""What belongs to inodes belongs to ones that exist, stored answers are not too old, and inodes are counted right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fs3.kv.api import Transaction
from fs3.meta import keys, model, tree
from fs3.meta.context import OpContext
from fs3.meta.fsck.audit import LOOKS, SUSPECTS_MAX, Audit, Look, Unsettled
from fs3.meta.fsck.inodes import xattrs_look
from fs3.meta.fsck.lost import lost_name
from fs3.meta.fsck.report import Finding
from fs3.meta.scan import Rows
from fs3.meta.sweeper import Sweeper
from fs3.v1.disk_meta_pb2 import InodeRecord, TrashRecord

# Stored answers go this much after their time at the latest.
SWEEP_SLACK_S: Final = 1200.0
# Inode keys that are counted in one transaction.
COUNT_ROWS: Final = 4096


async def check_tables(audit: Audit) -> None:
    """Look at every session, hold, queued inode, truncation and extended attribute."""
    for step, prefix, look_at in (
        ("sessions", keys.SESSION, session_look),
        ("holds", keys.HOLD, hold_look),
        ("gc queue", keys.GC, queued_look),
        ("truncations", keys.TRUNCATION, truncation_look),
        ("extended attributes", keys.XATTR, xattr_look),
        ("trash", keys.TRASH, trash_look),
    ):
        audit.report.begin(step)
        await _check_table(audit, keys.table(prefix), look_at)
    await _check_table(audit, keys.dirents(keys.TRASH_INODE), trash_entry_look)


async def _check_table(audit: Audit, table: tuple[bytes, bytes], look_at: Callable[[bytes], Look]) -> None:
    async def visit(tr: Transaction, rows: Rows) -> list[Look]:
        looks = [look_at(key) for key, _ in rows]
        return [look for look in looks if await look(tr, None) is not None]

    suspects: list[Look] = []
    async for wrong in audit.pages(table, visit):
        suspects += wrong
        if len(suspects) >= SUSPECTS_MAX:
            await audit.confirm(suspects)
    await audit.confirm(suspects)


def session_look(key: bytes) -> Look:
    """A look at a session."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        ino = keys.inode_of(key)
        if await tr.get(key) is None or await tree.load(tr, ino) is not None:
            return None
        if ctx is not None:
            tr.clear(key)
        where = f"session {keys.session_id(key).hex()}"
        return Finding("stray-session", ino, where, f"of inode {ino:#x}, which is gone", "remove it")

    return look


def hold_look(key: bytes) -> Look:
    """A look at a hold."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        ino, client_id = keys.inode_of(key), keys.hold_client(key)
        if await tr.get(key) is None:
            return None
        gone = await tree.load(tr, ino) is None
        if not gone and await tr.get(keys.keepalive(client_id)) is not None:
            return None
        if ctx is not None:
            await tree.end_hold(tr, ctx, ino, client_id)
        problem = f"of inode {ino:#x}, which is gone" if gone else f"of inode {ino:#x}, by nobody who is known"
        return Finding("stray-hold", ino, f"hold of client {client_id.hex()}", problem, "remove it")

    return look


def queued_look(key: bytes) -> Look:
    """A look at an entry of the gc queue."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        _, ino = keys.gc_parts(key)
        if await tr.get(key) is None:
            return None
        record = await tree.load(tr, ino)
        problem = await _not_collectable(tr, key, record)
        if problem is None:
            return None
        if ctx is not None:
            tr.clear(key)
            if record is not None and tree.gc_key(record) == key:
                tree.dequeue(tr, record)
                tree.store(tr, record)
        return Finding("queued-in-use", ino, f"inode {ino:#x}", problem, "take it off the queue")

    return look


async def _not_collectable(tr: Transaction, key: bytes, record: InodeRecord | None) -> str | None:
    if record is None:
        return "is queued for removal and gone"
    if tree.gc_key(record) != key:
        return "is queued for removal at another time than it says"
    if not record.detached if record.attr.type == model.DIRECTORY else record.attr.nlink:
        return "is queued for removal and has a name"
    if await tree.is_kept(tr, record.attr.inode):
        return "is queued for removal and open"
    return None


def truncation_look(key: bytes) -> Look:
    """A look at a pending truncation."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        ino = keys.inode_of(key)
        if await tr.get(key) is None:
            return None
        record = await tree.load(tr, ino)
        if record is not None and record.attr.type == model.FILE and record.truncating:
            return None
        if ctx is not None:
            tr.clear(key)
        problem = "is gone" if record is None else "waits for none"
        return Finding("stray-truncation", ino, f"truncation of inode {ino:#x}", f"the inode {problem}", "remove it")

    return look


def xattr_look(key: bytes) -> Look:
    """A look at an extended attribute."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        ino = keys.inode_of(key)
        record = await tree.load(tr, ino)
        if await tr.get(key) is None:
            return None
        if record is not None:
            return None if record.attr.xattrs else await xattrs_look(ino)(tr, ctx)
        if ctx is not None:
            tr.clear(key)
        where = f"attribute {keys.xattr_name(key).decode(errors='backslashreplace')}"
        return Finding("stray-xattr", ino, where, f"of inode {ino:#x}, which is gone", "remove it")

    return look


def trash_look(key: bytes) -> Look:
    """A look at the record of an entry of the trash."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        name = keys.trash_entry_name(key)
        if await tr.get(key) is None or await tr.get(keys.dirent(keys.TRASH_INODE, name)) is not None:
            return None
        if ctx is not None:
            tr.clear(key)
        where = f"record {name.decode(errors='backslashreplace')}"
        return Finding("stray-trash", 0, where, "of something that is not in the trash", "remove it")

    return look


def trash_entry_look(key: bytes) -> Look:
    """A look at an entry of the trash directory."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        name = keys.dirent_name(key)
        value = await tr.get(key)
        if value is None or await tr.get(keys.trash(name)) is not None:
            return None
        ino, _ = model.decode_dirent(value)
        if ctx is not None:
            record = TrashRecord(format=model.FORMAT, name=lost_name(ino), removed_ns=ctx.now_ns)
            tr.set(keys.trash(name), record.SerializeToString())
        where = f"entry {name.decode()} of the trash"
        return Finding("trash-record", ino, where, "has no record", f"let it be {lost_name(ino).decode()}")

    return look


async def check_answers(audit: Audit, sweeper: Sweeper) -> None:
    """Stored answers that nobody will ask for have been removed."""
    audit.report.begin("stored answers")
    old = await sweeper.overdue(SWEEP_SLACK_S)
    if not old:
        return
    if audit.options.repair:
        await sweeper.step()
    finding = Finding("old-answers", 0, "stored answers", f"{old} are kept for longer than they may be", "remove them")
    audit.report.add(finding, repaired=audit.options.repair)


async def check_inode_counter(audit: Audit) -> None:
    """As many inodes exist as are counted. A look during which the counter changes says nothing."""
    audit.report.begin("inode counter")
    seen: set[tuple[int, int] | None] = set()
    for turn in range(LOOKS):
        if turn:
            await audit.pause()
        found, counted = await _count(audit)
        if counted is not None and found == counted:
            return
        seen.add(None if counted is None else (found, counted))
    look = seen.pop()
    if seen or look is None:
        audit.report.unsettled += 1
        return
    found, counted = look
    problem = f"says {counted}, there are {found} inodes"
    finding = Finding("inode-counter", 0, "counter of inodes", problem, "set the counter")
    await audit.settle(_counter_look(finding, counted, found), finding)


async def _count(audit: Audit) -> tuple[int, int | None]:
    """(inodes, what their counter says, None when it changed while they were counted)."""
    found = 0
    counters: set[tuple[int, ...]] = set()
    async for count, shards in audit.pages(keys.table(keys.INODE), _count_page, limit=COUNT_ROWS):
        found += count
        counters.add(shards)
    return found, sum(counters.pop()) if len(counters) == 1 else None


async def _count_page(tr: Transaction, rows: Rows) -> tuple[int, tuple[int, ...]]:
    return sum(len(key) == keys.INODE_KEY_BYTES for key, _ in rows), await _counters(tr, snapshot=True)


async def _counters(tr: Transaction, *, snapshot: bool) -> tuple[int, ...]:
    rows = await tr.get_range(*keys.table(keys.COUNTER), snapshot=snapshot)
    return tuple(model.decode_count(value) for _, value in rows)


def _counter_look(finding: Finding, counted: int, found: int) -> Look:
    """Sets the counter if it still says `counted`. Which shard does it does not matter: their sum counts."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        now = sum(await _counters(tr, snapshot=False))
        if now == found:
            # An earlier attempt, whose outcome was not known, has set it.
            return None
        if now != counted:
            raise Unsettled
        if ctx is not None:
            tr.add(keys.counter(0), found - counted)
        return finding

    return look
