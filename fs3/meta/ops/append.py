"""Give an appending writer a place that is its own."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import model, quotas, reports, tree
from fs3.meta.context import OpContext, TruncationPending
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AppendRequest, AppendResponse


async def run(tr: Transaction, request: AppendRequest, ctx: OpContext) -> AppendResponse:
    """Adopt the report, then reserve bytes behind the end; nobody else is given them.

    The length stays until a report covers them: readers elsewhere do not take what is not written yet for zeros. They
    are counted in quotas then, too. A writer without its session needs the permission bits.

    Raises STALE_HANDLE (the inode, or the right to write it, is gone), INVALID_ARGUMENT, FILE_TOO_LARGE,
    QUOTA_EXCEEDED.
    """
    record = await tree.load_handle(tr, request.inode)
    attr = record.attr
    if attr.type != model.FILE or not request.bytes:
        raise error(Code.CODE_INVALID_ARGUMENT, "appends are of at least one byte, to files")
    opened = await reports.check_writer(tr, record, request.session, request.report, request.caller, writes=True)
    if not opened:
        if attr.nlink == 0:
            raise tree.stale(attr.inode)
        # What it writes may come after a truncation that counts on knowing how far chunks reach.
        record.loose = True
    before = reports.version_of(attr) if request.report.wrote else None
    await reports.apply(tr, record, request.report, request.caller, ctx)
    if record.truncating:
        raise TruncationPending(attr.inode)
    offset = tree.reserve(record, request.bytes)
    end = offset + request.bytes
    await quotas.require_room(tr, record.quota, quotas.Usage(0, end - attr.length))
    tree.store(tr, record)
    limit = await quotas.length_limit(tr, record, end)
    return AppendResponse(attr=attr, offset=offset, length_limit=limit, before=before)
