"""The quotas that count an inode."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import paths, quotas, walk
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import QuotaRecord
from fs3.v1.meta_pb2 import QuotaGetRequest, QuotaGetResponse, QuotaInfo


async def run(tr: Transaction, request: QuotaGetRequest, ctx: OpContext) -> QuotaGetResponse:
    """The innermost first, none when there is none. Only the directories on the way need a permission."""
    record = await walk.target(tr, request.at, request.caller)
    found = await quotas.chain(tr, record.quota)
    return QuotaGetResponse(inode=record.attr.inode, quotas=[await describe(tr, quota) for quota in found])


async def describe(tr: Transaction, record: QuotaRecord) -> QuotaInfo:
    """What callers see of a quota."""
    used = await quotas.usage(tr, record.id)
    return QuotaInfo(
        id=record.id,
        directory=record.directory,
        path=(await paths.directory_path(tr, record.directory)).encode(),
        bytes_max=record.bytes_max if record.HasField("bytes_max") else None,
        inodes_max=record.inodes_max if record.HasField("inodes_max") else None,
        # Below 0 while what a quota inside counts is on its way to another outer one.
        bytes=max(0, used.bytes),
        inodes=max(0, used.inodes),
        state=record.state,
    )
