"""Which lock is in the way of another."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import locks
from fs3.meta.context import OpContext
from fs3.meta.ops import lock
from fs3.v1.meta_pb2 import GetLockRequest, GetLockResponse


async def run(tr: Transaction, request: GetLockRequest, ctx: OpContext) -> GetLockResponse:
    """The first lock that conflicts, if any. Raises INVALID_ARGUMENT."""
    locks.check(request.client_id, request.lock)
    found = locks.in_the_way(await lock.load(tr, request.inode), request.client_id, request.lock)
    if found is None:
        return GetLockResponse()
    client_id, conflict = found
    return GetLockResponse(conflict=conflict, own=client_id == request.client_id)
