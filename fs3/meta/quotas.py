"""Quotas of directories: what counts an inode, how much is counted, and what happens to both when things move.

An inode is stamped with the id of the quota of the nearest directory above that has one. It is counted, as one inode
and its length in bytes, in that quota and in those outside it. Counters are sharded atomic adds, so that operations of
several servers in one tree do not conflict; limits are checked against a snapshot of their sums, which operations at
the same time may pass together.

What is made takes its stamp from its directory, whose record it reads; what is moved is stamped anew. When a directory
gets a quota, or loses it, its own stamp changes at once, those below one after the other (see `fs3.meta.quota_walk`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from fs3.core.errors import Fs3Error, error
from fs3.kv.api import Transaction
from fs3.meta import keys, model, paths
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord, QuotaRecord, QuotaWalk
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import QuotaState

COUNTING: Final = QuotaState.QUOTA_STATE_COUNTING
ACTIVE: Final = QuotaState.QUOTA_STATE_ACTIVE
CLEARING: Final = QuotaState.QUOTA_STATE_CLEARING

# Quotas that count one inode, and those with what is left of removed ones.
DEPTH_MAX: Final = 16
CHAIN_MAX: Final = 64
# What one writer may add to a file before it reports again: a part of the room that is left, so that all of those who
# write at the same time exceed it by little, but not so little that the last bytes take many reports.
GRANT_DIVISOR: Final = 4
GRANT_BYTES_MIN: Final = 4 << 20
GRANT_BYTES_MAX: Final = 256 << 20


class Usage(NamedTuple):
    """What a quota counts."""

    inodes: int
    bytes: int

    def plus(self, other: Usage, times: int = 1) -> Usage:
        """The sum with `times` the other."""
        return Usage(self.inodes + times * other.inodes, self.bytes + times * other.bytes)


NOTHING: Final = Usage(0, 0)


class Room(NamedTuple):
    """A limit, and how much of it is left."""

    limit: int
    left: int


def of(record: InodeRecord) -> Usage:
    """What an inode counts as. Pure."""
    return Usage(1, record.attr.length)


async def load(tr: Transaction, quota: int) -> QuotaRecord | None:
    """The record of a quota, None when there is none."""
    value = await tr.get(keys.quota(quota)) if quota else None
    return None if value is None else model.decode_quota(value)


def store(tr: Transaction, record: QuotaRecord) -> None:
    """Write the record of a quota."""
    tr.set(keys.quota(record.id), record.SerializeToString())


async def chain(tr: Transaction, quota: int) -> list[QuotaRecord]:
    """The quotas that count an inode with this stamp, the innermost first."""
    found: list[QuotaRecord] = []
    while len(found) < CHAIN_MAX and (record := await load(tr, quota)) is not None:
        found.append(record)
        quota = record.outer
    return found


async def own(tr: Transaction, directory: InodeRecord) -> QuotaRecord | None:
    """The quota of this directory itself."""
    record = await load(tr, directory.quota)
    return record if record is not None and record.directory == directory.attr.inode else None


async def has_ended(tr: Transaction, quota: int) -> bool:
    """Whether a stamp is of a quota that was removed: it is to be replaced wherever it is met."""
    record = await load(tr, quota)
    return quota != 0 and (record is None or record.state == CLEARING)


def total(rows: Iterable[tuple[bytes, bytes]]) -> Usage:
    """The sum of counters. Pure."""
    sums = [0, 0]
    for key, value in rows:
        sums[keys.quota_counter_kind(key)] += model.decode_count(value)
    return Usage(*sums)


async def usage(tr: Transaction, quota: int) -> Usage:
    """What is counted in a quota; conflicts with nobody."""
    return total(await tr.get_range(*keys.quota_counters(quota), snapshot=True))


def _add(tr: Transaction, ctx: OpContext, record: QuotaRecord, amount: Usage, times: int = 1) -> None:
    for kind, count in enumerate(amount):
        if count:
            tr.add(keys.quota_counter(record.id, record.epoch, kind, ctx.counter_shard), times * count)


async def charge(tr: Transaction, ctx: OpContext, quota: int, amount: Usage, *, within: bool = True) -> None:
    """Count more, or less, under a stamp. With `within` raises QUOTA_EXCEEDED when a limit would be passed."""
    if not quota or amount == NOTHING:
        return
    for record in await chain(tr, quota):
        if within:
            await _require_room(tr, record, amount)
        _add(tr, ctx, record, amount)


async def require_room(tr: Transaction, quota: int, amount: Usage) -> None:
    """Raises QUOTA_EXCEEDED when counting so much more under a stamp would pass a limit. Counts nothing."""
    for record in await chain(tr, quota) if quota else ():
        await _require_room(tr, record, amount)


async def _require_room(tr: Transaction, record: QuotaRecord, amount: Usage) -> None:
    for room, more in zip(await _rooms(tr, record), amount, strict=True):
        if room is not None and more > max(0, room.left):
            raise await _exceeded(tr, record)


async def _exceeded(tr: Transaction, record: QuotaRecord) -> Fs3Error:
    where = await paths.directory_path(tr, record.directory)
    return error(Code.CODE_QUOTA_EXCEEDED, f"the quota of {where} has no room left; remove files or raise it")


async def _rooms(tr: Transaction, record: QuotaRecord) -> tuple[Room | None, Room | None]:
    """Room for inodes and for bytes, as far as this quota limits them."""
    limits = (
        record.inodes_max if record.HasField("inodes_max") else None,
        record.bytes_max if record.HasField("bytes_max") else None,
    )
    if record.state != ACTIVE or limits == (None, None):
        return None, None
    used = await usage(tr, record.id)
    inodes, length = [
        None if limit is None else Room(limit, limit - count) for limit, count in zip(limits, used, strict=True)
    ]
    return inodes, length


async def rooms(tr: Transaction, quota: int) -> tuple[Room | None, Room | None]:
    """The smallest room for inodes and for bytes under a stamp; None without a limit."""
    found = [await _rooms(tr, record) for record in await chain(tr, quota)]
    return _tightest(inodes for inodes, _ in found), _tightest(length for _, length in found)


def _tightest(found: Iterable[Room | None]) -> Room | None:
    return min((room for room in found if room is not None), key=lambda room: room.left, default=None)


async def length_limit(tr: Transaction, record: InodeRecord, wanted: int = 0) -> int | None:
    """How long the file may become before its writer has to report again; None without a limit.

    A writer that wants to come to `wanted` bytes may, if there is room.
    """
    if not record.quota:
        return None
    _, room = await rooms(tr, record.quota)
    if room is None:
        return None
    length = record.attr.length
    grant = max(GRANT_BYTES_MIN, min(room.left // GRANT_DIVISOR, GRANT_BYTES_MAX), wanted - length)
    return length + max(0, min(room.left, grant))


async def _shift(tr: Transaction, ctx: OpContext, amount: Usage, old: int, new: int, *, within: bool = False) -> None:
    """Count under the stamp `new` what is counted under `old`. What both count stays as it is."""
    before, after = await chain(tr, old), await chain(tr, new)
    kept = {record.id for record in before} & {record.id for record in after}
    for record in after:
        if record.id not in kept:
            if within:
                await _require_room(tr, record, amount)
            _add(tr, ctx, record, amount)
    for record in before:
        if record.id not in kept:
            _add(tr, ctx, record, amount, -1)


async def adopt(tr: Transaction, ctx: OpContext, child: InodeRecord, quota: int, *, within: bool = False) -> bool:
    """Let a child be counted as its directory with the stamp `quota` is; returns whether its record changed.

    The caller stores the record. What is below a directory follows in the background.
    """
    if child.quota == quota:
        return False
    inner = await own(tr, child)
    if inner is not None:
        _hang(tr, inner, quota)
        return False
    old = child.quota
    await _shift(tr, ctx, of(child), old, quota, within=within)
    child.quota = quota
    if child.attr.type == model.DIRECTORY:
        for job in {old, quota} - {0}:
            walk_later(tr, job, child.attr.inode)
    return True


def _hang(tr: Transaction, record: QuotaRecord, outer: int) -> None:
    """Another quota is the next outer one. Its counters follow in :func:`carry`.

    Their sum cannot be read here: others add to it all the time.
    """
    if record.outer == outer:
        return
    record.carries.add(epoch=record.epoch, outer=record.outer)
    record.epoch += 1
    record.outer = outer
    store(tr, record)
    settle_later(tr, record.id)


async def carry(tr: Transaction, ctx: OpContext, record: QuotaRecord) -> None:
    """Count in the outer quotas of now what earlier epochs counted in those of then."""
    for past in record.carries:
        span = keys.quota_epoch(record.id, past.epoch)
        amount = total(await tr.get_range(*span))
        await _shift(tr, ctx, amount, past.outer, record.outer)
        tr.clear_range(*span)
        _add(tr, ctx, record, amount)
    del record.carries[:]
    store(tr, record)


async def leave(tr: Transaction, ctx: OpContext, record: InodeRecord) -> None:
    """The inode goes: it is counted no more, and a quota of its own ends. The caller stores or erases the record."""
    if not record.quota:
        return
    ended = await own(tr, record)
    if ended is not None:
        end(tr, ended)
    await charge(tr, ctx, record.quota, NOTHING.plus(of(record), -1), within=False)
    record.quota = 0


async def begin(tr: Transaction, ctx: OpContext, directory: InodeRecord) -> QuotaRecord:
    """Give a directory a quota, without limits at first; the caller stores both records.

    Raises INVALID_ARGUMENT when DEPTH_MAX quotas count the directory already.
    """
    if len(await chain(tr, directory.quota)) >= DEPTH_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"at most {DEPTH_MAX} quotas are inside each other")
    ino = directory.attr.inode
    record = QuotaRecord(
        format=model.FORMAT,
        id=await ctx.new_inode(ino),
        directory=ino,
        outer=directory.quota,
        state=COUNTING,
    )
    store(tr, record)
    await adopt(tr, ctx, directory, record.id)
    settle_later(tr, record.id)
    return record


def end(tr: Transaction, record: QuotaRecord) -> None:
    """A quota belongs to no directory any more; its record stays until nothing is counted under it."""
    record.state = CLEARING
    record.directory = 0
    store(tr, record)
    settle_later(tr, record.id)


async def clear(tr: Transaction, ctx: OpContext, directory: InodeRecord, record: QuotaRecord) -> None:
    """Remove the quota of a directory; the caller stores the directory's record."""
    end(tr, record)
    await adopt(tr, ctx, directory, record.outer)


def walk_later(tr: Transaction, job: int, directory: int) -> None:
    """The stamps in a directory are to be looked at, from the first name on, before the quota `job` is settled."""
    tr.set(keys.quota_walk(job, directory), QuotaWalk(format=model.FORMAT).SerializeToString())


def settle_later(tr: Transaction, quota: int) -> None:
    """The state of a quota changes once all that belongs to it is done."""
    walk_later(tr, quota, keys.NO_INODE)


def correct(tr: Transaction, ctx: OpContext, record: QuotaRecord, amount: Usage) -> None:
    """Change what one quota counts, for an audit that found it wrong."""
    _add(tr, ctx, record, amount)


async def is_unused(tr: Transaction, record: QuotaRecord) -> bool:
    """Whether nothing is counted in a quota."""
    return total(await tr.get_range(*keys.quota_counters(record.id))) == NOTHING


def erase(tr: Transaction, record: QuotaRecord) -> None:
    """Forget a quota that counts nothing."""
    tr.clear(keys.quota(record.id))
    tr.clear_range(*keys.quota_counters(record.id))
