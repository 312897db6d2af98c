"""A client says which files it has open for reading, and which no more."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import tree
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import HoldRequest, HoldResponse

INODES_MAX: Final = 1000


async def run(tr: Transaction, request: HoldRequest, ctx: OpContext) -> HoldResponse:
    """End holds and begin others; the answer names the files that are gone. Raises INVALID_ARGUMENT.

    A hold begins with the client's keepalive record in the same transaction, so that no hold is ever without one.
    """
    client_id = request.op.client_id
    if not client_id:
        raise error(Code.CODE_INVALID_ARGUMENT, "a hold belongs to a client: the request needs an OpId")
    if len(request.begin) + len(request.end) > INODES_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"at most {INODES_MAX} inodes in one request")
    for ino in request.end:
        await tree.end_hold(tr, ctx, ino, client_id)
    if request.begin:
        tree.keep_alive(tr, ctx, client_id, "")
    return HoldResponse(gone=[ino for ino in request.begin if not await tree.begin_hold(tr, ctx, ino, client_id)])
