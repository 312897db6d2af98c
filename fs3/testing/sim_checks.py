"""What must always be true of the managers, checked at every commit and every message; no part of the system.

- Decisions: a record changes only in a commit of the process that holds the lease as the store has it at that moment,
  and an epoch belongs to one process.
- Versions of the routing and of chains only grow, at the store and at every node.
- One version of the routing has one content, whoever tells it.
- A chain keeps its targets and always has one that serves or served last.
- A target that is made serving has every acknowledged write.
- A target is taken out of service only when it cannot serve any more: its lease is over, or its process says so.
- When all serving targets have died, none of them is dropped: each has everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fs3.kv.faults import KvFaults
from fs3.kv.memory import MemoryKv, MemoryTransaction
from fs3.mgmtd.state import CHAIN, LEASE_KEY, STATE_KEY
from fs3.testing.virtual_loop import Process, current_process
from fs3.v1.disk_mgmtd_pb2 import ChainRecord, ManagerLease, ManagerState
from fs3.v1.routing_pb2 import PublicState, Routing

SERVING = PublicState.PUBLIC_STATE_SERVING
LAST_SERVING = PublicState.PUBLIC_STATE_LASTSRV


class Targets(Protocol):
    """What is true of targets at this moment, whatever the managers know."""

    @property
    def now_ns(self) -> int:
        """The time."""

    def missing(self, target_id: int) -> str:
        """Tell what acknowledged data a target lacks; "" for nothing."""

    def serves_until_ns(self, target_id: int) -> int:
        """Tell until when a target may serve by its own lease; 0: it does not serve."""

    def ended_ns(self, target_id: int) -> tuple[int, int]:
        """Tell when the process of a target's node was killed, and when it could serve no more; -1: it has one."""


class Checks:
    """Takes note of what is decided and told. ``fail(property, text)`` is called with every violation."""

    def __init__(self, fail: Callable[[str, str], None], targets: Targets) -> None:
        self.decisions = 0
        self.epochs = 0
        self._fail = fail
        self._targets = targets
        self._lease = ManagerLease()
        self._last: dict[bytes, bytes] = {}
        self._holders: dict[int, Process | None] = {}
        self._routing_version = 0
        self._chains: dict[bytes, ChainRecord] = {}
        self._contents: dict[int, int] = {}
        self._told: dict[str, tuple[int, dict[int, int]]] = {}

    # -- commits ------------------------------------------------------------------------------------------

    def committed(self, writes: dict[bytes, bytes]) -> None:
        """Look at the writes of a commit that the store has just applied for the current process."""
        process = current_process()
        raw = writes.get(LEASE_KEY)
        if raw is not None:
            self._lease_written(ManagerLease.FromString(raw), process)
        decided = [key for key in writes if key != LEASE_KEY]
        if not decided:
            return
        self._decided(process)
        # A commit whose outcome was unknown is made again: whole records, so twice is the same as once.
        if writes == self._last:
            return
        self._last = writes
        raw = writes.get(STATE_KEY)
        if raw is not None:
            version = ManagerState.FromString(raw).routing_version
            if version <= self._routing_version:
                self._fail(
                    "versions grow", f"routing version {version} was committed after version {self._routing_version}"
                )
            self._routing_version = max(version, self._routing_version)
        for key in decided:
            if key.startswith(CHAIN):
                self._chain_written(key, ChainRecord.FromString(writes[key]))

    def _lease_written(self, after: ManagerLease, process: Process | None) -> None:
        before, self._lease = self._lease, after
        who = process.name if process is not None else "nobody"
        if after.epoch == before.epoch:
            if self._holders.get(after.epoch) is not process:
                self._fail("one primary per epoch", f"{who} renewed epoch {after.epoch}, which is another's")
            return
        if after.epoch < before.epoch or after.epoch in self._holders:
            self._fail("one primary per epoch", f"{who} took epoch {after.epoch} after epoch {before.epoch}")
        self._holders[after.epoch] = process
        self.epochs += 1

    def _decided(self, process: Process | None) -> None:
        self.decisions += 1
        holder = self._holders.get(self._lease.epoch)
        if holder is not process or self._lease.released:
            who, other = (p.name if p is not None else "nobody" for p in (process, holder))
            self._fail(
                "epoch fencing",
                f"{who} committed a decision while epoch {self._lease.epoch} is {other}'s or given back",
            )

    def _chain_written(self, key: bytes, after: ChainRecord) -> None:
        before = self._chains.get(key)
        self._chains[key] = after
        chain = after.chain
        states = {t.target_id: t.state for t in chain.targets}
        if not any(s in (SERVING, LAST_SERVING) for s in states.values()):
            self._fail("the last serving target stays", f"nobody serves or served last in {chain}")
        if before is None:
            return
        old = {t.target_id: t.state for t in before.chain.targets}
        if chain.version <= before.chain.version:
            self._fail("versions grow", f"chain {chain.chain_id} went from {before.chain.version} to {chain.version}")
        if set(old) != set(states):
            self._fail("a chain keeps its targets", f"chain {chain.chain_id}: {sorted(old)} became {sorted(states)}")
        for target, state in states.items():
            if state == SERVING and old.get(target) != SERVING and (lacks := self._targets.missing(target)):
                self._fail("serving means complete", f"target {target} was made serving and lacks {lacks}")
            if state != SERVING and old.get(target) == SERVING:
                self._left(target, [t for t, s in states.items() if s == SERVING])

    def _left(self, target: int, staying: list[int]) -> None:
        """Look at a target that is taken out of service while `staying` go on to serve."""
        until_ns, now_ns = self._targets.serves_until_ns(target), self._targets.now_ns
        if until_ns > now_ns:
            more_s = (until_ns - now_ns) / 1e9
            self._fail("leases", f"target {target} was taken out of service, and may serve for {more_s:.3f} s more")
        _, served_ns = self._targets.ended_ns(target)
        if served_ns >= 0 and staying and all(0 <= self._targets.ended_ns(t)[0] <= served_ns for t in staying):
            text = f"target {target} was dropped in favour of {staying}, which had died before it"
            self._fail("the last serving targets stay", text)

    # -- messages -----------------------------------------------------------------------------------------

    def told(self, who: str, raw: bytes) -> int:
        """Look at a routing that a party has taken over; returns its version."""
        routing = Routing.FromString(raw)
        content = hash(routing.SerializeToString(deterministic=True))
        if self._contents.setdefault(routing.version, content) != content:
            self._fail("one routing per version", f"{who} was told another routing of version {routing.version}")
        if routing.version > self._routing_version:
            self._fail(
                "durable before told", f"{who} was told routing version {routing.version}, which is not committed"
            )
        version, chains = self._told.get(who, (0, {}))
        if routing.version < version:
            self._fail("routing never goes back", f"{who} went from routing version {version} to {routing.version}")
        after = {c.chain_id: c.version for c in routing.chains}
        for chain_id, known in chains.items():
            if after.get(chain_id, 0) < known:
                self._fail("routing never goes back", f"{who} knew version {known} of chain {chain_id} and lost it")
        self._told[who] = (routing.version, after)
        return routing.version


class CheckedKv(MemoryKv):
    """The managers' store, with every applied commit shown to the checks."""

    def __init__(self, *, now_ms: Callable[[], int], faults: KvFaults, checks: Checks) -> None:
        super().__init__(now_ms=now_ms, faults=faults)
        self._checks = checks

    def _apply(self, txn: MemoryTransaction) -> bytes:
        stamp = super()._apply(txn)
        writes = {key: value for key, value in txn._writes.items() if isinstance(value, bytes)}
        if writes:
            self._checks.committed(writes)
        return stamp
