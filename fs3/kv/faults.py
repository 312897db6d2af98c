"""Faults of a store for tests and simulation, drawn from a seeded generator."""

from __future__ import annotations

import asyncio
import enum
import random
from dataclasses import dataclass, field

from fs3.kv.api import Conflict, TooOld, Unavailable


class CommitFault(enum.Enum):
    """How a commit goes wrong."""

    CONFLICT = "conflict"
    TOO_OLD = "too old"
    UNKNOWN_APPLIED = "unknown, applied"
    UNKNOWN_NOT_APPLIED = "unknown, not applied"


@dataclass
class KvFaults:
    """Probabilities, 0..1 each; every draw comes from `rng`, so that a seed repeats the faults exactly.

    ``interleave``: reads give way to other tasks, as those of a remote store do. ``delay_s_max``: reads, and commits
    before and after they take effect, take up to so many seconds, mostly much less. ``injected`` counts the faults.
    """

    rng: random.Random
    commit_conflict: float = 0.0
    commit_too_old: float = 0.0
    unknown_applied: float = 0.0
    unknown_not_applied: float = 0.0
    read_too_old: float = 0.0
    read_unavailable: float = 0.0
    interleave: bool = True
    delay_s_max: float = 0.0
    injected: int = field(default=0, init=False)

    async def delay(self) -> None:
        """Let the time of one way to the store pass."""
        if self.delay_s_max:
            await asyncio.sleep(self.delay_s_max * self.rng.random() ** 8)
        elif self.interleave:
            await asyncio.sleep(0)

    def on_read(self) -> None:
        """Raise TooOld or Unavailable if this read is to fail."""
        draw = self.rng.random()
        if draw < self.read_too_old:
            self.injected += 1
            raise TooOld("injected: the snapshot is too old")
        if draw < self.read_too_old + self.read_unavailable:
            self.injected += 1
            raise Unavailable("injected: the store cannot be reached")

    def on_commit(self) -> CommitFault | None:
        """Decide what happens to this commit; None: nothing unusual. Conflict and TooOld are raised."""
        draw = self.rng.random()
        for fault, probability in (
            (CommitFault.CONFLICT, self.commit_conflict),
            (CommitFault.TOO_OLD, self.commit_too_old),
            (CommitFault.UNKNOWN_APPLIED, self.unknown_applied),
            (CommitFault.UNKNOWN_NOT_APPLIED, self.unknown_not_applied),
        ):
            if draw < probability:
                self.injected += 1
                if fault is CommitFault.CONFLICT:
                    raise Conflict("injected: conflict")
                if fault is CommitFault.TOO_OLD:
                    raise TooOld("injected: the snapshot is too old")
                return fault
            draw -= probability
        return None
