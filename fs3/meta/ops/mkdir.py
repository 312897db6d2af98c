"""Make a directory."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import making, model, tree, walk
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, MkdirRequest, PathAt


async def run(tr: Transaction, request: MkdirRequest, ctx: OpContext) -> AttrResponse:
    """Make the directory; with `parents` also those on the way. Raises EXISTS, NOT_FOUND, NOT_DIRECTORY, ACCESS."""
    if request.parents:
        return await _parents(tr, request, ctx)
    found = await walk.walk(tr, request.at, request.caller, follow=False, entry=True)
    if found.parent is None or found.child is not None:
        raise making.exists(found.name)
    return AttrResponse(attr=(await _make(tr, request, ctx, found)).attr)


async def _make(tr: Transaction, request: MkdirRequest, ctx: OpContext, found: walk.Found) -> InodeRecord:
    assert found.parent is not None
    requested = request.layout if request.HasField("layout") else None
    return await making.new_inode(
        tr,
        ctx,
        found.parent,
        found.name,
        request.caller,
        file_type=model.DIRECTORY,
        mode=request.mode,
        umask=request.umask,
        layout=ctx.placement.directory_layout(requested, found.parent.attr.layout),
    )


async def _parents(tr: Transaction, request: MkdirRequest, ctx: OpContext) -> AttrResponse:
    """Walk component by component, making what is missing."""
    if len(request.at.path) > model.PATH_BYTES_MAX:
        raise error(Code.CODE_NAME_TOO_LONG, f"a path has at most {model.PATH_BYTES_MAX} bytes")
    current = await tree.load_handle(tr, request.at.inode)
    for part in request.at.path.split(b"/"):
        if not part:
            continue
        at = PathAt(inode=current.attr.inode, path=part)
        found = await walk.walk(tr, at, request.caller, follow=True)
        current = found.child if found.child is not None else await _make(tr, request, ctx, found)
    if current.attr.type != model.DIRECTORY:
        raise making.exists(request.at.path)
    return AttrResponse(attr=await tree.complete(tr, current))
