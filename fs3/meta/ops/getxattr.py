"""Read an extended attribute."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import walk, xattrs
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import GetxattrRequest, GetxattrResponse


async def run(tr: Transaction, request: GetxattrRequest, ctx: OpContext) -> GetxattrResponse:
    """Raises NO_DATA, ACCESS, NOT_SUPPORTED (unknown prefix), OUT_OF_RANGE, INVALID_ARGUMENT."""
    xattrs.check_name(request.name)
    record = await walk.target(tr, request.at, request.caller)
    xattrs.require_read(record.attr, request.caller, request.name)
    value = await xattrs.load(tr, record, request.name)
    if value is None:
        raise xattrs.missing(request.name)
    return GetxattrResponse(value=value)
