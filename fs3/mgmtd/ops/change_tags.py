"""ChangeTags: what an operator says of a node, for example where it stands."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.mgmtd.manager import Manager
from fs3.mgmtd.state import Change
from fs3.v1.disk_mgmtd_pb2 import NodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import ChangeTagsRequest
from fs3.v1.routing_pb2 import Node

TAGS_MAX: Final = 64
TEXT_CHARACTERS_MAX: Final = 128


async def change_tags(manager: Manager, request: ChangeTagsRequest) -> Node:
    """Set and remove tags; durable and in the routing when it returns. Chains that are made later heed them.

    Raises NOT_FOUND for an unknown node, INVALID_ARGUMENT.
    """
    for key, value in request.values.items():
        if not key or not value or max(len(key), len(value)) > TEXT_CHARACTERS_MAX or "=" in key:
            message = f"a tag is KEY=VALUE, each of 1 to {TEXT_CHARACTERS_MAX} characters"
            raise error(Code.CODE_INVALID_ARGUMENT, message)
    async with manager.lock:
        before = manager.records.nodes.get(request.node_id)
        if before is None:
            raise error(Code.CODE_NOT_FOUND, f"there is no node {request.node_id}")
        record = NodeRecord()
        record.CopyFrom(before)
        for key in request.unset:
            record.node.tags.pop(key, None)
        record.node.tags.update(request.values)
        if len(record.node.tags) > TAGS_MAX:
            raise error(Code.CODE_INVALID_ARGUMENT, f"a node has at most {TAGS_MAX} tags")
        if record != before:
            await manager.commit(Change(nodes={request.node_id: record}))
    manager.placement_due()
    return record.node
