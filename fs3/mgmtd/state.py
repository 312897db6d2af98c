"""What the manager knows of the cluster: the records of the KV, changes to them, and the routing made of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import Message

from fs3.core.errors import error
from fs3.kv.api import Transaction, strinc
from fs3.v1.disk_mgmtd_pb2 import ChainRecord, ChainTableRecord, DiskRecord, ManagerState, NodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.routing_pb2 import Disk, Routing, Settings, Target

FORMAT: Final = 1
LEASE_KEY: Final = b"Ml"
STATE_KEY: Final = b"Ms"
NODE: Final = b"Mn"
DISK: Final = b"Md"
CHAIN: Final = b"Mc"
TABLE: Final = b"Mt"


def node_key(node_id: int) -> bytes:
    """Key of a NodeRecord."""
    return NODE + node_id.to_bytes(4, "big")


def disk_key(uuid: bytes) -> bytes:
    """Key of a DiskRecord."""
    return DISK + uuid


def chain_key(chain_id: int) -> bytes:
    """Key of a ChainRecord."""
    return CHAIN + chain_id.to_bytes(4, "big")


def table_key(table_id: int, version: int) -> bytes:
    """Key of a ChainTableRecord."""
    return TABLE + table_id.to_bytes(4, "big") + version.to_bytes(4, "big")


@dataclass
class Records:
    """The persisted state, or a part of it. Records are replaced, never changed in place."""

    nodes: dict[int, NodeRecord] = field(default_factory=dict)
    disks: dict[bytes, DiskRecord] = field(default_factory=dict)
    chains: dict[int, ChainRecord] = field(default_factory=dict)
    tables: dict[tuple[int, int], ChainTableRecord] = field(default_factory=dict)


@dataclass
class Change(Records):
    """Records to write in one transaction, and nodes to forget."""

    removed_nodes: set[int] = field(default_factory=set)
    next_node_id: int = 0
    next_chain_id: int = 0
    # The routing is published again although no record differs (free space).
    publish: bool = False
    settings: Settings | None = None

    def __bool__(self) -> bool:
        records = self.nodes or self.disks or self.chains or self.tables or self.removed_nodes
        return bool(records or self.publish or self.settings is not None)

    def writes(self) -> list[tuple[bytes, Message]]:
        """The keys and records to set."""
        return [
            *((node_key(k), r) for k, r in self.nodes.items()),
            *((disk_key(k), r) for k, r in self.disks.items()),
            *((chain_key(k), r) for k, r in self.chains.items()),
            *((table_key(*k), r) for k, r in self.tables.items()),
        ]


def apply(records: Records, change: Change) -> None:
    """Take a committed change over."""
    records.nodes.update(change.nodes)
    records.disks.update(change.disks)
    records.chains.update(change.chains)
    records.tables.update(change.tables)
    for node_id in change.removed_nodes:
        records.nodes.pop(node_id, None)


def _known_format(found: int, what: str) -> None:
    if found > FORMAT:
        raise error(Code.CODE_NOT_SUPPORTED, f"{what} has format {found}; this fs3 knows {FORMAT}: use a newer version")


async def load(tx: Transaction, cluster_id: str) -> tuple[ManagerState, Records]:
    """Read everything. Raises WRONG_CLUSTER when the store belongs to another cluster."""
    raw = await tx.get(STATE_KEY)
    if raw is None:
        state = ManagerState(format=FORMAT, cluster_id=cluster_id, next_node_id=1, next_chain_id=1)
    else:
        state = ManagerState.FromString(raw)
    _known_format(state.format, "the manager's state")
    if state.cluster_id != cluster_id:
        raise error(
            Code.CODE_WRONG_CLUSTER,
            f"the key-value store belongs to cluster {state.cluster_id!r}, this manager to {cluster_id!r}",
        )
    records = Records()
    for _, value in await tx.get_range(NODE, strinc(NODE)):
        node = NodeRecord.FromString(value)
        _known_format(node.format, "a node record")
        records.nodes[node.node.node_id] = node
    for _, value in await tx.get_range(DISK, strinc(DISK)):
        disk = DiskRecord.FromString(value)
        _known_format(disk.format, "a disk record")
        records.disks[disk.disk.uuid] = disk
    for _, value in await tx.get_range(CHAIN, strinc(CHAIN)):
        chain = ChainRecord.FromString(value)
        _known_format(chain.format, "a chain record")
        records.chains[chain.chain.chain_id] = chain
    for _, value in await tx.get_range(TABLE, strinc(TABLE)):
        table = ChainTableRecord.FromString(value)
        _known_format(table.format, "a chain table record")
        records.tables[table.table.table_id, table.table.table_version] = table
    return state, records


@dataclass
class Soft:
    """What is not kept but learned again: the last report of a target, the free space of a disk."""

    local: int = 0
    chain_version: int = 0
    changed_ns: int = 0
    orderly: bool = False
    used_bytes: int = 0


def make_routing(
    state: ManagerState,
    records: Records,
    soft: dict[int, Soft],
    free_bytes: dict[bytes, int],
    lease_ms: int,
    history: int,
) -> Routing:
    """Assemble the routing, everything in the order of ids."""
    routing = Routing(
        version=state.routing_version,
        cluster_id=state.cluster_id,
        lease_ms=lease_ms,
        settings=state.settings,
        history=history,
    )
    routing.nodes.extend(records.nodes[n].node for n in sorted(records.nodes))
    for uuid in sorted(records.disks):
        disk = Disk()
        disk.CopyFrom(records.disks[uuid].disk)
        disk.free_bytes = free_bytes.get(uuid, disk.free_bytes)
        routing.disks.append(disk)
    targets: list[Target] = []
    for chain_id in sorted(records.chains):
        record = records.chains[chain_id]
        routing.chains.append(record.chain)
        targets.extend(record.targets)
    for target in sorted(targets, key=lambda t: t.target_id):
        copy = routing.targets.add()
        copy.CopyFrom(target)
        known = soft.get(target.target_id)
        if known is not None:
            copy.local_state = known.local  # type: ignore[assignment]
            copy.used_bytes = known.used_bytes
    routing.tables.extend(records.tables[t].table for t in sorted(records.tables))
    return routing
