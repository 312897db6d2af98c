"""The chain state machine: from what targets report to what they may do. Pure.

The rules are those of 3FS's table, read in the order of the old states, with these differences:

- Several targets may sync at once.
- When every serving target died and none continued to serve, all of them are LASTSRV: each holds every
  acknowledged write. One of them serves again when it is back, and the others sync from it. The tail commits
  first, so the one furthest down the chain has shown readers the most: it is waited for, for one lease.
- A serving target is only dropped when another serving one is proved to have lived after the death. When all die at
  once, their deaths become known one after another; without this rule the set would shrink to the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fs3.v1.routing_pb2 import Chain, ChainTarget, LocalState, PublicState

SERVING = PublicState.PUBLIC_STATE_SERVING
LASTSRV = PublicState.PUBLIC_STATE_LASTSRV
SYNCING = PublicState.PUBLIC_STATE_SYNCING
WAITING = PublicState.PUBLIC_STATE_WAITING
OFFLINE = PublicState.PUBLIC_STATE_OFFLINE

LOCAL_OFFLINE = LocalState.LOCAL_STATE_OFFLINE
LOCAL_ONLINE = LocalState.LOCAL_STATE_ONLINE
LOCAL_UPTODATE = LocalState.LOCAL_STATE_UPTODATE

_ORDER = (SERVING, LASTSRV, SYNCING, WAITING, OFFLINE)


@dataclass(frozen=True, slots=True)
class TargetView:
    """What the manager knows of a target. Times are its own monotonic nanoseconds."""

    local: int
    """LocalState of the last accepted report."""
    chain_version: int
    """Chain version that report speaks of. UPTODATE counts only under the current one."""
    heard_ns: int
    """When its node was last heard."""
    changed_ns: int = 0
    """When `local` last changed between OFFLINE and alive."""
    orderly: bool = False
    """OFFLINE because its node ended in good order: no survivor has to be heard first."""
    excused_ns: int = 0
    """Silence counts from here at the earliest: before, the manager itself was not listening."""
    lived_ns: int = 0
    """Its node is proved to have been alive then. What was heard later may have been sent before."""

    def alive(self, now_ns: int, lease_ns: int) -> bool:
        """Tell whether the target is usable and its node's lease runs."""
        return self.local in (LOCAL_ONLINE, LOCAL_UPTODATE) and now_ns - max(self.heard_ns, self.excused_ns) < lease_ns

    def survivor_lived_after_ns(self, lease_ns: int) -> int:
        """Time after which a survivor must have been alive before this dead target is dropped."""
        if self.local == LOCAL_OFFLINE:
            return -1 if self.orderly else self.changed_ns
        return max(self.heard_ns, self.excused_ns) + lease_ns // 2


UNKNOWN = TargetView(local=LOCAL_OFFLINE, chain_version=0, heard_ns=0)


class _Step:
    """One evaluation of a chain."""

    def __init__(self, chain: Chain, views: Mapping[int, TargetView], now_ns: int, lease_ns: int) -> None:
        self.chain = chain
        self.views = views
        self.now_ns = now_ns
        self.lease_ns = lease_ns
        # The new state of each target, in the old order.
        self.new: dict[int, int] = {}

    def view(self, target: int) -> TargetView:
        return self.views.get(target, UNKNOWN)

    def alive(self, target: int) -> bool:
        return self.view(target).alive(self.now_ns, self.lease_ns)

    def old(self, *states: int) -> list[int]:
        return [t.target_id for t in self.chain.targets if t.state in states]

    def some_serving(self) -> bool:
        return SERVING in self.new.values()

    def serving(self) -> bool:
        """Decide the SERVING ones; False when nothing may be decided yet."""
        old = self.old(SERVING)
        dead = [t for t in old if not self.alive(t)]
        living = [t for t in old if t not in dead]
        if dead and living:
            needed_ns = max(self.view(t).survivor_lived_after_ns(self.lease_ns) for t in dead)
            if max(self.view(t).lived_ns for t in living) <= needed_ns:
                return False
        for target in old:
            self.new[target] = SERVING if target in living else OFFLINE if living else LASTSRV
        return True

    def last_serving(self) -> None:
        old = self.old(LASTSRV)
        if self.some_serving():
            self.new.update(dict.fromkeys(old, OFFLINE))
            return
        self.new.update(dict.fromkeys(old, LASTSRV))
        back = [t for t in old if self.alive(t)]
        if not back:
            return
        waited = any(self.now_ns - self.view(t).changed_ns >= self.lease_ns for t in back)
        if back[-1] == old[-1] or waited:
            self.new[back[-1]] = SERVING

    def syncing(self) -> None:
        for target in self.old(SYNCING):
            view = self.view(target)
            if not self.alive(target):
                self.new[target] = OFFLINE
            elif view.local == LOCAL_UPTODATE and view.chain_version == self.chain.version:
                self.new[target] = SERVING
            else:
                self.new[target] = SYNCING
        if not self.some_serving():
            for target in self.old(SYNCING):
                if self.new[target] == SYNCING:
                    self.new[target] = WAITING

    def waiting(self) -> None:
        for target in self.old(WAITING, OFFLINE):
            if not self.alive(target):
                self.new[target] = OFFLINE
            elif self.some_serving() and self.view(target).local == LOCAL_ONLINE:
                self.new[target] = SYNCING
            else:
                self.new[target] = WAITING

    def finish(self) -> Chain:
        if self.some_serving():
            for target, state in self.new.items():
                if state == LASTSRV:
                    self.new[target] = OFFLINE
        ordered = sorted(self.new.items(), key=lambda item: _ORDER.index(item[1]))
        targets = [ChainTarget(target_id=t, state=s) for t, s in ordered]  # type: ignore[arg-type]
        if targets == list(self.chain.targets):
            return self.chain
        return Chain(chain_id=self.chain.chain_id, version=self.chain.version + 1, targets=targets)


def next_chain(chain: Chain, views: Mapping[int, TargetView], now_ns: int, lease_ns: int) -> Chain:
    """Return the chain after what is known now: `chain` itself, or one with its version raised by 1.

    Never leaves a chain without a SERVING or LASTSRV target. A target without a view counts as dead.
    """
    step = _Step(chain, views, now_ns, lease_ns)
    # The order of the calls is the order of the rules: later ones look at what the earlier ones decided. The
    # dictionary keeps the old chain order, which the final sort keeps within each state.
    step.new = dict.fromkeys((t.target_id for t in chain.targets), 0)
    if not step.serving():
        return chain
    step.last_serving()
    step.syncing()
    step.waiting()
    return step.finish()


def accepts_report(chain: Chain, local: int, chain_version: int) -> bool:
    """Tell whether a report counts: it speaks of the current version, or says that the target is unusable."""
    return chain_version == chain.version or local == LOCAL_OFFLINE
