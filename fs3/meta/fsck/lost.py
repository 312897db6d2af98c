"""The place for what has lost its own."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import keys, making, model, quotas, tree
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Caller

LOST_FOUND: Final = b"lost+found"


async def adopt(tr: Transaction, ctx: OpContext, record: InodeRecord) -> None:
    """Give an inode without names one in ``/lost+found``, which only root may enter. The caller stores the record."""
    attr = record.attr
    directory = await _lost_found(tr, ctx)
    tree.add_entry(tr, directory.attr.inode, lost_name(attr.inode), attr.inode, attr.type)
    tree.touch_directory(tr, directory.attr.inode, ctx.now_ns)
    await quotas.adopt(tr, ctx, record, directory.quota)
    if attr.type == model.DIRECTORY:
        attr.parent = directory.attr.inode
    else:
        attr.nlink = 1


def lost_name(ino: int) -> bytes:
    """The name of an inode in ``/lost+found``."""
    return f"inode-{ino:x}".encode()


async def _lost_found(tr: Transaction, ctx: OpContext) -> InodeRecord:
    value = await tr.get(keys.dirent(keys.ROOT_INODE, LOST_FOUND))
    if value is not None:
        record = await tree.load(tr, model.decode_dirent(value)[0])
        if record is None or record.attr.type != model.DIRECTORY:
            raise error(Code.CODE_NOT_DIRECTORY, "/lost+found is not a directory: rename it and repair again")
        return record
    root = await tree.load(tr, keys.ROOT_INODE)
    assert root is not None
    return await making.new_inode(
        tr, ctx, root, LOST_FOUND, Caller(uid=0, gid=0), file_type=model.DIRECTORY, mode=0o700, layout=root.attr.layout
    )
