"""Publish what a writer has written so far."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import quotas, reports, tree
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import AttrResponse, SyncRequest


async def run(tr: Transaction, request: SyncRequest, ctx: OpContext) -> AttrResponse:
    """Adopt the report; the session stays. The answer says how long the file may become, if a quota limits that.

    Raises STALE_HANDLE when the inode is gone.
    """
    record = await tree.load_handle(tr, request.inode)
    before = reports.version_of(record.attr) if request.report.wrote else None
    await reports.check_writer(tr, record, request.session, request.report, request.caller)
    if await reports.apply(tr, record, request.report, request.caller, ctx):
        tree.store(tr, record)
    length_limit = await quotas.length_limit(tr, record, request.wanted_length)
    return AttrResponse(attr=await tree.complete(tr, record), length_limit=length_limit, before=before)
