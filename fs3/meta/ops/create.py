"""Create a file, fifo, socket or device, and open it: O_CREAT in one transaction."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import making, model, quotas, tree, walk
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import CreateRequest, FileType, OpenResponse

_SPECIAL: Final = frozenset(
    {
        FileType.FILE_TYPE_FIFO,
        FileType.FILE_TYPE_SOCKET,
        FileType.FILE_TYPE_CHAR_DEVICE,
        FileType.FILE_TYPE_BLOCK_DEVICE,
    }
)
_DEVICES: Final = frozenset({FileType.FILE_TYPE_CHAR_DEVICE, FileType.FILE_TYPE_BLOCK_DEVICE})


async def run(tr: Transaction, request: CreateRequest, ctx: OpContext) -> OpenResponse:
    """Make what is not there; an existing file is opened unless `exclusive`.

    Raises EXISTS, IS_DIRECTORY, ACCESS, SYMLINK_LOOP, NOT_PERMITTED (devices), UNAVAILABLE (no chains yet),
    QUOTA_EXCEEDED.
    """
    caller = request.caller
    file_type = request.type or model.FILE
    if file_type != model.FILE and file_type not in _SPECIAL:
        raise error(Code.CODE_INVALID_ARGUMENT, "create makes files, fifos, sockets and devices")
    if request.unnamed:
        return await _unnamed(tr, request, ctx)
    found = await walk.walk(tr, request.at, caller, follow=request.at.follow, entry=request.exclusive)
    if found.parent is None:
        raise making.exists(found.name) if request.exclusive else making.is_directory(found.existing())
    if found.child is not None:
        if request.exclusive or file_type != model.FILE:
            raise making.exists(found.name)
        if found.child.attr.type == model.DIRECTORY:
            raise making.is_directory(found.child)
        return await making.open_existing(
            tr,
            ctx,
            found.child,
            caller,
            client_id=request.op.client_id,
            read=request.open_read,
            write=request.open_write,
            truncate=request.truncate,
        )
    if found.as_directory:
        raise error(Code.CODE_IS_DIRECTORY, "a name with a slash behind it is not a file")
    if file_type in _DEVICES and caller.uid != 0:
        raise error(Code.CODE_NOT_PERMITTED, "only root makes device nodes")
    layout = None
    if file_type == model.FILE:
        requested = request.layout if request.HasField("layout") else None
        layout = ctx.placement.file_layout(requested, found.parent.attr.layout)
    record = await making.new_inode(
        tr,
        ctx,
        found.parent,
        found.name,
        caller,
        file_type=file_type,
        mode=request.mode,
        umask=request.umask,
        layout=layout,
        rdev=request.rdev,
    )
    return await _opened(tr, request, ctx, record)


async def _unnamed(tr: Transaction, request: CreateRequest, ctx: OpContext) -> OpenResponse:
    """A file that only its session keeps."""
    if not request.open_write or (request.type or model.FILE) != model.FILE:
        raise error(Code.CODE_INVALID_ARGUMENT, "what has no name is a file that is open for writing")
    parent = await walk.target(tr, request.at, request.caller)
    if parent.attr.type != model.DIRECTORY:
        raise walk.not_directory(parent)
    walk.enter(parent, request.caller)
    if parent.detached:
        raise walk.missing(b"")
    requested = request.layout if request.HasField("layout") else None
    record = await making.new_inode(
        tr,
        ctx,
        parent,
        None,
        request.caller,
        file_type=model.FILE,
        mode=request.mode,
        umask=request.umask,
        layout=ctx.placement.file_layout(requested, parent.attr.layout),
    )
    record.linkable = not request.exclusive
    tree.store(tr, record)
    return await _opened(tr, request, ctx, record)


async def _opened(tr: Transaction, request: CreateRequest, ctx: OpContext, record: InodeRecord) -> OpenResponse:
    response = OpenResponse(attr=record.attr, created=True)
    if request.open_write and record.attr.type == model.FILE:
        response.session = tree.open_session(tr, ctx, record.attr.inode, request.op.client_id)
        if (limit := await quotas.length_limit(tr, record)) is not None:
            response.length_limit = limit
    return response
