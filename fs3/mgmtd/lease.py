"""Who is the primary manager: decisions on the lease record of the KV. Pure.

Nobody compares wall clocks. An observer watches the record; it is dead when it has not changed for the whole
lease on the observer's own monotonic clock. The holder trusts itself for half the lease from the moment it sent
its last successful renewal, so that it has stopped before anybody can take over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fs3.v1.disk_mgmtd_pb2 import ManagerLease

FORMAT = 1


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


def taken(record: bytes | None, holder: bytes, address: str) -> ManagerLease:
    """Make the record of a takeover: the epoch rises."""
    epoch = ManagerLease.FromString(record).epoch if record is not None else 0
    return ManagerLease(format=FORMAT, epoch=epoch + 1, holder=holder, address=address, beat=1)


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
