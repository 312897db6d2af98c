"""End a write session, or the hold of an unlinked file."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import keys, reports, tree
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import AttrResponse, CloseRequest


async def run(tr: Transaction, request: CloseRequest, ctx: OpContext) -> AttrResponse:
    """Adopt the report and drop the session. An inode without names, sessions and holds goes.

    Raises STALE_HANDLE when the inode is gone.
    """
    record = await tree.load_handle(tr, request.inode)
    attr = record.attr
    before = reports.version_of(attr) if request.report.wrote else None
    had_session = await reports.check_writer(tr, record, request.session, request.report, request.caller)
    if await reports.apply(tr, record, request.report, request.caller, ctx):
        tree.store(tr, record)
    if had_session:
        tr.clear(keys.session(attr.inode, request.session))
        if attr.nlink == 0 and not await tree.is_kept(tr, attr.inode):
            await tree.release(tr, ctx, record)
            return AttrResponse(attr=attr, before=before)
    return AttrResponse(attr=await tree.complete(tr, record), before=before)
