"""The trash: what is removed from a directory with ``trash_ms`` moves into a directory that no path leads to.

It keeps its inode, and so its link count, sessions, usage and chunks, until it is restored, purged or expired. Its
name there says when that is, where it came from and what it is, so that the first entries are the next to go; a record
beside the entry says its name before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fs3.core.clock import Clock
from fs3.core.errors import Fs3Error, error
from fs3.kv import retry
from fs3.kv.api import KvStore, Transaction
from fs3.meta import keys, model, tree
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord, TrashRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Attr, Caller

# A hundred years, so that times of expiry stay within 64 bits.
KEEP_MS_MAX: Final = 100 * 365 * 86_400_000
# Entries that one transaction of the expiry removes.
EXPIRE_ENTRIES: Final = 64


@dataclass(frozen=True, slots=True)
class Trashed:
    """An entry of the trash: its name there, what that says, and its record."""

    name: bytes
    expires_ns: int
    parent: int
    record: TrashRecord
    child: InodeRecord

    def visible(self, caller: Caller) -> bool:
        """Whether the caller may know of it, restore and purge it."""
        return caller.uid in (0, self.record.removed_by, self.child.attr.uid)


def keeps(parent: InodeRecord, child: InodeRecord) -> bool:
    """Whether `child` goes to the trash when it is removed from `parent`: not while it has other names."""
    return parent.attr.trash_ms > 0 and (child.attr.type == model.DIRECTORY or child.attr.nlink == 1)


async def put(
    tr: Transaction, ctx: OpContext, parent: InodeRecord, name: bytes, child: InodeRecord, caller: Caller
) -> None:
    """Keep an inode whose entry `name` of `parent` has just been removed."""
    expires_ns = ctx.now_ns + parent.attr.trash_ms * 1_000_000
    entry = keys.trash_name(expires_ns, parent.attr.inode, child.attr.inode)
    record = TrashRecord(format=model.FORMAT, name=name, removed_ns=ctx.now_ns, removed_by=caller.uid)
    tr.set(keys.trash(entry), record.SerializeToString())
    await tree.place(tr, ctx, child, keys.TRASH_INODE, entry)


async def find(tr: Transaction, name: bytes, caller: Caller) -> Trashed | None:
    """The entry `name`; None when there is none. Raises INVALID_ARGUMENT, and NOT_PERMITTED for somebody else's."""
    try:
        expires_ns, parent, _ = keys.trash_parts(name)
    except ValueError:
        raise error(Code.CODE_INVALID_ARGUMENT, "this is not the id of anything in the trash") from None
    value, kept = await tr.get(keys.dirent(keys.TRASH_INODE, name)), await tr.get(keys.trash(name))
    if value is None:
        return None
    child = await tree.load(tr, model.decode_dirent(value)[0])
    if child is None or kept is None:
        raise error(Code.CODE_INTERNAL, "an entry of the trash is damaged: run fs3 admin fsck --repair")
    found = Trashed(name, expires_ns, parent, model.decode_trash(kept), child)
    if not found.visible(caller):
        raise error(Code.CODE_NOT_PERMITTED, "it belongs to somebody else, who also removed it")
    return found


def take(tr: Transaction, found: Trashed) -> None:
    """Remove the entry; what becomes of its inode is the caller's business."""
    tree.remove_entry(tr, keys.TRASH_INODE, found.name, found.child.attr.type)
    tr.clear(keys.trash(found.name))


async def purge(tr: Transaction, ctx: OpContext, found: Trashed) -> None:
    """Remove an entry for good; of a directory also what is in it."""
    take(tr, found)
    if found.child.attr.type == model.DIRECTORY:
        await tree.detach(tr, ctx, found.child)
    else:
        await tree.drop_link(tr, ctx, found.child, hold_session=b"", client_id=b"")


async def ensure(tr: Transaction, ctx: OpContext) -> None:
    """Make the trash directory if there is none. Only root may enter it."""
    if await tree.load(tr, keys.TRASH_INODE) is not None:
        return
    attr = Attr(inode=keys.TRASH_INODE, type=model.DIRECTORY, mode=0o700, nlink=2, parent=keys.TRASH_INODE)
    attr.atime_ns = attr.mtime_ns = attr.ctime_ns = ctx.now_ns
    tree.store(tr, InodeRecord(format=model.FORMAT, attr=attr))
    tree.touch_directory(tr, keys.TRASH_INODE, ctx.now_ns)
    tr.add(keys.counter(ctx.counter_shard), 1)


class Expirer:
    """Purges what has been in the trash for long enough. Belongs to one event loop."""

    def __init__(self, store: KvStore, clock: Clock, new_context: Callable[[], OpContext]) -> None:
        self._store = store
        self._clock = clock
        self._new_context = new_context

    async def step(self) -> int:
        """Purge everything that has expired; returns how many entries."""
        purged = 0
        while count := await self._page():
            purged += count
        return purged

    async def _page(self) -> int:
        ctx = self._new_context()
        root = Caller(uid=0, gid=0)

        async def expire(tr: Transaction) -> int:
            ctx.begin()
            begin, end = keys.dirents(keys.TRASH_INODE)
            rows = await tr.get_range(begin, end, limit=EXPIRE_ENTRIES, snapshot=True)
            purged = 0
            for key, _ in rows:
                name = keys.dirent_name(key)
                if keys.trash_parts(name)[0] > ctx.now_ns:
                    break
                found = await find(tr, name, root)
                if found is not None:
                    await purge(tr, ctx, found)
                    purged += 1
            return purged

        return await retry.run(self._store, expire, idempotent=True)


def gone() -> Fs3Error:
    """ENOENT."""
    return error(Code.CODE_NOT_FOUND, "it is not in the trash any more")
