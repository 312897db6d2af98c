"""Locks of ranges against a model that keeps a lock for every byte."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs3.core.errors import Fs3Error
from fs3.meta import locks
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileLock, LockKind

A, B = bytes([1]) * 16, bytes([2]) * 16
BYTES = 24

ranges = st.tuples(st.integers(0, BYTES - 1), st.integers(0, BYTES - 1)).map(sorted)
requests = st.builds(
    lambda client, owner, kind, type_, span: (
        client,
        FileLock(kind=kind, type=type_, owner=owner, start=span[0], end=span[1]),
    ),
    st.sampled_from([A, B]),
    st.integers(1, 2),
    st.sampled_from([LockKind.LOCK_KIND_POSIX, LockKind.LOCK_KIND_FLOCK]),
    st.sampled_from([locks.UNLOCK, locks.READ, locks.WRITE]),
    ranges,
)


def lock(start=0, end=locks.OFFSET_MAX, *, type=locks.WRITE, owner=1, kind=LockKind.LOCK_KIND_POSIX):
    return FileLock(kind=kind, type=type, owner=owner, start=start, end=end)


@given(st.lists(requests, max_size=40))
def test_ranges_are_what_a_lock_per_byte_would_be(script) -> None:
    records = {A: locks.new_record(), B: locks.new_record()}
    model = {}
    for client, asked in script:
        mine = (client, asked.kind, asked.owner)
        blocked = any(
            locks.WRITE in (held, asked.type)
            for byte in range(asked.start, asked.end + 1)
            for (other, at), held in model.items()
            if at == byte and other != mine and other[1] == asked.kind
        )
        if asked.type != locks.UNLOCK:
            assert (locks.in_the_way(records, client, asked) is not None) == blocked
            if blocked:
                continue
        locks.grant(records[client], asked)
        for byte in range(asked.start, asked.end + 1):
            model.pop((mine, byte), None)
            if asked.type != locks.UNLOCK:
                model[mine, byte] = asked.type
        kept = {
            ((client, held.kind, held.owner), byte): held.type
            for client, record in records.items()
            for held in record.held
            for byte in range(held.start, held.end + 1)
        }
        assert kept == model
        assert sum(h.end - h.start + 1 for r in records.values() for h in r.held) == len(model), "they are disjoint"


def test_neighbours_become_one_lock() -> None:
    record = locks.new_record()
    for start in (0, 20, 10):
        locks.grant(record, lock(start, start + 9))
    assert [(held.start, held.end) for held in record.held] == [(0, 29)]
    locks.grant(record, lock(10, 19, type=locks.READ))
    assert [(held.start, held.end, held.type) for held in record.held] == [
        (0, 9, locks.WRITE),
        (10, 19, locks.READ),
        (20, 29, locks.WRITE),
    ]


def test_whoever_came_first_goes_first() -> None:
    records = {A: locks.new_record(), B: locks.new_record()}
    locks.queue(records, records[A], lock(owner=5), now_ns=0)
    locks.queue(records, records[B], lock(owner=6), now_ns=0)
    assert not locks.must_queue(records, A, lock(owner=5), now_ns=1)
    assert locks.must_queue(records, B, lock(owner=6), now_ns=1)
    assert locks.must_queue(records, B, lock(owner=7), now_ns=1), "a newcomer is behind both"
    locks.queue(records, records[A], lock(owner=5), now_ns=2)
    assert not locks.must_queue(records, A, lock(owner=5), now_ns=3), "asking again keeps the place"
    locks.grant(records[A], lock(owner=5))
    assert not locks.must_queue(records, B, lock(owner=6), now_ns=3)


def test_readers_share_and_do_not_wait_for_readers() -> None:
    records = {A: locks.new_record(), B: locks.new_record()}
    locks.queue(records, records[A], lock(type=locks.READ), now_ns=0)
    assert not locks.must_queue(records, B, lock(type=locks.READ), now_ns=1)
    assert locks.must_queue(records, B, lock(type=locks.WRITE), now_ns=1)


def test_one_who_is_gone_is_passed_over() -> None:
    records = {A: locks.new_record(), B: locks.new_record()}
    locks.queue(records, records[A], lock(), now_ns=0)
    assert locks.must_queue(records, B, lock(), now_ns=locks.QUEUE_NS - 1)
    assert not locks.must_queue(records, B, lock(), now_ns=locks.QUEUE_NS)


def test_a_holder_does_not_queue_behind_those_who_wait_for_it() -> None:
    records = {A: locks.new_record(), B: locks.new_record()}
    locks.grant(records[A], lock(0, 9, type=locks.READ))
    locks.queue(records, records[B], lock(0, 9), now_ns=0)
    assert not locks.must_queue(records, A, lock(0, 9), now_ns=1)


def test_a_client_has_a_limited_number_of_locks() -> None:
    record = locks.new_record()
    for at in range(locks.LOCKS_MAX):
        locks.grant(record, lock(2 * at, 2 * at))
    with pytest.raises(Fs3Error) as caught:
        locks.grant(record, lock(2 * locks.LOCKS_MAX, 2 * locks.LOCKS_MAX))
    assert caught.value.code == Code.CODE_NO_SPACE
    assert len(record.held) == locks.LOCKS_MAX
    assert record.ByteSize() < 90_000, "it fits into a value"
