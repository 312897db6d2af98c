"""The manager's lease: decisions on the record."""

from __future__ import annotations

from fs3.mgmtd import lease

T = 1000


def test_a_free_lease_is_taken_and_the_epoch_rises() -> None:
    seen = lease.observe(None, None, 5)
    assert lease.may_take(seen, 5, T)
    first = lease.taken(None, b"a", "h:1")
    second = lease.taken(first.SerializeToString(), b"b", "h:2")
    assert (first.epoch, second.epoch) == (1, 2)


def test_a_record_that_changes_is_never_taken_and_an_unchanged_one_only_after_the_full_lease() -> None:
    held = lease.taken(None, b"a", "h:1")
    seen = lease.observe(None, held.SerializeToString(), 0)
    for now in range(0, 10 * T, T // 2):
        held = lease.renewed(held)
        seen = lease.observe(seen, held.SerializeToString(), now)
        assert not lease.may_take(seen, now + T - 1, T)
    assert lease.may_take(seen, now + T, T)


def test_looking_again_at_the_same_record_does_not_renew_it() -> None:
    record = lease.taken(None, b"a", "h:1").SerializeToString()
    seen = lease.observe(None, record, 0)
    seen = lease.observe(seen, record, T - 1)
    assert lease.may_take(seen, T, T)


def test_a_released_lease_is_free_at_once() -> None:
    record = lease.released(lease.taken(None, b"a", "h:1")).SerializeToString()
    assert lease.may_take(lease.observe(None, record, 0), 0, T)


def test_a_holder_of_an_older_epoch_does_not_hold() -> None:
    old = lease.taken(None, b"a", "h:1")
    record = old.SerializeToString()
    assert lease.holds(record, old)
    assert lease.holds(lease.renewed(old).SerializeToString(), old)
    new = lease.taken(record, b"a", "h:1")
    assert not lease.holds(new.SerializeToString(), old)
    assert not lease.holds(None, old)
    assert not lease.holds(lease.released(old).SerializeToString(), old)


def test_a_holder_stops_trusting_itself_before_anybody_may_take_over() -> None:
    sent, seen_at = 100, 101
    trust = lease.Trust(0).after_renewal(sent, T)
    record = lease.renewed(lease.taken(None, b"a", "h:1")).SerializeToString()
    seen = lease.observe(None, record, seen_at)
    first_takeover = next(now for now in range(seen_at, 10 * T) if lease.may_take(seen, now, T))
    assert trust.valid(sent + T // 2 - 1)
    assert not trust.valid(first_takeover)


def test_a_manager_of_an_older_release_never_follows_a_newer_one() -> None:
    newer = lease.taken(None, b"a", "h:1", release=3)
    for record in (newer, lease.renewed(newer), lease.released(newer)):
        raw = record.SerializeToString()
        assert lease.outdated(raw, 2)
        assert not lease.outdated(raw, 3)
        assert not lease.outdated(raw, 4)
    assert not lease.outdated(None, 1)
    without = lease.taken(None, b"a", "h:1", release=0).SerializeToString()
    assert not lease.outdated(without, lease.RELEASE)
