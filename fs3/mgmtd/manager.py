"""The primary manager: the state it owns, what it decides, and how a decision becomes durable.

Decisions are made one at a time under a lock: compute a :class:`Change` from the records and from what nodes
reported, commit it in a transaction that re-checks the lease, take it over, publish the routing. Reports of nodes
touch only what is not persisted and never wait.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Final

from fs3.core.clock import Clock
from fs3.core.config import MgmtdConfig
from fs3.core.errors import error
from fs3.core.ids import TARGETS_PER_NODE_MAX, NodeId, target_id
from fs3.core.routing import News, RoutingTeller, diff
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction
from fs3.mgmtd import chains, lease, placement
from fs3.mgmtd.state import (
    FORMAT,
    LEASE_KEY,
    STATE_KEY,
    Change,
    Records,
    Soft,
    apply,
    make_routing,
    node_key,
)
from fs3.v1.disk_mgmtd_pb2 import ChainRecord, ChainTableRecord, ManagerLease, ManagerState, NodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.routing_pb2 import (
    Chain,
    ChainTable,
    ChainTarget,
    LocalState,
    NodeStatus,
    PublicState,
    Routing,
    Target,
)

log = logging.getLogger("fs3.mgmtd")

TABLE_ID: Final = 1
STORAGE: Final = "storage"
# A silent node that holds no data is forgotten after so many leases.
FORGET_LEASES: Final = 10
# Free space is published again when it moved by this part of the capacity, at most this often.
SPACE_STEP: Final = 0.01
SPACE_INTERVAL_NS: Final = 5_000_000_000
COMMIT_DEADLINE_MS: Final = 5_000
# Decisions further apart than this part of the lease mean that the manager was not listening.
PAUSES_PER_LEASE: Final = 3


@dataclass
class Live:
    """A node as heard of, on the manager's monotonic clock."""

    heard_ns: int
    sequence: int = 0
    # Silence counts from here at the earliest: the manager was not listening before.
    excused_ns: int = 0
    # It is proved to have been alive then.
    lived_ns: int = 0

    @property
    def silent_since_ns(self) -> int:
        """Since when its silence counts."""
        return max(self.heard_ns, self.excused_ns)


class Manager:
    """State and decisions of one primary, from takeover to the loss of the lease. Belongs to one event loop."""

    def __init__(
        self,
        config: MgmtdConfig,
        store: KvStore,
        clock: Clock,
        held: ManagerLease,
        state: ManagerState,
        records: Records,
        rng: random.Random | None = None,
        *,
        history: int = 0,
    ) -> None:
        """Take over what the store has. `history`: of the routings that this primary publishes; 0: no deltas."""
        self.config = config
        self.clock = clock
        self.held = held
        self.state = state
        self.records = records
        self.lease_ns = config.lease_ms * 1_000_000
        self.soft: dict[int, Soft] = {}
        self.free_bytes: dict[bytes, int] = {}
        self.live: dict[int, Live] = {}
        self.lost = asyncio.Event()
        self.lock = asyncio.Lock()
        self._store = store
        self._rng = rng
        self._published = asyncio.Event()
        # Nodes with targets in the change that is on its way to the store.
        self._in_flight: set[int] = set()
        self._kicked = asyncio.Event()
        self._dirty: set[int] = set(records.chains)
        self._placement_due = True
        self._space_published_ns = 0
        self._decided_ns = clock.monotonic_ns()
        self._node_of: dict[int, int] = {}
        self._chain_of: dict[int, int] = {}
        self._targets_on: dict[int, list[int]] = {}
        self._adopt()
        self._history = history
        self.routing = self._make_routing()
        self.teller = RoutingTeller()
        self.teller.advance(News(self.routing, None))

    def _adopt(self) -> None:
        """Assume of everybody what was last decided: a new manager disturbs nobody before a full lease is over."""
        now_ns = self.clock.monotonic_ns()
        for node_id, record in self.records.nodes.items():
            connected = record.node.status == NodeStatus.NODE_STATUS_CONNECTED
            self.live[node_id] = Live(heard_ns=now_ns - self.lease_ns, excused_ns=now_ns if connected else 0)
        assumed = {chains.SERVING: chains.LOCAL_UPTODATE, chains.WAITING: chains.LOCAL_UPTODATE}
        assumed[chains.SYNCING] = chains.LOCAL_ONLINE
        for chain_id, chain in self.records.chains.items():
            states = {t.target_id: t.state for t in chain.chain.targets}
            for target in chain.targets:
                self._index(target, chain_id)
                local = assumed.get(states[target.target_id], chains.LOCAL_OFFLINE)
                self.soft[target.target_id] = Soft(local=local, changed_ns=now_ns)

    def _adopt_new_chains(self, change: Change) -> None:
        """Assume of the targets of chains that were just made what they are made as: serving, with nothing to lack."""
        now_ns = self.clock.monotonic_ns()
        for chain_id in sorted(change.chains.keys() - self.records.chains.keys()):
            for target in change.chains[chain_id].targets:
                self._index(target, chain_id)
                self.soft[target.target_id] = Soft(local=chains.LOCAL_UPTODATE, changed_ns=now_ns)

    def _index(self, target: Target, chain_id: int) -> None:
        self._node_of[target.target_id] = target.node_id
        self._targets_on.setdefault(target.node_id, []).append(target.target_id)
        self._chain_of[target.target_id] = chain_id

    # -- routing ------------------------------------------------------------------------------------------

    def _make_routing(self) -> Routing:
        lease_ms = self.config.lease_ms
        return make_routing(self.state, self.records, self.soft, self.free_bytes, lease_ms, self._history)

    async def wait_newer(self, version: int) -> None:
        """Return when the routing is newer than `version` or the lease is lost."""
        while self.routing.version <= version and not self.lost.is_set():
            await self._published.wait()

    def _publish(self) -> None:
        before, self.routing = self.routing, self._make_routing()
        self.teller.advance(News(self.routing, diff(before, self.routing)))
        published, self._published = self._published, asyncio.Event()
        published.set()

    def lose(self, why: str = "") -> None:
        """Stop being the primary: nothing is decided or answered any more. Without a reason the process ends."""
        if not self.lost.is_set():
            if why:
                log.warning("no longer primary: %s", why)
            self.lost.set()
            self._published.set()
            self._kicked.set()

    # -- deciding -----------------------------------------------------------------------------------------

    async def commit(self, change: Change) -> None:
        """Make `change` durable and public; the caller holds the lock.

        Raises NOT_PRIMARY when the lease is somebody else's now, UNAVAILABLE when the outcome is unknown; both
        end this primary.
        """
        if self.lost.is_set():
            # Also for who waited for the lock meanwhile: the records may be behind a commit of unknown outcome.
            raise error(Code.CODE_NOT_PRIMARY, "this cluster manager has just lost its lease")
        if not change:
            return
        state = ManagerState()
        state.CopyFrom(self.state)
        state.routing_version += 1
        state.next_node_id = max(state.next_node_id, change.next_node_id)
        state.next_chain_id = max(state.next_chain_id, change.next_chain_id)
        if change.settings is not None:
            state.settings.CopyFrom(change.settings)

        async def write(tx: Transaction) -> None:
            if not lease.holds(await tx.get(LEASE_KEY), self.held):
                raise error(Code.CODE_NOT_PRIMARY, "another cluster manager is primary now")
            tx.set(STATE_KEY, state.SerializeToString())
            for key, record in change.writes():
                tx.set(key, record.SerializeToString())
            for node_id in change.removed_nodes:
                tx.clear(node_key(node_id))

        self._in_flight = {t.node_id for record in change.chains.values() for t in record.targets}
        try:
            # Twice is the same as once: the values are whole records, and nobody else writes while the lease holds.
            await retry.run(self._store, write, deadline_ms=COMMIT_DEADLINE_MS, idempotent=True, rng=self._rng)
        except KvError as exc:
            self.lose(f"the key-value store does not take changes: {exc}")
            raise error(
                Code.CODE_UNAVAILABLE, "the cluster manager cannot reach its store", maybe_applied=True
            ) from exc
        except OSError as exc:
            self.lose(str(exc))
            raise
        finally:
            self._in_flight = set()
        self.state = state
        self._log_change(change)
        self._adopt_new_chains(change)
        apply(self.records, change)
        for node_id in change.removed_nodes:
            self.live.pop(node_id, None)
        self._publish()

    async def wait_settled(self, node_id: int) -> None:
        """Return when no decision about the node's targets is on its way to the store. Raises NOT_PRIMARY."""
        while node_id in self._in_flight:
            async with self.lock:
                pass
        if self.lost.is_set():
            raise error(Code.CODE_NOT_PRIMARY, "this cluster manager has just lost its lease")

    def _log_change(self, change: Change) -> None:
        for node_id, node in change.nodes.items():
            before = self.records.nodes.get(node_id)
            if before is None or before.node.status != node.node.status:
                connected = node.node.status == NodeStatus.NODE_STATUS_CONNECTED
                status = "is connected" if connected else "is gone"
                log.info("node %d (%s %s:%d) %s", node_id, node.node.role, node.node.host, node.node.frame_port, status)
        for record in change.chains.values():
            log.info("chain %d version %d: %s", record.chain.chain_id, record.chain.version, describe(record.chain))

    def kick(self) -> None:
        """Decide soon: something was reported that may matter."""
        self._kicked.set()

    async def wait_kick(self) -> None:
        """Return at the next kick."""
        await self._kicked.wait()
        self._kicked.clear()

    def node_silent(self, node_id: int, now_ns: int) -> bool:
        """Tell whether a node was silent for the whole lease."""
        live = self.live.get(node_id)
        return live is None or now_ns - live.silent_since_ns >= self.lease_ns

    def view(self, target: int) -> chains.TargetView:
        """Put together what is known of a target."""
        soft = self.soft.get(target)
        live = self.live.get(self._node_of.get(target, 0))
        if soft is None or live is None:
            return chains.UNKNOWN
        return chains.TargetView(
            soft.local,
            soft.chain_version,
            live.heard_ns,
            soft.changed_ns,
            soft.orderly,
            live.excused_ns,
            lived_ns=live.lived_ns,
        )

    @property
    def epoch(self) -> int:
        """Number of this primary's lease; its times mean nothing to another."""
        return self.held.epoch

    def is_going(self, target: int) -> bool:
        """Tell whether a target is taken for dead while its chain still has it as serving."""
        chain_id = self._chain_of.get(target)
        if chain_id is None or self.view(target).alive(self.clock.monotonic_ns(), self.lease_ns):
            return False
        chain = self.records.chains[chain_id].chain
        return any(t.target_id == target and t.state == PublicState.PUBLIC_STATE_SERVING for t in chain.targets)

    def targets_of(self, node_id: int) -> list[int]:
        """List the targets on a node."""
        return self._targets_on.get(node_id, [])

    def set_local(self, target: int, local: int, *, chain_version: int, at_ns: int, orderly: bool = False) -> None:
        """Note what is now known of a target's own state, and look at its chain at the next decision."""
        soft = self.soft.setdefault(target, Soft(changed_ns=at_ns))
        was_alive, is_alive = (s in (chains.LOCAL_ONLINE, chains.LOCAL_UPTODATE) for s in (soft.local, local))
        if was_alive != is_alive or soft.local == 0:
            soft.changed_ns = at_ns
            soft.orderly = orderly
        if (soft.local, soft.chain_version) != (local, chain_version):
            self._dirty.add(self._chain_of[target])
        soft.local = local
        soft.chain_version = chain_version

    def chain_version(self, target: int) -> int:
        """Look up the version of a target's chain; 0 when there is no such target."""
        chain_id = self._chain_of.get(target)
        return 0 if chain_id is None else self.records.chains[chain_id].chain.version

    def report(self, target: int, local: int, chain_version: int, used_bytes: int) -> None:
        """Take a target's report; one of another chain version counts only when it says OFFLINE."""
        chain_id = self._chain_of.get(target)
        if chain_id is None or local == LocalState.LOCAL_STATE_UNSPECIFIED:
            return
        chain = self.records.chains[chain_id].chain
        if chains.accepts_report(chain, local, chain_version):
            now_ns = self.clock.monotonic_ns()
            self.set_local(target, local, chain_version=chain_version, at_ns=now_ns)
            self.soft[target].used_bytes = used_bytes
            if chain_id in self._dirty:
                self.kick()

    def take_down(self, node_id: int, *, at_ns: int, orderly: bool) -> None:
        """Note that a node's process is gone: its targets are unusable since `at_ns`."""
        for target in self.targets_of(node_id):
            self.set_local(target, chains.LOCAL_OFFLINE, chain_version=0, at_ns=at_ns, orderly=orderly)

    def plan_chains(self, change: Change) -> None:
        """Add the next state of every chain whose reports changed."""
        now_ns = self.clock.monotonic_ns()
        for chain_id in sorted(self._dirty):
            record = self.records.chains[chain_id]
            views = {t.target_id: self.view(t.target_id) for t in record.chain.targets}
            after = chains.next_chain(record.chain, views, now_ns, self.lease_ns)
            if after is not record.chain:
                change.chains[chain_id] = ChainRecord(format=FORMAT, chain=after, targets=record.targets)
            elif self._settled(after, views, now_ns):
                self._dirty.discard(chain_id)

    def _settled(self, chain: Chain, views: dict[int, chains.TargetView], now_ns: int) -> bool:
        """Tell whether only a report can change this chain: no decision about it waits for time."""
        for target in chain.targets:
            if target.state == PublicState.PUBLIC_STATE_LASTSRV:
                return False
            alive = views[target.target_id].alive(now_ns, self.lease_ns)
            if alive != (target.state != PublicState.PUBLIC_STATE_OFFLINE):
                return False
        return True

    async def begin(self) -> None:
        """Publish the routing under a new version, and note whose store this is. Raises like commit."""
        async with self.lock:
            await self.commit(Change(publish=True))

    async def decide(self) -> None:
        """Expire leases, move chains on, make new chains, publish free space. Raises like commit."""
        async with self.lock:
            self._excuse_pause()
            change = Change()
            self._expire(change)
            self.plan_chains(change)
            if self._placement_due:
                self._place(change)
            self._publish_space(change)
            await self.commit(change)
            if change.chains:
                self.kick()

    def _excuse_pause(self) -> None:
        """When this process itself stood still, nobody's silence meanwhile says anything: all get a full lease."""
        now_ns = self.clock.monotonic_ns()
        paused_ns, self._decided_ns = now_ns - self._decided_ns, now_ns
        if paused_ns <= self.lease_ns // PAUSES_PER_LEASE:
            return
        log.warning("this manager stood still for %.1f s; nobody is declared failed before a lease", paused_ns / 1e9)
        for node_id, record in self.records.nodes.items():
            if record.node.status == NodeStatus.NODE_STATUS_CONNECTED and node_id in self.live:
                self.live[node_id].excused_ns = now_ns

    def _expire(self, change: Change) -> None:
        now_ns = self.clock.monotonic_ns()
        for node_id, record in self.records.nodes.items():
            silent = self.node_silent(node_id, now_ns)
            connected = record.node.status == NodeStatus.NODE_STATUS_CONNECTED
            if silent and connected:
                change.nodes[node_id] = with_status(record, NodeStatus.NODE_STATUS_FAILED)
                self.take_down(node_id, at_ns=self.live[node_id].silent_since_ns + self.lease_ns // 2, orderly=False)
            elif not silent and not connected:
                change.nodes[node_id] = with_status(record, NodeStatus.NODE_STATUS_CONNECTED)
                self._placement_due = True
            elif silent and record.node.role != STORAGE:
                live = self.live.get(node_id)
                if live is None or now_ns - live.silent_since_ns >= FORGET_LEASES * self.lease_ns:
                    change.removed_nodes.add(node_id)

    def placement_due(self) -> None:
        """Look for free disks at the next decision."""
        self._placement_due = True
        self.kick()

    def _place(self, change: Change) -> None:
        """Make chains of the free disks once enough nodes are connected, and publish a table with all chains."""
        self._placement_due = False
        now_ns = self.clock.monotonic_ns()
        on_disk: dict[bytes, int] = {}
        for record in self.records.chains.values():
            for target in record.targets:
                on_disk[target.disk_uuid] = on_disk.get(target.disk_uuid, 0) + 1
        usable = {
            n
            for n, r in {**self.records.nodes, **change.nodes}.items()
            if r.node.role == STORAGE
            and r.node.status == NodeStatus.NODE_STATUS_CONNECTED
            and not self.node_silent(n, now_ns)
        }
        domains = self._domains(usable, change)
        if domains is not None:
            usable &= domains.keys()
        disks = [r.disk for r in self.records.disks.values() if r.disk.node_id in usable]
        needed = self.config.min_storage_nodes or self.config.replicas
        if not self.records.tables and len({d.node_id for d in disks}) < needed:
            return
        free = [
            placement.FreeDisk(d.node_id, d.uuid, self.config.targets_per_disk - on_disk.get(d.uuid, 0))
            for d in sorted(disks, key=lambda d: (d.node_id, d.uuid))
        ]
        existing = [
            [self._node_of[t.target_id] for t in self.records.chains[c].chain.targets]
            for c in sorted(self.records.chains)
        ]
        plan = placement.plan_chains(free, self.config.replicas, existing, domains)
        if plan:
            self._make_chains(change, plan)

    def _domains(self, nodes: set[int], change: Change) -> dict[int, str] | None:
        """What each of `nodes` fails together with, by its tag; None: no such tag is configured."""
        tag = self.config.failure_domain
        if not tag:
            return None
        tags = {n: (change.nodes.get(n) or self.records.nodes[n]).node.tags for n in nodes}
        return {n: found[tag] for n, found in tags.items() if tag in found}

    def _make_chains(self, change: Change, plan: list[tuple[placement.Place, ...]]) -> None:
        next_chain_id = self.state.next_chain_id
        for places in plan:
            chain = Chain(chain_id=next_chain_id, version=1)
            record = ChainRecord(format=FORMAT)
            for place in places:
                made = self._new_target(change, place, chain.chain_id)
                if made is None:
                    break
                record.targets.append(made)
                chain.targets.append(ChainTarget(target_id=made.target_id, state=chains.SERVING))
            if len(record.targets) < len(places):
                continue
            record.chain.CopyFrom(chain)
            change.chains[chain.chain_id] = record
            next_chain_id += 1
        change.next_chain_id = next_chain_id
        last = max((v for t, v in self.records.tables if t == TABLE_ID), default=0)
        table = ChainTable(
            table_id=TABLE_ID,
            table_version=last + 1,
            chain_ids=sorted({*self.records.chains, *change.chains}),
            replicas=self.config.replicas,
        )
        change.tables[TABLE_ID, last + 1] = ChainTableRecord(format=FORMAT, table=table)
        log.info("chain table %d version %d: %d chains", TABLE_ID, last + 1, len(table.chain_ids))

    def _new_target(self, change: Change, place: placement.Place, chain_id: int) -> Target | None:
        """Give a node's next target id; None when the node has had as many as there can be."""
        record = NodeRecord()
        record.CopyFrom(change.nodes.get(place.node_id) or self.records.nodes[place.node_id])
        if record.next_target_ordinal >= TARGETS_PER_NODE_MAX:
            log.error("node %d has had %d targets already; it gets no more", place.node_id, TARGETS_PER_NODE_MAX)
            return None
        made = target_id(NodeId(place.node_id), record.next_target_ordinal)
        record.next_target_ordinal += 1
        change.nodes[place.node_id] = record
        return Target(target_id=made, node_id=place.node_id, disk_uuid=place.disk_uuid, chain_id=chain_id)

    def _publish_space(self, change: Change) -> None:
        now_ns = self.clock.monotonic_ns()
        if now_ns - self._space_published_ns < SPACE_INTERVAL_NS:
            return
        for disk in self.routing.disks:
            free = self.free_bytes.get(disk.uuid, disk.free_bytes)
            if abs(free - disk.free_bytes) > SPACE_STEP * max(disk.capacity_bytes, 1):
                change.publish = True
                self._space_published_ns = now_ns
                return


def with_status(record: NodeRecord, status: NodeStatus.ValueType) -> NodeRecord:
    """Copy a node record with another status."""
    copy = NodeRecord()
    copy.CopyFrom(record)
    copy.node.status = status
    return copy


def describe(chain: Chain) -> str:
    """Write a chain's targets and states for a log line."""
    names = {v: n.removeprefix("PUBLIC_STATE_").lower() for n, v in PublicState.items()}
    return ", ".join(f"{t.target_id} {names[t.state]}" for t in chain.targets)
