"""Remove an extended attribute."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import walk, xattrs
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import AttrResponse, RemovexattrRequest


async def run(tr: Transaction, request: RemovexattrRequest, ctx: OpContext) -> AttrResponse:
    """Raises NO_DATA, NOT_PERMITTED, ACCESS, NOT_SUPPORTED (unknown prefix), OUT_OF_RANGE, INVALID_ARGUMENT."""
    xattrs.check_name(request.name)
    record = await walk.target(tr, request.at, request.caller)
    xattrs.require_write(record.attr, request.caller, request.name)
    old = await xattrs.load(tr, record, request.name)
    # A list that is not there says what the mode does, so that its removal has nothing to do.
    if old is None and request.name not in xattrs.ACLS:
        raise xattrs.missing(request.name)
    xattrs.put(tr, record, request.name, old, None)
    return AttrResponse(attr=await xattrs.changed(tr, record, ctx.now_ns))
