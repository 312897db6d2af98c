"""Remove a file, or a directory with everything below it, as one atomic detach."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv import retry
from fs3.kv.api import KvStore, Transaction, TransactionFn
from fs3.meta import access, keys, model, trash, tree, walk
from fs3.meta.context import OpContext
from fs3.meta.ops import list as listing
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Caller, Empty, RemoveAllRequest

# Entries that one transaction of the permission check reads.
CHECK_ENTRIES: Final = 1024
_NEEDED: Final = access.READ | access.WRITE | access.SEARCH


async def prepare(store: KvStore, request: RemoveAllRequest) -> None:
    """Check, for anybody but root, that the caller could remove every entry one by one.

    Many short transactions: entries that are made meanwhile go without a check of their own, as their makers could
    write a directory that goes. Raises ACCESS, NOT_PERMITTED. The memory it takes is the number of directories.
    """
    caller = request.caller
    if caller.uid == 0:
        return

    async def top(tr: Transaction) -> InodeRecord | None:
        return (await walk.walk(tr, request.at, caller, follow=False, entry=True)).child

    root = await retry.run(store, top)
    todo = [root.attr.inode] if root is not None and root.attr.type == model.DIRECTORY else []
    while todo:
        ino, after = todo.pop(), b""
        while True:
            subdirs, after = await retry.run(store, _checker(ino, after, caller))
            todo += subdirs
            if not after:
                break


def _checker(ino: int, after: bytes, caller: Caller) -> TransactionFn[tuple[list[int], bytes]]:
    async def check(tr: Transaction) -> tuple[list[int], bytes]:
        """Check one page of a directory; returns its subdirectories and where to go on, "" at the end."""
        directory = await tree.load(tr, ino)
        if directory is None:
            return [], b""
        rows = await tr.get_range(*keys.dirents(ino, after), limit=CHECK_ENTRIES, snapshot=True)
        if not rows:
            return [], b""
        access.require(directory.attr, caller, _NEEDED)
        entries = [model.decode_dirent(value) for _, value in rows]
        if directory.attr.mode & model.STICKY and caller.uid != directory.attr.uid:
            records = await listing.attributes(tr, [child for child, _ in entries])
            for record in records.values():
                access.require_sticky(directory.attr, record.attr, caller)
        end = len(rows) < CHECK_ENTRIES
        return [i for i, kind in entries if kind == model.DIRECTORY], b"" if end else keys.dirent_name(rows[-1][0])

    return check


async def run(tr: Transaction, request: RemoveAllRequest, ctx: OpContext) -> Empty:
    """Detach the tree; the garbage collector takes it apart. Raises NOT_FOUND, ACCESS, NOT_PERMITTED, BUSY."""
    found = await walk.walk(tr, request.at, request.caller, follow=False, entry=True)
    child = found.existing()
    ino = child.attr.inode
    if ino == keys.ROOT_INODE:
        raise error(Code.CODE_BUSY, "the root directory stays", retryable=False)
    if found.parent is None:
        raise error(Code.CODE_INVALID_ARGUMENT, "a directory is removed by its name in its parent")
    parent = walk.writable_parent(found, request.caller)
    access.require_sticky(parent.attr, child.attr, request.caller)
    tree.remove_entry(tr, parent.attr.inode, found.name, child.attr.type)
    tree.touch_directory(tr, parent.attr.inode, ctx.now_ns)
    # Creations in the directory read its record and so conflict; later ones see that it has been removed.
    if trash.keeps(parent, child) and not request.skip_trash:
        await trash.put(tr, ctx, parent, found.name, child, request.caller)
    elif child.attr.type == model.DIRECTORY:
        await tree.detach(tr, ctx, child)
    else:
        await tree.drop_link(tr, ctx, child, hold_session=b"", client_id=request.op.client_id)
    return Empty()
