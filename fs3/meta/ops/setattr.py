"""Change mode, owner, times, and of directories the layout that new files get and the trash."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import access, model, trash, tree, walk, xattrs
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, Caller, Layout, SetattrRequest


async def run(tr: Transaction, request: SetattrRequest, ctx: OpContext) -> AttrResponse:
    """All of it or nothing.

    Raises NOT_PERMITTED (not the owner), ACCESS (times "now" without write permission), NOT_DIRECTORY and
    INVALID_ARGUMENT (layout).
    """
    record = await walk.target(tr, request.at, request.caller)
    attr = await tree.complete(tr, record)
    caller = request.caller
    explicit = request.HasField("atime_ns") or request.HasField("mtime_ns")
    now = request.atime_now or request.mtime_now
    if explicit:
        access.require_owner(attr, caller)
    elif now and caller.uid != attr.uid:
        access.require(attr, caller, access.WRITE)
    owner = request.HasField("uid") or request.HasField("gid")
    if owner:
        _change_owner(record, request, caller)
    if request.HasField("mode"):
        _change_mode(record, request.mode, caller)
    layout = request.HasField("chunk_bytes") or request.HasField("stripe")
    if layout:
        _change_layout(record, request, ctx)
    trashes = request.HasField("trash_ms")
    if trashes:
        await _change_trash(tr, ctx, record, request)
    if not (explicit or now or owner or layout or trashes or request.HasField("mode")):
        return AttrResponse(attr=attr)
    if explicit or now:
        _change_times(record, request, ctx.now_ns)
    tree.store_changed(tr, record, ctx.now_ns)
    return AttrResponse(attr=attr)


def _change_owner(record: InodeRecord, request: SetattrRequest, caller: Caller) -> None:
    """Only root gives files away; the owner may choose among the own groups. Set-id bits and capabilities go."""
    attr = record.attr
    uid = request.uid if request.HasField("uid") else attr.uid
    gid = request.gid if request.HasField("gid") else attr.gid
    if caller.uid != 0:
        access.require_owner(attr, caller)
        if uid != attr.uid:
            raise error(Code.CODE_NOT_PERMITTED, "only root gives a file to another owner")
        if gid != attr.gid and not access.in_group(caller, gid):
            raise error(Code.CODE_NOT_PERMITTED, f"the caller does not belong to group {gid}")
    attr.uid = uid
    attr.gid = gid
    if attr.type != model.DIRECTORY:
        attr.mode = access.without_set_id(attr.mode)
        xattrs.drop_capability(record)


def _change_mode(record: InodeRecord, mode: int, caller: Caller) -> None:
    attr = record.attr
    access.require_owner(attr, caller)
    mode &= model.MODE_BITS
    if caller.uid != 0 and not access.in_group(caller, attr.gid):
        mode &= ~model.SET_GID
    attr.mode = mode
    xattrs.chmod_acl(record)


def _change_layout(record: InodeRecord, request: SetattrRequest, ctx: OpContext) -> None:
    attr = record.attr
    if attr.type != model.DIRECTORY:
        raise walk.not_directory(record)
    access.require_owner(attr, request.caller)
    layout = Layout()
    layout.CopyFrom(attr.layout)
    if request.HasField("chunk_bytes"):
        layout.chunk_bytes = request.chunk_bytes
    if request.HasField("stripe"):
        layout.stripe = request.stripe
    attr.layout.CopyFrom(ctx.placement.directory_layout(layout, attr.layout))


async def _change_trash(tr: Transaction, ctx: OpContext, record: InodeRecord, request: SetattrRequest) -> None:
    attr = record.attr
    if attr.type != model.DIRECTORY:
        raise walk.not_directory(record)
    access.require_owner(attr, request.caller)
    if request.trash_ms > trash.KEEP_MS_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, "the trash keeps things for at most a hundred years")
    if request.trash_ms:
        await trash.ensure(tr, ctx)
    attr.trash_ms = request.trash_ms


def _change_times(record: InodeRecord, request: SetattrRequest, now_ns: int) -> None:
    attr = record.attr
    if request.atime_now:
        attr.atime_ns = now_ns
    elif request.HasField("atime_ns"):
        attr.atime_ns = request.atime_ns
    if request.mtime_now:
        attr.mtime_ns = now_ns
    elif request.HasField("mtime_ns"):
        attr.mtime_ns = request.mtime_ns
