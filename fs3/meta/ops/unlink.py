"""Remove a name that is not a directory's."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import access, making, model, trash, tree, walk
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import UnlinkRequest, UnlinkResponse


async def run(tr: Transaction, request: UnlinkRequest, ctx: OpContext) -> UnlinkResponse:
    """Raises NOT_FOUND, IS_DIRECTORY, ACCESS, NOT_PERMITTED (sticky directory)."""
    found = await walk.walk(tr, request.at, request.caller, follow=False, entry=True)
    child = found.existing()
    if found.parent is None:
        raise making.is_directory(child)
    parent = walk.writable_parent(found, request.caller)
    access.require_sticky(parent.attr, child.attr, request.caller)
    if child.attr.type == model.DIRECTORY:
        raise making.is_directory(child)
    tree.remove_entry(tr, parent.attr.inode, found.name, child.attr.type)
    tree.touch_directory(tr, parent.attr.inode, ctx.now_ns)
    if trash.keeps(parent, child):
        await trash.put(tr, ctx, parent, found.name, child, request.caller)
        return UnlinkResponse(attr=child.attr)
    await tree.drop_link(tr, ctx, child, hold_session=request.hold_session, client_id=request.op.client_id)
    return UnlinkResponse(attr=child.attr)
