"""Attributes of one inode."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import tree, walk
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import AttrResponse, StatRequest


async def run(tr: Transaction, request: StatRequest, ctx: OpContext) -> AttrResponse:
    """The attributes of what `at` names; only the directories on the way need a permission."""
    at = request.at
    record = await walk.target(tr, at, request.caller) if at.path else await tree.load_handle(tr, at.inode)
    return AttrResponse(attr=await tree.complete(tr, record))
