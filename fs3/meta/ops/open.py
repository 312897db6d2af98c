"""Open an existing inode."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import making, walk
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import OpenRequest, OpenResponse


def only_reads(request: OpenRequest) -> bool:
    """Without a session and a truncation nothing is written, so that doing it twice is as good as once."""
    return not request.write and not request.truncate


async def run(tr: Transaction, request: OpenRequest, ctx: OpContext) -> OpenResponse:
    """Check permissions; make a write session; truncate. Raises NOT_FOUND, ACCESS, IS_DIRECTORY, STALE_HANDLE."""
    record = await walk.target(tr, request.at, request.caller)
    return await making.open_existing(
        tr,
        ctx,
        record,
        request.caller,
        client_id=request.op.client_id,
        read=request.read,
        write=request.write,
        truncate=request.truncate,
    )
