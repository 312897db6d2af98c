"""What a writer reports on close and sync: length and times."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import access, keys, making, model, quotas, tree
from fs3.meta.context import LengthUnknown, OpContext, TruncationPending
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Attr, Caller, ContentVersion, WriteReport


def version_of(attr: Attr) -> ContentVersion:
    """The content of a file as caches know it; every adopted report of a write makes it another."""
    return ContentVersion(
        length=attr.length,
        mtime_ns=attr.mtime_ns,
        ctime_ns=attr.ctime_ns,
        truncate_version=attr.truncate_version,
    )


async def check_writer(
    tr: Transaction, record: InodeRecord, session: bytes, report: WriteReport, caller: Caller, *, writes: bool = False
) -> bool:
    """Whether the session exists. A report without one needs the permission bits, as for a write when `writes`.

    Raises STALE_HANDLE when a report comes for a session that was reaped and the bits do not grant it either.
    """
    attr = record.attr
    exists = bool(session) and await tr.get(keys.session(attr.inode, tree.check_session(session))) is not None
    writes = writes or report.wrote
    if not exists and (writes or report.atime_ns):
        want = access.WRITE if writes else access.READ
        if not access.allowed(attr, caller, want) and caller.uid != attr.uid:
            raise error(Code.CODE_STALE_HANDLE, f"inode {attr.inode:#x} has no such session; open the file again")
    return exists


async def apply(tr: Transaction, record: InodeRecord, report: WriteReport, caller: Caller, ctx: OpContext) -> bool:
    """Adopt a report into the record; returns whether it changed.

    The length only grows. After a truncation that the writer did not know of, its figure means nothing and what
    storage holds decides: raises LengthUnknown until that was measured. Raises TruncationPending.
    """
    attr = record.attr
    if report.wrote:
        if attr.type != model.FILE:
            raise error(Code.CODE_INVALID_ARGUMENT, "a write report for what is not a file")
        if record.truncating:
            raise TruncationPending(attr.inode)
        length = report.length
        if max(length, report.attempted_length) > model.FILE_BYTES_MAX:
            raise error(Code.CODE_FILE_TOO_LARGE, f"a file has at most {model.FILE_BYTES_MAX} bytes")
        if report.truncate_version != attr.truncate_version:
            version = attr.truncate_version
            measured = ctx.measured.get((attr.inode, version))
            if measured is None:
                raise LengthUnknown(attr.inode, attr.layout, version)
            length = measured
            record.loose = True
        await grow(tr, ctx, record, length)
        record.extent_bytes = max(record.extent_bytes, length, report.attempted_length)
        making.content_changed(record, caller, ctx.now_ns, report.mtime_ns)
    if report.atime_ns:
        attr.atime_ns = report.atime_ns
    return report.wrote or report.atime_ns != 0


async def grow(tr: Transaction, ctx: OpContext, record: InodeRecord, length: int) -> None:
    """The file is at least `length` bytes long: it was written up to there. So no quota refuses it any more."""
    attr = record.attr
    if length > attr.length:
        await quotas.charge(tr, ctx, record.quota, quotas.Usage(0, length - attr.length), within=False)
        attr.length = length
