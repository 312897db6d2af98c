"""Set the length of a file."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import access, keys, making, model, quotas, tree, walk
from fs3.meta.context import OpContext, TruncationPending
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, TruncateRequest


async def run(tr: Transaction, request: TruncateRequest, ctx: OpContext) -> AttrResponse:
    """The length changes here; the runner cuts the chunks before it answers.

    A session of the inode stands for the permission it was opened with. Raises ACCESS, IS_DIRECTORY,
    INVALID_ARGUMENT (not a file), FILE_TOO_LARGE, QUOTA_EXCEEDED.
    """
    record = await walk.target(tr, request.at, request.caller)
    attr = record.attr
    if attr.type == model.DIRECTORY:
        raise making.is_directory(record)
    if attr.type != model.FILE:
        raise error(Code.CODE_INVALID_ARGUMENT, "only files have a length to set")
    tree.check_length(record, request.length)
    opened = bool(request.session) and await tr.get(keys.session(attr.inode, request.session)) is not None
    if not opened:
        access.require(attr, request.caller, access.WRITE)
    if tree.waits_for_removal(record):
        raise tree.stale(attr.inode)
    if record.truncating:
        raise TruncationPending(attr.inode)
    sessions = await tree.has_sessions(tr, attr.inode)
    await tree.set_length(tr, ctx, record, request.length, sessions=sessions)
    making.content_changed(record, request.caller, ctx.now_ns)
    tree.store(tr, record)
    return AttrResponse(attr=attr, length_limit=await quotas.length_limit(tr, record))
