"""Access times of files that were read, of many at a time; by the rule of Linux' `relatime`."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import access, model, tree
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AccessedRequest, Attr, Empty

ITEMS_MAX: Final = 1024
DAY_NS: Final = 24 * 3600 * 1_000_000_000


async def run(tr: Transaction, request: AccessedRequest, ctx: OpContext) -> Empty:
    """Set the access times that are due. Files that are gone or may not be read are passed over.

    A repetition changes nothing, so it needs no OpId. Raises INVALID_ARGUMENT over ITEMS_MAX.
    """
    if len(request.inodes) != len(request.atime_ns) or len(request.inodes) > ITEMS_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"one time for each inode, and at most {ITEMS_MAX} of them")
    for inode, atime_ns in zip(request.inodes, request.atime_ns, strict=True):
        record = await tree.load(tr, inode)
        if (
            record is None
            or record.attr.type != model.FILE
            or not access.allowed(record.attr, request.caller, access.READ)
        ):
            continue
        if is_due(record.attr, atime_ns):
            record.attr.atime_ns = atime_ns
            tree.store(tr, record)
    return Empty()


def is_due(attr: Attr, now_ns: int) -> bool:
    """Whether a read at `now_ns` changes the access time: the first after a change, and one a day.

    What was changed later than it was read keeps its time: that may have been set by hand.
    """
    if now_ns <= attr.ctime_ns:
        return False
    return attr.atime_ns <= max(attr.mtime_ns, attr.ctime_ns) or now_ns - attr.atime_ns >= DAY_NS
