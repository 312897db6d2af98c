"""Move an entry, replace another by it, or exchange the two."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import access, keys, kv_namespaces, making, model, quotas, tree, walk
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Caller, RenameRequest, RenameResponse

DEPTH_MAX: Final = 4096


async def run(tr: Transaction, request: RenameRequest, ctx: OpContext) -> RenameResponse:
    """Move, replace or exchange, atomically.

    Raises NOT_FOUND, EXISTS (no_replace), IS_DIRECTORY, NOT_DIRECTORY, NOT_EMPTY, ACCESS, NOT_PERMITTED,
    BUSY ("." and ".."), INVALID_ARGUMENT (a directory into itself), CROSS_QUOTA (directories, files with several
    names), QUOTA_EXCEEDED.
    """
    caller = request.caller
    if request.no_replace and request.exchange:
        raise error(Code.CODE_INVALID_ARGUMENT, "no_replace and exchange exclude each other")
    source = await walk.walk(tr, getattr(request, "from"), caller, follow=False, entry=True)
    dest = await walk.walk(tr, request.to, caller, follow=False, entry=True)
    if source.parent is None or dest.parent is None:
        raise error(Code.CODE_BUSY, 'the root, "." and ".." cannot be renamed', retryable=False)
    moved = source.existing()
    replaced = dest.child
    if replaced is None and request.exchange:
        raise walk.missing(dest.name)
    if replaced is not None and request.no_replace:
        raise making.exists(dest.name)
    if replaced is not None and replaced.attr.inode == moved.attr.inode:
        return RenameResponse(attr=await tree.complete(tr, moved))
    walk.check_name(dest.name)
    _check_parents(source, dest, caller)
    if (source.as_directory or dest.as_directory) and moved.attr.type != model.DIRECTORY:
        raise walk.not_directory(moved)
    _check_move(source.parent, dest.parent, moved, caller)
    await check_no_cycle(tr, moved, dest.parent)
    if replaced is None:
        return await _finish(tr, request, ctx, source, dest, moved, None)
    if request.exchange:
        _check_move(dest.parent, source.parent, replaced, caller)
        await check_no_cycle(tr, replaced, source.parent)
        return await _exchange(tr, ctx, source, dest, moved, replaced)
    await _check_replaceable(tr, moved, replaced)
    return await _finish(tr, request, ctx, source, dest, moved, replaced)


def _check_parents(source: walk.Found, dest: walk.Found, caller: Caller) -> None:
    """Both directories are written; sticky ones protect what is moved and what is replaced."""
    for found in (source, dest):
        parent = walk.writable_parent(found, caller)
        if found.child is not None:
            access.require_sticky(parent.attr, found.child.attr, caller)


def _check_move(old: InodeRecord, new: InodeRecord, moved: InodeRecord, caller: Caller) -> None:
    """A directory that gets another parent is written itself: its ".." changes.

    What other things or names hang on does not move from one quota to another.
    """
    directory = moved.attr.type == model.DIRECTORY
    if directory and old.attr.inode != new.attr.inode:
        access.require(moved.attr, caller, access.WRITE)
    if old.quota != new.quota and (directory or moved.attr.nlink > 1):
        what = "a directory" if directory else "a file with several names"
        raise error(Code.CODE_CROSS_QUOTA, f"{what} is not moved from one quota to another; copy it")


async def check_no_cycle(tr: Transaction, moved: InodeRecord, new_parent: InodeRecord) -> None:
    """Raise INVALID_ARGUMENT when a directory would come below itself.

    Reads the record of every ancestor, so that a concurrent move of any of them conflicts with this one.
    """
    if moved.attr.type != model.DIRECTORY or moved.attr.parent == new_parent.attr.inode:
        return
    current = new_parent
    for _ in range(DEPTH_MAX):
        if current.attr.inode == moved.attr.inode:
            raise error(Code.CODE_INVALID_ARGUMENT, "a directory cannot be moved below itself")
        if tree.removed(current):
            raise error(Code.CODE_NOT_FOUND, "the directory has been removed")
        if current.attr.inode == keys.ROOT_INODE:
            return
        above = await tree.load(tr, current.attr.parent)
        if above is None:
            raise error(Code.CODE_NOT_FOUND, "the directory has been removed")
        current = above
    raise error(Code.CODE_INVALID_ARGUMENT, f"directories are nested at most {DEPTH_MAX} deep")


async def _check_replaceable(tr: Transaction, moved: InodeRecord, replaced: InodeRecord) -> None:
    if replaced.attr.type == model.DIRECTORY:
        if moved.attr.type != model.DIRECTORY:
            raise making.is_directory(replaced)
        if not await tree.is_empty(tr, replaced.attr.inode):
            raise error(Code.CODE_NOT_EMPTY, "the directory to be replaced is not empty")
    elif moved.attr.type == model.DIRECTORY:
        raise walk.not_directory(replaced)


async def _place(tr: Transaction, ctx: OpContext, moved: InodeRecord, parent: InodeRecord, name: bytes) -> None:
    await quotas.adopt(tr, ctx, moved, parent.quota, within=True)
    await tree.place(tr, ctx, moved, parent.attr.inode, name)


async def _finish(
    tr: Transaction,
    request: RenameRequest,
    ctx: OpContext,
    source: walk.Found,
    dest: walk.Found,
    moved: InodeRecord,
    replaced: InodeRecord | None,
) -> RenameResponse:
    assert source.parent is not None
    assert dest.parent is not None
    response = RenameResponse()
    if replaced is not None:
        tree.remove_entry(tr, dest.parent.attr.inode, dest.name, replaced.attr.type)
        if replaced.attr.type == model.DIRECTORY:
            await kv_namespaces.erase_directory(tr, ctx, replaced)
            replaced.attr.nlink = 0
        else:
            await tree.drop_link(tr, ctx, replaced, hold_session=request.hold_session, client_id=request.op.client_id)
        response.replaced.CopyFrom(replaced.attr)
    tree.remove_entry(tr, source.parent.attr.inode, source.name, moved.attr.type)
    await _place(tr, ctx, moved, dest.parent, dest.name)
    _touch_parents(tr, ctx, source.parent, dest.parent)
    response.attr.CopyFrom(await tree.complete(tr, moved))
    return response


async def _exchange(
    tr: Transaction,
    ctx: OpContext,
    source: walk.Found,
    dest: walk.Found,
    moved: InodeRecord,
    other: InodeRecord,
) -> RenameResponse:
    assert source.parent is not None
    assert dest.parent is not None
    tree.remove_entry(tr, source.parent.attr.inode, source.name, moved.attr.type)
    tree.remove_entry(tr, dest.parent.attr.inode, dest.name, other.attr.type)
    await _place(tr, ctx, moved, dest.parent, dest.name)
    await _place(tr, ctx, other, source.parent, source.name)
    _touch_parents(tr, ctx, source.parent, dest.parent)
    return RenameResponse(attr=await tree.complete(tr, moved), replaced=await tree.complete(tr, other))


def _touch_parents(tr: Transaction, ctx: OpContext, old: InodeRecord, new: InodeRecord) -> None:
    tree.touch_directory(tr, old.attr.inode, ctx.now_ns)
    if new.attr.inode != old.attr.inode:
        tree.touch_directory(tr, new.attr.inode, ctx.now_ns)
