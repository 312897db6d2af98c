"""Whether one who waits for a lock would get it now."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import locks
from fs3.meta.context import OpContext
from fs3.meta.ops import lock
from fs3.v1.meta_pb2 import AwaitLockRequest, AwaitLockResponse


async def run(tr: Transaction, request: AwaitLockRequest, ctx: OpContext) -> AwaitLockResponse:
    """Looks once; :class:`fs3.meta.lock_waits.LockWaits` looks again. Raises INVALID_ARGUMENT."""
    locks.check(request.client_id, request.lock)
    records = await lock.load(tr, request.inode)
    free = locks.in_the_way(records, request.client_id, request.lock) is None
    return AwaitLockResponse(free=free and not locks.must_queue(records, request.client_id, request.lock, ctx.now_ns))
