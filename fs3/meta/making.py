"""New inodes and opens: what create, open, mkdir and symlink have in common."""

from __future__ import annotations

from fs3.core.errors import Fs3Error, error
from fs3.kv.api import Transaction
from fs3.meta import access, keys, model, quotas, tree, walk, xattrs
from fs3.meta.context import OpContext, TruncationPending
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Attr, Caller, Layout, OpenResponse


def exists(name: bytes) -> Fs3Error:
    """EEXIST."""
    return error(Code.CODE_EXISTS, f"{name.decode(errors='backslashreplace')!r} exists")


def is_directory(record: InodeRecord) -> Fs3Error:
    """EISDIR."""
    return error(Code.CODE_IS_DIRECTORY, f"inode {record.attr.inode:#x} is a directory")


async def new_inode(
    tr: Transaction,
    ctx: OpContext,
    parent: InodeRecord,
    name: bytes | None,
    caller: Caller,
    *,
    file_type: int,
    mode: int,
    umask: int = 0,
    layout: Layout | None = None,
    symlink_target: bytes = b"",
    rdev: int = 0,
) -> InodeRecord:
    """Make an inode and its entry `name` in `parent`, which the caller has checked is free; None: an inode without one.

    A default access control list of `parent` is inherited, and takes the place of `umask`. Raises ACCESS when the
    caller may not write the parent, QUOTA_EXCEEDED.
    """
    if name is not None:
        walk.check_name(name)
    above = parent.attr
    access.require(above, caller, access.WRITE)
    directory = file_type == model.DIRECTORY
    inherits = bool(parent.default_acl) and file_type != model.SYMLINK
    gid, mode = access.inherited(above, caller, mode if inherits else mode & ~umask, directory=directory)
    now_ns = ctx.now_ns
    ino = await ctx.new_inode(above.inode)
    record = InodeRecord(
        format=model.FORMAT,
        attr=Attr(
            inode=ino,
            type=file_type,  # type: ignore[arg-type]
            mode=mode,
            uid=caller.uid,
            gid=gid,
            nlink=0 if name is None else 2 if directory else 1,
            length=len(symlink_target),
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            layout=layout,
            symlink_target=symlink_target,
            rdev=rdev,
            parent=above.inode if directory else 0,
            trash_ms=above.trash_ms if directory else 0,
        ),
        name=name if name is not None and directory else b"",
        quota=parent.quota,
    )
    await quotas.charge(tr, ctx, record.quota, quotas.of(record))
    if inherits:
        xattrs.inherit_acl(record, parent.default_acl)
    tree.store(tr, record)
    if directory:
        tree.touch_directory(tr, ino, now_ns)
    if name is not None:
        tree.add_entry(tr, above.inode, name, ino, file_type)
        tree.touch_directory(tr, above.inode, now_ns)
    tr.add(keys.counter(ctx.counter_shard), 1)
    return record


async def open_existing(
    tr: Transaction,
    ctx: OpContext,
    record: InodeRecord,
    caller: Caller,
    *,
    client_id: bytes,
    read: bool,
    write: bool,
    truncate: bool,
) -> OpenResponse:
    """Open an inode: permission check, truncation, write session. Raises ACCESS, IS_DIRECTORY, SYMLINK_LOOP."""
    attr = record.attr
    if attr.type == model.SYMLINK:
        raise error(Code.CODE_SYMLINK_LOOP, "the last component is a symbolic link and is not to be followed")
    if attr.type == model.DIRECTORY and (write or truncate):
        raise is_directory(record)
    access.require(attr, caller, access.READ * read | access.WRITE * (write or truncate))
    if tree.waits_for_removal(record):
        raise tree.stale(attr.inode)
    if attr.type != model.FILE:
        return OpenResponse(attr=await tree.complete(tr, record))
    if record.truncating and (write or truncate):
        raise TruncationPending(attr.inode)
    if truncate:
        sessions = await tree.has_sessions(tr, attr.inode)
        await tree.set_length(tr, ctx, record, 0, sessions=sessions)
        content_changed(record, caller, ctx.now_ns)
        tree.store(tr, record)
    if not write:
        return OpenResponse(attr=attr)
    session = tree.open_session(tr, ctx, attr.inode, client_id)
    return OpenResponse(attr=attr, session=session, length_limit=await quotas.length_limit(tr, record))


def content_changed(record: InodeRecord, caller: Caller, now_ns: int, mtime_ns: int = 0) -> None:
    """Times; set-id bits do not survive a write by anybody but root, capabilities do not survive any."""
    attr = record.attr
    xattrs.drop_capability(record)
    attr.mtime_ns = mtime_ns or now_ns
    attr.ctime_ns = now_ns
    if caller.uid != 0 and attr.mode & (model.SET_UID | model.SET_GID):
        attr.mode = access.without_set_id(attr.mode)
