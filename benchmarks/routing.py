"""What a change of the routing costs a manager of 100 storage nodes: bytes and CPU time, told whole and as deltas.

    python benchmarks/routing.py

No cluster: the manager's own functions on 100 nodes with 4 disks each, 1,000 chains of 3 targets and one table.
Everyone is a follower, and answers are serialized for each as gRPC does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fs3.core.routing import News, RoutingTeller, apply, diff, known
from fs3.mgmtd import chains
from fs3.mgmtd.state import FORMAT, Records, Soft, make_routing
from fs3.v1.disk_mgmtd_pb2 import ChainRecord, ChainTableRecord, DiskRecord, ManagerState, NodeRecord
from fs3.v1.routing_pb2 import (
    Chain,
    ChainTable,
    ChainTarget,
    Disk,
    GetRoutingResponse,
    Node,
    NodeStatus,
    Routing,
    Target,
)

NODES = 100
DISKS = 4
CHAINS = 1000
REPLICAS = 3
FOLLOWERS = 100
ROUNDS = 10
FREE_BYTES = 5 << 40
"""Of a disk, before anything changes."""


class Cluster:
    """What a manager knows of a cluster in which everything serves."""

    def __init__(self) -> None:
        self.state = ManagerState(format=FORMAT, cluster_id="bench", routing_version=1000)
        self.records = Records()
        self.free_bytes: dict[bytes, int] = {}
        for node_id in range(1, NODES + 1):
            self._add_node(node_id)
        for chain_id in range(1, CHAINS + 1):
            self._add_chain(chain_id)
        table = ChainTable(table_id=1, table_version=1, chain_ids=range(1, CHAINS + 1), replicas=REPLICAS)
        self.records.tables[1, 1] = ChainTableRecord(format=FORMAT, table=table)
        targets = [t for record in self.records.chains.values() for t in record.targets]
        self.soft = {t.target_id: Soft(local=chains.LOCAL_UPTODATE, used_bytes=3 << 38) for t in targets}

    def _add_node(self, node_id: int) -> None:
        node = Node(
            node_id=node_id,
            uuid=node_id.to_bytes(16, "big"),
            role="storage",
            host=f"10.0.0.{node_id}",
            frame_port=7000,
            status=NodeStatus.NODE_STATUS_CONNECTED,
            incarnation=node_id.to_bytes(16, "little"),
            pid=node_id,
            version="0.1.0",
            life=1 << 60,
        )
        self.records.nodes[node_id] = NodeRecord(format=FORMAT, node=node)
        for number in range(DISKS):
            uuid = disk_uuid(node_id, number)
            disk = Disk(uuid=uuid, node_id=node_id, path=f"/var/lib/fs3/disk{number}", capacity_bytes=8 << 40)
            self.records.disks[uuid] = DiskRecord(format=FORMAT, disk=disk)
            self.free_bytes[uuid] = FREE_BYTES

    def _add_chain(self, chain_id: int) -> None:
        record = ChainRecord(format=FORMAT, chain=Chain(chain_id=chain_id, version=1))
        for ordinal in range((chain_id - 1) * REPLICAS, chain_id * REPLICAS):
            node_id, nth = ordinal % NODES + 1, ordinal // NODES
            target = Target(target_id=node_id * 1000 + nth, node_id=node_id, chain_id=chain_id)
            target.disk_uuid = disk_uuid(node_id, nth % DISKS)
            record.targets.append(target)
            record.chain.targets.append(ChainTarget(target_id=target.target_id, state=chains.SERVING))
        self.records.chains[chain_id] = record

    def routing(self) -> Routing:
        """Make the present routing as the manager does."""
        return make_routing(self.state, self.records, self.soft, self.free_bytes, 10_000, history=1)

    def fill_disk(self) -> None:
        """Let a disk's free space change."""
        self.free_bytes[disk_uuid(1, 0)] -= 1 << 37

    def fail_node(self) -> None:
        """Take a node's targets out of service, as when it was silent for its lease."""
        self.records.nodes[7].node.status = NodeStatus.NODE_STATUS_FAILED
        for record in self.records.chains.values():
            mine = [t.target_id for t in record.targets if t.node_id == 7]
            for target in record.chain.targets:
                if target.target_id in mine:
                    record.chain.version += 1
                    target.state = chains.OFFLINE
                    self.soft[target.target_id].local = chains.LOCAL_OFFLINE


def disk_uuid(node_id: int, number: int) -> bytes:
    return (node_id * DISKS + number).to_bytes(16, "big")


def milliseconds(work: Callable[[], object]) -> float:
    """CPU time of the fastest of some rounds."""
    best_ns = 1 << 62
    for _ in range(ROUNDS):
        began_ns = time.process_time_ns()
        work()
        best_ns = min(best_ns, time.process_time_ns() - began_ns)
    return best_ns / 1e6


def tell_all(answer: GetRoutingResponse) -> None:
    for _ in range(FOLLOWERS):
        answer.SerializeToString()


def measure(what: str, change: Callable[[Cluster], None]) -> None:
    cluster = Cluster()
    old = cluster.routing()
    change(cluster)
    cluster.state.routing_version += 1
    new = cluster.routing()
    made_ms = milliseconds(cluster.routing)
    teller = RoutingTeller()
    teller.advance(News(old, None))
    teller.advance(News(new, diff(old, new)))
    for asker in (known(Routing()), known(old)):
        answer = teller.tell(asker)
        spent_ms = made_ms + milliseconds(lambda answer=answer: tell_all(answer))
        raw = answer.SerializeToString()
        took_ms = milliseconds(lambda raw=raw: GetRoutingResponse.FromString(raw))
        if answer.HasField("delta"):
            spent_ms += milliseconds(lambda: diff(old, new))
            took_ms += milliseconds(lambda answer=answer: apply(old, answer.delta))
        kind = "delta" if answer.HasField("delta") else "whole"
        print(f"{what:18} {kind}  {len(raw):7,} bytes  manager {spent_ms:6.1f} ms  follower {took_ms:4.1f} ms")


if __name__ == "__main__":
    measure("free space moves", Cluster.fill_disk)
    measure("a node fails", Cluster.fail_node)
