"""Directories that are namespaces of the KV cache, as far as their entries are chunks."""

from __future__ import annotations

from fs3.core import kv_namespaces
from fs3.kv.api import Transaction
from fs3.meta import tree, xattrs
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.meta_pb2 import Layout


async def layout(tr: Transaction, record: InodeRecord) -> Layout | None:
    """The chains that hold entries of a directory; None when it is no namespace, or has none on disks."""
    value = await xattrs.load(tr, record, kv_namespaces.ATTRIBUTE)
    return None if value is None else kv_namespaces.durable_layout(value)


async def erase_directory(tr: Transaction, ctx: OpContext, record: InodeRecord) -> None:
    """Remove an empty directory that has lost its name: now, or through the queue when it has entries on disks."""
    if await layout(tr, record) is not None:
        await tree.detach(tr, ctx, record)
    else:
        await tree.erase(tr, ctx, record)
