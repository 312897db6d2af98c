"""Who may have which lock: ranges of bytes, owners, and the queue of those that wait. Pure.

A client's locks of an inode are one record. Its owners conflict with each other like those of different clients.
Whoever waits has a ticket; a lock goes to the smallest one that it does not conflict with. Tickets make waiting
fair, nothing else depends on them: a waiter that is gone is passed over when its time is up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fs3.core.errors import error
from fs3.meta import model
from fs3.v1.disk_meta_pb2 import LockRecord, LockWaiter
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileLock, LockKind, LockType

OFFSET_MAX: Final = (1 << 63) - 1
CLIENT_ID_BYTES: Final = 16
# Locks and waiters of one client for one inode: the record must fit into a value of the key-value store.
LOCKS_MAX: Final = 1000
# How long a place in the queue is kept for one who does not ask again.
QUEUE_NS: Final = 30_000_000_000

UNLOCK: Final = LockType.LOCK_TYPE_UNLOCK
READ: Final = LockType.LOCK_TYPE_READ
WRITE: Final = LockType.LOCK_TYPE_WRITE

_KINDS: Final = (LockKind.LOCK_KIND_POSIX, LockKind.LOCK_KIND_FLOCK)
_TYPES: Final = (UNLOCK, READ, WRITE)


def check(client_id: bytes, lock: FileLock) -> None:
    """Raise INVALID_ARGUMENT for what is no lock of a client."""
    check_client(client_id)
    if lock.kind not in _KINDS or lock.type not in _TYPES:
        raise error(Code.CODE_INVALID_ARGUMENT, "a lock has a kind and a type")
    if not lock.start <= lock.end <= OFFSET_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"a lock covers bytes of 0..2^63-1, not {lock.start}..{lock.end}")


def check_client(client_id: bytes) -> None:
    """Raise INVALID_ARGUMENT for what is no id of a client."""
    if len(client_id) != CLIENT_ID_BYTES:
        raise error(Code.CODE_INVALID_ARGUMENT, f"a client id has {CLIENT_ID_BYTES} bytes, not {len(client_id)}")


def in_the_way(records: Mapping[bytes, LockRecord], client_id: bytes, lock: FileLock) -> tuple[bytes, FileLock] | None:
    """The first lock, with its client, that keeps `lock` from being granted to an owner of the client."""
    for other, record in records.items():
        for held in record.held:
            if _conflict(held, lock) and not (other == client_id and held.owner == lock.owner):
                return other, held
    return None


def must_queue(records: Mapping[bytes, LockRecord], client_id: bytes, lock: FileLock, now_ns: int) -> bool:
    """Whether others wait for what `lock` would take from them, and came before.

    One who holds a lock does not queue for another: those before it may wait for the one that it has.
    """
    mine = records.get(client_id, LockRecord())
    if any(_same_owner(held, lock) for held in mine.held):
        return False
    place = _place(mine, lock)
    ticket = None if place is None else place.ticket
    for other, record in records.items():
        for waiter in record.waiting:
            if waiter.until_ns <= now_ns or not _conflict(waiter.lock, lock):
                continue
            if other == client_id and waiter.lock.owner == lock.owner:
                continue
            if ticket is None or waiter.ticket < ticket:
                return True
    return False


def grant(record: LockRecord, lock: FileLock) -> None:
    """Set or end a lock in the record of its client, instead of what its owner has of the range. Raises NO_SPACE."""
    mine = [held for held in record.held if _same_owner(held, lock)]
    others = [held for held in record.held if not _same_owner(held, lock)]
    kept = [piece for held in mine for piece in _without(held, lock.start, lock.end)]
    if lock.type != UNLOCK:
        kept.append(lock)
    kept.sort(key=lambda held: held.start)
    merged = others + _merged(kept)
    _check_count(len(merged) + len(record.waiting))
    del record.held[:]
    record.held.extend(merged)
    leave(record, lock)


def surrender(record: LockRecord, lock: FileLock) -> bool:
    """End what the owner has, as flock(2) does before it waits for another lock; returns whether it had any."""
    staying = [held for held in record.held if not _same_owner(held, lock)]
    had = len(staying) < len(record.held)
    if had:
        del record.held[:]
        record.held.extend(staying)
    return had


def queue(records: Mapping[bytes, LockRecord], record: LockRecord, lock: FileLock, now_ns: int) -> None:
    """Give the owner a place at the end of the queue, or keep the one it has. Raises NO_SPACE."""
    place = _place(record, lock)
    ticket = 1 + max((waiter.ticket for other in records.values() for waiter in other.waiting), default=0)
    if place is not None and place.until_ns > now_ns:
        ticket = place.ticket
    leave(record, lock)
    _check_count(len(record.held) + len(record.waiting) + 1)
    record.waiting.append(LockWaiter(lock=lock, ticket=ticket, until_ns=now_ns + QUEUE_NS))


def leave(record: LockRecord, lock: FileLock) -> bool:
    """Take the owner's waiters for the range of `lock` from the queue; returns whether there were any."""
    staying = [
        waiter for waiter in record.waiting if not (_same_owner(waiter.lock, lock) and _overlap(waiter.lock, lock))
    ]
    left = len(staying) < len(record.waiting)
    if left:
        del record.waiting[:]
        record.waiting.extend(staying)
    return left


def is_empty(record: LockRecord) -> bool:
    """Whether nothing would be lost with the record."""
    return not record.held and not record.waiting


def new_record() -> LockRecord:
    """The record of a client without locks."""
    return LockRecord(format=model.FORMAT)


def _check_count(count: int) -> None:
    if count > LOCKS_MAX:
        raise error(Code.CODE_NO_SPACE, f"a client has at most {LOCKS_MAX} locks of one file")


def _same_owner(a: FileLock, b: FileLock) -> bool:
    return a.kind == b.kind and a.owner == b.owner


def _overlap(a: FileLock, b: FileLock) -> bool:
    return a.start <= b.end and b.start <= a.end


def _conflict(a: FileLock, b: FileLock) -> bool:
    return a.kind == b.kind and (a.type == WRITE or b.type == WRITE) and _overlap(a, b)


def _place(record: LockRecord, lock: FileLock) -> LockWaiter | None:
    """The owner's waiter for exactly this lock."""
    for waiter in record.waiting:
        if _same_owner(waiter.lock, lock) and (waiter.lock.type, waiter.lock.start, waiter.lock.end) == (
            lock.type,
            lock.start,
            lock.end,
        ):
            return waiter
    return None


def _piece(held: FileLock, start: int, end: int) -> FileLock:
    return FileLock(kind=held.kind, type=held.type, owner=held.owner, start=start, end=end, pid=held.pid)


def _without(held: FileLock, start: int, end: int) -> list[FileLock]:
    """What is left of a lock when bytes `start` to `end` are taken out."""
    if held.end < start or end < held.start:
        return [held]
    before = [_piece(held, held.start, start - 1)] if held.start < start else []
    after = [_piece(held, end + 1, held.end)] if end < held.end else []
    return before + after


def _merged(kept: list[FileLock]) -> list[FileLock]:
    """Neighbours of one type as one lock. `kept` is disjoint, in order, and of one owner."""
    merged: list[FileLock] = []
    for held in kept:
        if merged and merged[-1].type == held.type and merged[-1].end + 1 == held.start:
            merged[-1] = _piece(held, merged[-1].start, held.end)
        else:
            merged.append(held)
    return merged
