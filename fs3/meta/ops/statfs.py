"""Space and inode count of the file system, or of what is left of it by quotas."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import keys, model, quotas, walk
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import StatfsRequest, StatfsResponse


async def run(tr: Transaction, request: StatfsRequest, ctx: OpContext) -> StatfsResponse:
    """As far as heartbeats have told; never fails for a missing node.

    Below a directory with a quota that leaves less, its limit and what is left of it. Raises NOT_FOUND, ACCESS.
    """
    response = ctx.placement.space()
    rows = await tr.get_range(*keys.table(keys.COUNTER), snapshot=True)
    response.inodes = max(0, sum(model.decode_count(value) for _, value in rows))
    response.name_bytes_max = model.NAME_BYTES_MAX
    if request.at.inode:
        record = await walk.target(tr, request.at, request.caller)
        await _bound(tr, response, record.quota)
    return response


async def _bound(tr: Transaction, response: StatfsResponse, quota: int) -> None:
    inodes, length = await quotas.rooms(tr, quota)
    if length is not None:
        response.capacity_bytes = min(response.capacity_bytes, length.limit)
        response.free_bytes = min(response.free_bytes, max(0, length.left))
    if inodes is not None:
        response.inodes = max(0, min(response.inodes, inodes.limit - inodes.left))
        response.free_inodes = max(0, inodes.left)
