"""Unregister: a node's process ends in good order."""

from __future__ import annotations

from fs3.mgmtd.manager import STORAGE, Manager, with_status
from fs3.mgmtd.state import Change
from fs3.v1.mgmtd_pb2 import UnregisterRequest, UnregisterResponse
from fs3.v1.routing_pb2 import NodeStatus


async def unregister(manager: Manager, request: UnregisterRequest) -> UnregisterResponse:
    """Take the node's targets out of service now instead of after its lease; durable when it returns.

    The caller has stopped serving before. An unknown node or an older incarnation is not an error: there is
    nothing to do for it.
    """
    async with manager.lock:
        record = manager.records.nodes.get(request.node_id)
        if record is None or record.node.incarnation != request.incarnation:
            return UnregisterResponse()
        change = Change()
        now_ns = manager.clock.monotonic_ns()
        live = manager.live.get(request.node_id)
        if live is not None:
            live.heard_ns = now_ns - manager.lease_ns
            live.excused_ns = 0
        if record.node.role == STORAGE:
            change.nodes[request.node_id] = with_status(record, NodeStatus.NODE_STATUS_FAILED)
            manager.take_down(request.node_id, at_ns=now_ns, orderly=True)
            manager.plan_chains(change)
        else:
            change.removed_nodes.add(request.node_id)
        await manager.commit(change)
    manager.kick()
    return UnregisterResponse()
