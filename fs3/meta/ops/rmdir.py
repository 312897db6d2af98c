"""Remove an empty directory."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import access, keys, kv_namespaces, model, trash, tree, walk
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Empty, RmdirRequest


async def run(tr: Transaction, request: RmdirRequest, ctx: OpContext) -> Empty:
    """Raises NOT_FOUND, NOT_DIRECTORY, NOT_EMPTY, ACCESS, NOT_PERMITTED, BUSY (the root)."""
    found = await walk.walk(tr, request.at, request.caller, follow=False, entry=True)
    child = found.existing()
    if child.attr.inode == keys.ROOT_INODE and found.name != b"..":
        raise error(Code.CODE_BUSY, "the root directory stays", retryable=False)
    if found.parent is None:
        code = Code.CODE_NOT_EMPTY if found.name == b".." else Code.CODE_INVALID_ARGUMENT
        raise error(code, "a directory is removed by its name in its parent")
    parent = walk.writable_parent(found, request.caller)
    access.require_sticky(parent.attr, child.attr, request.caller)
    if child.attr.type != model.DIRECTORY:
        raise walk.not_directory(child)
    # A serializable read of the whole range: every creation in the directory conflicts with this, and this
    # with it, because it reads the record that is erased here.
    if not await tree.is_empty(tr, child.attr.inode):
        raise error(Code.CODE_NOT_EMPTY, f"directory {found.name.decode(errors='backslashreplace')!r} is not empty")
    tree.remove_entry(tr, parent.attr.inode, found.name, model.DIRECTORY)
    tree.touch_directory(tr, parent.attr.inode, ctx.now_ns)
    if trash.keeps(parent, child):
        await trash.put(tr, ctx, parent, found.name, child, request.caller)
    else:
        await kv_namespaces.erase_directory(tr, ctx, child)
    return Empty()
