"""Who is the primary manager: decisions on the lease record of the KV. Pure.

Nobody compares wall clocks. An observer watches the record; it is dead when it has not changed for the whole
lease on the observer's own monotonic clock. The holder trusts itself for half the lease from the moment it sent
its last successful renewal, so that it has stopped before anybody can take over.

The record says which release its holder was of. A manager of an older one never goes on from there, whether the holder
is dead or has given the lease back: it would not understand all that was decided.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from fs3.v1.disk_mgmtd_pb2 import ManagerLease

FORMAT = 1
# Raised when managers begin to keep or decide what those before would get wrong.
RELEASE: Final = 1


@dataclass(frozen=True, slots=True)
class Observed:
    """The record as last seen and since when it looks like that, in the observer's monotonic nanoseconds."""

    record: bytes | None
    since_ns: int


def observe(before: Observed | None, record: bytes | None, now_ns: int) -> Observed:
    """Note what the record looks like now."""
    if before is not None and before.record == record:
        return before
    return Observed(record, now_ns)


def may_take(seen: Observed, now_ns: int, lease_ns: int) -> bool:
    """Tell whether the lease is free: never held, given back, or unchanged for the whole lease."""
    if seen.record is None:
        return True
    lease = ManagerLease.FromString(seen.record)
    return lease.released or now_ns - seen.since_ns >= lease_ns


def outdated(record: bytes | None, release: int) -> bool:
    """Tell whether a manager of `release` is older than the last holder, and so may never take the lease."""
    return record is not None and ManagerLease.FromString(record).release > release


def taken(record: bytes | None, holder: bytes, address: str, release: int = RELEASE) -> ManagerLease:
    """Make the record of a takeover: the epoch rises."""
    epoch = ManagerLease.FromString(record).epoch if record is not None else 0
    return ManagerLease(format=FORMAT, epoch=epoch + 1, holder=holder, address=address, beat=1, release=release)


def renewed(lease: ManagerLease) -> ManagerLease:
    """Make the record of a renewal."""
    out = ManagerLease()
    out.CopyFrom(lease)
    out.beat += 1
    return out


def released(lease: ManagerLease) -> ManagerLease:
    """Make the record of an orderly end: others need not wait."""
    out = renewed(lease)
    out.released = True
    return out


def holds(record: bytes | None, lease: ManagerLease) -> bool:
    """Tell whether the stored record is still this holder's, of this epoch."""
    if record is None:
        return False
    stored = ManagerLease.FromString(record)
    return stored.epoch == lease.epoch and stored.holder == lease.holder and not stored.released


@dataclass(frozen=True, slots=True)
class Trust:
    """How long a holder may call itself primary, in its own monotonic nanoseconds."""

    until_ns: int

    def after_renewal(self, sent_ns: int, lease_ns: int) -> Trust:
        """Extend after a renewal that was sent at `sent_ns` and succeeded."""
        return replace(self, until_ns=max(self.until_ns, sent_ns + lease_ns // 2))

    def valid(self, now_ns: int) -> bool:
        """Tell whether the holder is certainly still the primary."""
        return now_ns < self.until_ns
