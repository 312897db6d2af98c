"""Register: a node makes itself and its disks known, or comes back under a new incarnation."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.core.ids import UUID_BYTES
from fs3.mgmtd.manager import STORAGE, Live, Manager
from fs3.mgmtd.state import FORMAT, Change
from fs3.v1.disk_mgmtd_pb2 import DiskRecord, NodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import RegisterRequest, RegisterResponse
from fs3.v1.routing_pb2 import NodeStatus, RoutingKnown

ROLES = ("mgmtd", "meta", STORAGE)


async def register(manager: Manager, request: RegisterRequest) -> RegisterResponse:
    """Make the node and its disks known; durable and in the routing when it returns.

    A new incarnation takes the node's targets out of service at once, whatever is left of the old lease: its
    process has ended, and what it comes back with may be behind. Raises INVALID_ARGUMENT, EXISTS, STALE_HANDLE for an
    earlier start than the last one, whose registration was on its way for long.
    """
    _check(request)
    async with manager.lock:
        change = Change()
        node_id = _node(manager, request, change)
        _disks(manager, request, node_id, change)
        manager.plan_chains(change)
        await manager.commit(change)
    manager.placement_due()
    return RegisterResponse(
        node_id=node_id,
        cluster_id=manager.config.cluster_id,
        routing=manager.teller.tell(RoutingKnown()).routing,
        heartbeat_ms=manager.config.heartbeat_ms,
    )


def _check(request: RegisterRequest) -> None:
    node = request.node
    if len(node.uuid) != UUID_BYTES or len(node.incarnation) != UUID_BYTES:
        raise error(Code.CODE_INVALID_ARGUMENT, "uuid and incarnation of a node must be 16 bytes")
    if node.role not in ROLES:
        raise error(Code.CODE_INVALID_ARGUMENT, f"role {node.role!r} is none of {', '.join(ROLES)}")
    if request.disks and node.role != STORAGE:
        raise error(Code.CODE_INVALID_ARGUMENT, "only storage nodes have disks")
    if any(len(d.uuid) != UUID_BYTES for d in request.disks):
        raise error(Code.CODE_INVALID_ARGUMENT, "the uuid of a disk must be 16 bytes")


def _node(manager: Manager, request: RegisterRequest, change: Change) -> int:
    now_ns = manager.clock.monotonic_ns()
    given = request.node
    before = next((r for r in manager.records.nodes.values() if r.node.uuid == given.uuid), None)
    record = NodeRecord(format=FORMAT)
    if before is None:
        node_id = manager.state.next_node_id
        change.next_node_id = node_id + 1
    else:
        if before.node.role != given.role:
            raise error(
                Code.CODE_EXISTS,
                f"this node is known as {before.node.role}; a {given.role} node needs its own directory",
            )
        node_id = before.node.node_id
        record.next_target_ordinal = before.next_target_ordinal
        if before.node.incarnation != given.incarnation:
            if given.life < before.node.life:
                raise error(
                    Code.CODE_STALE_HANDLE,
                    "a later start of this node is registered: has its directory been put back, and its clock?",
                )
            manager.take_down(node_id, at_ns=now_ns, orderly=False)
    record.node.CopyFrom(given)
    record.node.ClearField("tags")
    if before is not None:
        record.node.tags.update(before.node.tags)
    record.node.node_id = node_id
    record.node.status = NodeStatus.NODE_STATUS_CONNECTED
    same_life = before is not None and before.node.incarnation == given.incarnation
    live = manager.live.get(node_id)
    if same_life and live is not None:
        live.heard_ns = now_ns
    else:
        manager.live[node_id] = Live(heard_ns=now_ns)
    if before is None or before != record:
        change.nodes[node_id] = record
    return node_id


def _disks(manager: Manager, request: RegisterRequest, node_id: int, change: Change) -> None:
    for disk in request.disks:
        record = DiskRecord(format=FORMAT, disk=disk)
        record.disk.node_id = node_id
        before = manager.records.disks.get(disk.uuid)
        if before is not None and before.disk.node_id != node_id:
            raise error(
                Code.CODE_EXISTS,
                f"disk {disk.path} ({disk.uuid.hex()}) belongs to node {before.disk.node_id}, not to node {node_id}",
            )
        manager.free_bytes[disk.uuid] = disk.free_bytes
        place = (record.disk.path, record.disk.capacity_bytes)
        if before is None or (before.disk.path, before.disk.capacity_bytes) != place:
            change.disks[disk.uuid] = record
