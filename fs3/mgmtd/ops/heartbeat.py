"""Heartbeat: a node lives, and what its targets say of themselves."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.mgmtd.manager import Manager
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import HeartbeatRequest, HeartbeatResponse
from fs3.v1.routing_pb2 import LocalState, NodeStatus


async def heartbeat(manager: Manager, request: HeartbeatRequest) -> HeartbeatResponse:
    """Renew the node's lease and take its reports. Nothing is written; decisions follow soon after.

    While a decision about the node's targets is on its way to the store, the answer waits for it and carries it: a
    node that was found silent, and is just being taken out of service, must not have its lease renewed on what it
    knows from before. Neither while a target of it is taken for dead and not yet out of service, unless the report says
    that it is alive (then it stays) or that it is unusable (then it does not serve).

    Raises NOT_PRIMARY; STALE_HANDLE when the node is unknown or another incarnation of it has registered (register
    again); SUPERSEDED for a heartbeat that was overtaken by a later one.
    """
    await manager.wait_settled(request.node_id)
    record = manager.records.nodes.get(request.node_id)
    live = manager.live.get(request.node_id)
    if record is None or live is None or record.node.incarnation != request.incarnation:
        raise error(Code.CODE_STALE_HANDLE, f"node {request.node_id} is not registered under this incarnation")
    if request.sequence < live.sequence:
        raise error(Code.CODE_SUPERSEDED, "a later heartbeat has already arrived")
    live.sequence = request.sequence
    now_ns = live.heard_ns = manager.clock.monotonic_ns()
    if request.answered.epoch == manager.epoch:
        live.lived_ns = max(live.lived_ns, request.answered.ns)
    if record.node.status != NodeStatus.NODE_STATUS_CONNECTED:
        manager.kick()
    own = manager.targets_of(request.node_id)
    for report in request.targets:
        if report.target_id in own:
            manager.report(report.target_id, report.local_state, report.chain_version, report.used_bytes)
    for disk in request.disks:
        known = manager.records.disks.get(disk.uuid)
        if known is not None and known.disk.node_id == request.node_id:
            manager.free_bytes[disk.uuid] = disk.free_bytes
    unusable = {r.target_id for r in request.targets if r.local_state == LocalState.LOCAL_STATE_OFFLINE}
    no_lease = any(target not in unusable and manager.is_going(target) for target in own)
    response = HeartbeatResponse(routing_version=manager.routing.version, no_lease=no_lease)
    response.sent.epoch, response.sent.ns = manager.epoch, now_ns
    if manager.routing.version > request.routing_version:
        told = manager.teller.tell(request.known)
        if told.HasField("delta"):
            response.delta.CopyFrom(told.delta)
        else:
            response.routing.CopyFrom(told.routing)
    return response
