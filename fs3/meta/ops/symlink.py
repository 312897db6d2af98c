"""Make a symbolic link."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import making, model, walk
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, SymlinkRequest


async def run(tr: Transaction, request: SymlinkRequest, ctx: OpContext) -> AttrResponse:
    """The target is stored as it is, 1 to 4095 bytes. Raises EXISTS, NAME_TOO_LONG, ACCESS."""
    target = request.target
    if not target:
        raise error(Code.CODE_NOT_FOUND, "the target of a symbolic link is not empty")
    if len(target) >= model.PATH_BYTES_MAX:
        raise error(Code.CODE_NAME_TOO_LONG, f"the target of a symbolic link is below {model.PATH_BYTES_MAX} bytes")
    if b"\0" in target:
        raise error(Code.CODE_INVALID_ARGUMENT, "the target of a symbolic link holds no zero byte")
    found = await walk.walk(tr, request.at, request.caller, follow=False, entry=True)
    if found.parent is None or found.child is not None:
        raise making.exists(found.name)
    if found.as_directory:
        raise walk.missing(found.name)
    record = await making.new_inode(
        tr,
        ctx,
        found.parent,
        found.name,
        request.caller,
        file_type=model.SYMLINK,
        mode=0o777,
        symlink_target=target,
    )
    return AttrResponse(attr=record.attr)
