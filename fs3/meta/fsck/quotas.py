"""Quotas: each belongs to a directory, what is in a directory has its stamp, and counters agree with the stamps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from fs3.kv.api import Transaction
from fs3.meta import keys, model, quotas, tree
from fs3.meta.context import OpContext
from fs3.meta.fsck.audit import LOOKS, SUSPECTS_MAX, Audit, Look, Unsettled
from fs3.meta.fsck.report import Finding
from fs3.meta.ops.list import attributes
from fs3.meta.paths import directory_path, path_of
from fs3.meta.quotas import NOTHING, Usage
from fs3.meta.scan import Rows
from fs3.v1.disk_meta_pb2 import InodeRecord, QuotaRecord

# Inode keys that are summed up in one transaction.
COUNT_ROWS: Final = 4096


async def check_quotas(audit: Audit) -> None:
    """Look at everything that has to do with quotas. Without any there is nothing that could be wrong."""
    audit.report.begin("quotas")
    suspects: list[Look] = []
    there = False
    async for wrong in audit.pages(keys.table(keys.QUOTA), _quota_page):
        there = True
        suspects += wrong
    await audit.confirm(suspects)
    if not there:
        return
    await _check_stamps(audit)
    await _check_counters(audit)


async def _quota_page(tr: Transaction, rows: Rows) -> list[Look]:
    looks = [quota_look(model.decode_quota(value).id) for _, value in rows]
    return [look for look in looks if await look(tr, None) is not None]


def quota_look(quota: int) -> Look:
    """A look at the directory of a quota."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        record = await quotas.load(tr, quota)
        if record is None or not record.directory:
            return None
        directory = await tree.load(tr, record.directory)
        if directory is not None and directory.quota == quota:
            return None
        if ctx is not None:
            quotas.end(tr, record)
        problem = "is gone" if directory is None else "is counted in another one"
        problem = f"its directory {problem}"
        return Finding("stray-quota", record.directory, f"quota {quota:#x}", problem, "remove the quota")

    return look


async def _check_stamps(audit: Audit) -> None:
    audit.report.begin("quota stamps")
    suspects: list[Look] = []
    async for wrong in audit.pages(keys.table(keys.DIRENT), _stamp_page):
        suspects += wrong
        if len(suspects) >= SUSPECTS_MAX:
            await audit.confirm(suspects)
    await audit.confirm(suspects)


async def _stamp_page(tr: Transaction, rows: Rows) -> list[Look]:
    entries = [(keys.inode_of(key), keys.dirent_name(key), model.decode_dirent(value)[0]) for key, value in rows]
    records = await attributes(tr, [ino for parent, _, child in entries for ino in (parent, child)])
    looks = []
    for parent, name, child in entries:
        directory, record = records.get(parent), records.get(child)
        if directory is not None and record is not None and await _is_misstamped(tr, directory, record):
            looks.append(stamp_look(parent, name))
    return looks


async def _is_misstamped(tr: Transaction, directory: InodeRecord, record: InodeRecord) -> bool:
    """Whether what is in a directory is counted elsewhere, and nobody is about to change that.

    What is in the trash is counted where it was removed. A file that has, or had, several names may have got them
    before the quotas: it is counted under one of its directories.
    """
    if record.quota == directory.quota or directory.detached or directory.attr.inode == keys.TRASH_INODE:
        return False
    if record.attr.type != model.DIRECTORY and (record.attr.nlink > 1 or record.lost_names):
        return False
    inner = await quotas.own(tr, record)
    if inner is not None and inner.outer == directory.quota:
        return False
    stamps = {record.quota if inner is None else inner.outer, directory.quota}
    return not any([await tr.get(keys.quota_walk(job, directory.attr.inode)) for job in stamps - {0}])


def stamp_look(parent: int, name: bytes) -> Look:
    """A look at what one entry names."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        value = await tr.get(keys.dirent(parent, name))
        directory = await tree.load(tr, parent)
        record = None if value is None else await tree.load(tr, model.decode_dirent(value)[0])
        if directory is None or record is None or not await _is_misstamped(tr, directory, record):
            return None
        if ctx is not None and await quotas.adopt(tr, ctx, record, directory.quota):
            tree.store(tr, record)
        problem = "is counted under another quota than its directory"
        where = await path_of(tr, parent, name)
        return Finding("quota-stamp", record.attr.inode, where, problem, "count it there, and what is below it")

    return look


async def _check_counters(audit: Audit) -> None:
    """As much exists as is counted. What a quota counts is judged by passes during which it did not change."""
    audit.report.begin("quota counters")
    seen: dict[int, set[tuple[Usage, Usage] | None]] = {}
    right: set[int] = set()
    for turn in range(LOOKS):
        if turn:
            await audit.pause()
        for quota, pair in (await _sums(audit)).items():
            if pair is not None and pair[0] == pair[1]:
                right.add(quota)
            seen.setdefault(quota, set()).add(pair)
        if seen.keys() <= right:
            return
    for quota in sorted(seen.keys() - right):
        pair = seen[quota].pop()
        if seen[quota] or pair is None:
            audit.report.unsettled += 1
            continue
        look = counters_look(quota, *pair)
        try:
            finding = await audit.look(look, repair=False)
        except Unsettled:
            audit.report.unsettled += 1
            continue
        if finding is not None:
            await audit.settle(look, finding)


async def _sums(audit: Audit) -> dict[int, tuple[Usage, Usage] | None]:
    """By quota what exists and what is counted; None when that changed meanwhile."""
    before = await audit.read(_quotas)
    found: dict[int, Usage] = {}
    counted: dict[int, set[Usage]] = {quota: set() for quota in before}
    async for stamps, counters in audit.pages(keys.table(keys.INODE), _count_page, limit=COUNT_ROWS):
        for quota, amount in stamps.items():
            found[quota] = found.get(quota, NOTHING).plus(amount)
        for quota, values in counted.items():
            values.add(counters.get(quota, NOTHING))
    if await audit.read(_quotas) != before or any(record.carries for record in before.values()):
        return dict.fromkeys(before)
    sums = dict.fromkeys(before, NOTHING)
    for stamp, amount in found.items():
        for quota in islice(_chain(before, stamp), quotas.CHAIN_MAX):
            sums[quota] = sums[quota].plus(amount)
    return {quota: (sums[quota], values.pop()) if len(values) == 1 else None for quota, values in counted.items()}


def _chain(records: dict[int, QuotaRecord], quota: int) -> Iterator[int]:
    while (record := records.get(quota)) is not None:
        yield quota
        quota = record.outer


async def _quotas(tr: Transaction) -> dict[int, QuotaRecord]:
    rows = await tr.get_range(*keys.table(keys.QUOTA), snapshot=True)
    return {record.id: record for record in (model.decode_quota(value) for _, value in rows)}


async def _count_page(tr: Transaction, rows: Rows) -> tuple[dict[int, Usage], dict[int, Usage]]:
    """(what exists by stamp, what is counted by quota) of a page of inode keys."""
    stamps: dict[int, Usage] = {}
    for key, value in rows:
        if len(key) == keys.INODE_KEY_BYTES and (record := model.decode_inode(value)).quota:
            stamps[record.quota] = stamps.get(record.quota, NOTHING).plus(quotas.of(record))
    counters: dict[int, Usage] = {}
    for row in await tr.get_range(*keys.table(keys.QUOTA_COUNTER), snapshot=True):
        quota = keys.inode_of(row[0])
        counters[quota] = counters.get(quota, NOTHING).plus(quotas.total([row]))
    return stamps, counters


def counters_look(quota: int, found: Usage, counted: Usage) -> Look:
    """Sets what a quota counts if that still is `counted`. Which shard does it does not matter: their sum counts."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        record = await quotas.load(tr, quota)
        now = quotas.total(await tr.get_range(*keys.quota_counters(quota)))
        if record is None or now == found:
            return None
        if now != counted:
            raise Unsettled
        if ctx is not None:
            quotas.correct(tr, ctx, record, found.plus(counted, -1))
        problem = f"counts {counted.inodes} inodes of {counted.bytes} bytes, there are {found.inodes} of {found.bytes}"
        where = f"quota of {await directory_path(tr, record.directory) or hex(quota)}"
        return Finding("quota-counters", record.directory, where, problem, "set the counters")

    return look
