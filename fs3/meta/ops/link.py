"""Make another name for an inode."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import making, model, quotas, tree, walk
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, LinkRequest


async def run(tr: Transaction, request: LinkRequest, ctx: OpContext) -> AttrResponse:
    """Raises EXISTS, NOT_PERMITTED (directories), TOO_MANY_LINKS, NOT_FOUND (also without names), CROSS_QUOTA."""
    # `from` is a keyword of Python.
    source = await walk.target(tr, getattr(request, "from"), request.caller)
    attr = source.attr
    found = await walk.walk(tr, request.to, request.caller, follow=False, entry=True)
    if found.parent is None or found.child is not None:
        raise making.exists(found.name)
    if attr.type == model.DIRECTORY:
        raise error(Code.CODE_NOT_PERMITTED, "a directory has one name only")
    if found.as_directory:
        raise walk.missing(found.name)
    if attr.nlink == 0 and (not source.linkable or tree.waits_for_removal(source)):
        raise error(Code.CODE_NOT_FOUND, "the last name of this inode has been removed")
    if attr.nlink >= model.NLINK_MAX:
        raise error(Code.CODE_TOO_MANY_LINKS, f"an inode has at most {model.NLINK_MAX} names")
    walk.check_name(found.name)
    parent = walk.writable_parent(found, request.caller)
    if attr.nlink and source.quota != parent.quota and not await quotas.has_ended(tr, source.quota):
        raise error(Code.CODE_CROSS_QUOTA, "all names of a file are under the same quota; copy it")
    await quotas.adopt(tr, ctx, source, parent.quota, within=True)
    source.linkable = False
    attr.nlink += 1
    attr.ctime_ns = ctx.now_ns
    tree.store(tr, source)
    tree.add_entry(tr, parent.attr.inode, found.name, attr.inode, attr.type)
    tree.touch_directory(tr, parent.attr.inode, ctx.now_ns)
    return AttrResponse(attr=attr)
