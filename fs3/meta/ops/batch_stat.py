"""Attributes of many inodes, in one snapshot."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import Fs3Error, error
from fs3.kv.api import Transaction
from fs3.meta import tree, walk
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import BatchStatRequest, BatchStatResponse

ITEMS_MAX: Final = 4096


async def run(tr: Transaction, request: BatchStatRequest, ctx: OpContext) -> BatchStatResponse:
    """One item per path, in order, each with its own code. Raises INVALID_ARGUMENT over ITEMS_MAX."""
    if len(request.at) > ITEMS_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"at most {ITEMS_MAX} paths in one request")
    response = BatchStatResponse()
    for at in request.at:
        try:
            record = await walk.target(tr, at, request.caller)
            response.items.add(attr=await tree.complete(tr, record))
        except Fs3Error as exc:
            response.items.add(code=exc.code)
    return response
