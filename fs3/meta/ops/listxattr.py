"""The names of an inode's extended attributes."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import walk, xattrs
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import ListxattrRequest, ListxattrResponse


async def run(tr: Transaction, request: ListxattrRequest, ctx: OpContext) -> ListxattrResponse:
    """Like a stat it needs no permission on the inode itself; trusted.* are shown to root only."""
    record = await walk.target(tr, request.at, request.caller)
    found = await xattrs.names(tr, record)
    return ListxattrResponse(names=[name for name in found if xattrs.listed(name, request.caller)])
