"""Put something from the trash back."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import access, keys, making, model, quotas, trash, tree, walk
from fs3.meta.context import OpContext
from fs3.meta.ops import rename
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, TrashRestoreRequest


async def run(tr: Transaction, request: TrashRestoreRequest, ctx: OpContext) -> AttrResponse:
    """Where it was, or to ``to``. What was removed from a directory before it was removed itself stays in the trash.

    It is counted by the quotas of where it goes, what is in a directory in the background. Raises NOT_FOUND (it, or the
    directory it goes to), EXISTS, NOT_PERMITTED, ACCESS, INVALID_ARGUMENT, QUOTA_EXCEEDED.
    """
    found = await trash.find(tr, request.id, request.caller)
    if found is None:
        raise trash.gone()
    parent, name = await (_chosen(tr, request) if request.HasField("to") else _origin(tr, found))
    walk.enter(parent, request.caller)
    access.require(parent.attr, request.caller, access.WRITE)
    child = found.child
    await rename.check_no_cycle(tr, child, parent)
    trash.take(tr, found)
    await quotas.adopt(tr, ctx, child, parent.quota, within=True)
    await tree.place(tr, ctx, child, parent.attr.inode, name)
    tree.touch_directory(tr, parent.attr.inode, ctx.now_ns)
    return AttrResponse(attr=await tree.complete(tr, child))


async def _chosen(tr: Transaction, request: TrashRestoreRequest) -> tuple[InodeRecord, bytes]:
    dest = await walk.walk(tr, request.to, request.caller, follow=False, entry=True)
    if dest.parent is None or dest.child is not None:
        raise making.exists(dest.name)
    walk.check_name(dest.name)
    return dest.parent, dest.name


async def _origin(tr: Transaction, found: trash.Trashed) -> tuple[InodeRecord, bytes]:
    name = found.record.name
    parent = await tree.load(tr, found.parent)
    if parent is None or parent.attr.type != model.DIRECTORY or parent.detached:
        raise error(Code.CODE_NOT_FOUND, "the directory it was removed from is gone: restore it to another path")
    if tree.removed(parent):
        message = "the directory it was removed from is in the trash, too: restore that first, or it to another path"
        raise error(Code.CODE_NOT_FOUND, message)
    if await tr.get(keys.dirent(found.parent, name)) is not None:
        shown = name.decode(errors="backslashreplace")
        raise error(Code.CODE_EXISTS, f"there is another {shown!r} where it was: restore it to another path")
    return parent, name
