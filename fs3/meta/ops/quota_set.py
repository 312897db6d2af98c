"""Give a directory a quota, change its limits, or remove it."""

from __future__ import annotations

from typing import Final, Literal

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import model, quotas, tree, walk
from fs3.meta.context import OpContext
from fs3.meta.ops.quota_get import describe
from fs3.v1.disk_meta_pb2 import QuotaRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import QuotaSetRequest, QuotaSetResponse

NO_LIMIT: Final = (1 << 64) - 1


async def run(tr: Transaction, request: QuotaSetRequest, ctx: OpContext) -> QuotaSetResponse:
    """What is in the directory already is counted, and the quota enforced, from a while later on.

    Raises NOT_PERMITTED for anybody but root, NOT_DIRECTORY, NOT_FOUND (also when there is no quota to remove),
    INVALID_ARGUMENT (too many quotas inside each other).
    """
    if request.caller.uid != 0:
        raise error(Code.CODE_NOT_PERMITTED, "only root sets quotas")
    directory = await walk.target(tr, request.at, request.caller)
    if directory.attr.type != model.DIRECTORY:
        raise walk.not_directory(directory)
    if tree.removed(directory):
        raise tree.stale(directory.attr.inode)
    record = await quotas.own(tr, directory)
    if request.clear:
        if record is None:
            raise error(Code.CODE_NOT_FOUND, "the directory has no quota")
        await quotas.clear(tr, ctx, directory, record)
        tree.store(tr, directory)
        return QuotaSetResponse()
    if record is None:
        record = await quotas.begin(tr, ctx, directory)
        tree.store(tr, directory)
    _limit(record, "bytes_max", request)
    _limit(record, "inodes_max", request)
    quotas.store(tr, record)
    return QuotaSetResponse(quota=await describe(tr, record))


def _limit(record: QuotaRecord, name: Literal["bytes_max", "inodes_max"], request: QuotaSetRequest) -> None:
    if not request.HasField(name):
        return
    limit: int = getattr(request, name)
    if limit == NO_LIMIT:
        record.ClearField(name)
    else:
        setattr(record, name, limit)
