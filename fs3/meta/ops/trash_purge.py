"""Remove things from the trash for good."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import trash
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import TrashPurgeRequest, TrashPurgeResponse

IDS_MAX: Final = 256


async def run(tr: Transaction, request: TrashPurgeRequest, ctx: OpContext) -> TrashPurgeResponse:
    """All of them or none; those that are gone already are passed over. Raises NOT_PERMITTED, INVALID_ARGUMENT."""
    if len(request.ids) > IDS_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"at most {IDS_MAX} ids at a time")
    purged = 0
    for name in dict.fromkeys(request.ids):
        found = await trash.find(tr, name, request.caller)
        if found is not None:
            await trash.purge(tr, ctx, found)
            purged += 1
    return TrashPurgeResponse(purged=purged)
