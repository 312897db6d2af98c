"""Space and inode count of the file system."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import keys, model
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import StatfsRequest, StatfsResponse


async def run(tr: Transaction, request: StatfsRequest, ctx: OpContext) -> StatfsResponse:
    """As far as heartbeats have told; never fails for a missing node."""
    response = ctx.placement.space()
    rows = await tr.get_range(*keys.table(keys.COUNTER), snapshot=True)
    response.inodes = max(0, sum(model.decode_count(value) for _, value in rows))
    response.name_bytes_max = model.NAME_BYTES_MAX
    return response
