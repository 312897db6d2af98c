"""Audits of a metadata engine in memory, and damage to its store."""

from __future__ import annotations

from typing import Any

from fs3.kv import retry
from fs3.kv.api import Transaction
from fs3.meta import keys, model
from fs3.meta.fsck.audit import Options
from fs3.meta.fsck.jobs import run_audit
from fs3.meta.fsck.report import Report
from fs3.v1.disk_meta_pb2 import InodeRecord
from meta.harness import Meta


async def fsck(meta: Meta, **options: Any) -> Report:
    """Audit without pauses."""
    report = Report()
    await run_audit(meta.engine, meta.chunks, Options(**{"look_pause_s": 0.0, **options}), report)
    return report


async def kinds(meta: Meta, **options: Any) -> list[str]:
    """What kinds of findings there are; nothing may be unsettled."""
    report = await fsck(meta, **options)
    assert report.unsettled == 0
    return sorted(finding.kind for finding in report.findings)


async def change(meta: Meta, *, sets: dict[bytes, bytes] | None = None, clears: tuple[bytes, ...] = ()) -> None:
    """Write into the store past every operation."""

    async def write(tr: Transaction) -> None:
        for key, value in (sets or {}).items():
            tr.set(key, value)
        for key in clears:
            tr.clear(key)

    await retry.run(meta.store, write)


async def value(meta: Meta, key: bytes) -> bytes | None:
    tr = meta.store.transaction()
    try:
        return await tr.get(key)
    finally:
        tr.cancel()


async def record(meta: Meta, ino: int) -> InodeRecord:
    found = await value(meta, keys.inode(ino))
    assert found is not None
    return model.decode_inode(found)


async def store(meta: Meta, changed: InodeRecord) -> None:
    await change(meta, sets={keys.inode(changed.attr.inode): changed.SerializeToString()})
