"""A page of all quotas."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import keys, model
from fs3.meta.context import OpContext
from fs3.meta.ops.quota_get import describe
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import QuotaListRequest, QuotaListResponse

LIMIT_MAX: Final = 256


async def run(tr: Transaction, request: QuotaListRequest, ctx: OpContext) -> QuotaListResponse:
    """Quotas with ids after `after`, in their order. Raises NOT_PERMITTED for anybody but root."""
    if request.caller.uid != 0:
        raise error(Code.CODE_NOT_PERMITTED, "only root lists all quotas")
    limit = min(request.limit or LIMIT_MAX, LIMIT_MAX)
    begin, end = keys.quota(request.after) + b"\0", keys.table(keys.QUOTA)[1]
    rows = await tr.get_range(begin, end, limit=limit, snapshot=True)
    found = [await describe(tr, model.decode_quota(value)) for _, value in rows]
    return QuotaListResponse(quotas=found, end=len(rows) < limit)
