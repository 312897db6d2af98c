"""Inode records, directory entries and sessions inside a transaction: the vocabulary of the operations."""

from __future__ import annotations

from fs3.core.errors import Fs3Error, error
from fs3.kv.api import Transaction
from fs3.meta import keys, model, quotas
from fs3.meta.context import Cut, OpContext
from fs3.v1.disk_meta_pb2 import GcRecord, HoldRecord, InodeRecord, KeepaliveRecord, PendingTruncation, SessionRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Attr

SESSION_BYTES = 16


async def load(tr: Transaction, ino: int) -> InodeRecord | None:
    """The record of an inode; of directories without times and nlink (see :func:`complete`)."""
    value = await tr.get(keys.inode(ino))
    return None if value is None else model.decode_inode(value)


async def load_handle(tr: Transaction, ino: int) -> InodeRecord:
    """The record of an inode that the caller names by number. Raises STALE_HANDLE when it is gone."""
    if not 0 < ino < 1 << 64:
        raise error(Code.CODE_INVALID_ARGUMENT, "inode 0 does not exist; the root directory is inode 1")
    record = await load(tr, ino)
    if record is None:
        raise error(Code.CODE_STALE_HANDLE, f"inode {ino:#x} is gone")
    return record


def store(tr: Transaction, record: InodeRecord) -> None:
    """Write the record of an inode."""
    tr.set(keys.inode(record.attr.inode), record.SerializeToString())


def store_changed(tr: Transaction, record: InodeRecord, now_ns: int) -> None:
    """Write the record, completed by :func:`complete`, of an inode whose attributes changed now."""
    attr = record.attr
    attr.ctime_ns = now_ns
    if attr.type == model.DIRECTORY:
        tr.set(keys.directory_times(attr.inode), model.encode_times(attr.mtime_ns, now_ns))
    store(tr, record)


async def complete(tr: Transaction, record: InodeRecord) -> Attr:
    """The attributes as callers see them: directories get their times and link count."""
    attr = record.attr
    if attr.type == model.DIRECTORY:
        times = await tr.get(keys.directory_times(attr.inode))
        subdirs = await tr.get(keys.directory_subdirs(attr.inode))
        fill_directory(record, times, subdirs)
    return attr


def fill_directory(record: InodeRecord, times: bytes | None, subdirs: bytes | None) -> None:
    """Put the values of the directory's own keys into its attributes."""
    attr = record.attr
    if times is not None:
        attr.mtime_ns, attr.ctime_ns = model.decode_times(times)
    attr.nlink = 0 if removed(record) else 2 + model.decode_count(subdirs)


def removed(record: InodeRecord) -> bool:
    """Whether a directory has no name any more: nothing is found or made in it, though it may still hold entries."""
    return record.detached or (record.attr.parent == keys.TRASH_INODE and record.attr.inode != keys.TRASH_INODE)


def touch_directory(tr: Transaction, ino: int, now_ns: int) -> None:
    """An entry of the directory changed. Blind: conflicts with nobody who changes another entry."""
    tr.set(keys.directory_times(ino), model.encode_times(now_ns, now_ns))


async def touch_ctime(tr: Transaction, record: InodeRecord, now_ns: int) -> None:
    """The inode itself changed. For files the caller stores the record."""
    attr = record.attr
    if attr.type == model.DIRECTORY:
        times = await tr.get(keys.directory_times(attr.inode))
        mtime_ns = attr.mtime_ns if times is None else model.decode_times(times)[0]
        tr.set(keys.directory_times(attr.inode), model.encode_times(mtime_ns, now_ns))
    else:
        attr.ctime_ns = now_ns


def add_entry(tr: Transaction, parent: int, name: bytes, ino: int, file_type: int) -> None:
    """Write a directory entry; subdirectories count into the parent's links."""
    tr.set(keys.dirent(parent, name), model.encode_dirent(ino, file_type))
    if file_type == model.DIRECTORY:
        tr.add(keys.directory_subdirs(parent), 1)


def remove_entry(tr: Transaction, parent: int, name: bytes, file_type: int) -> None:
    """Remove a directory entry that exists."""
    tr.clear(keys.dirent(parent, name))
    if file_type == model.DIRECTORY:
        tr.add(keys.directory_subdirs(parent), -1)


async def place(tr: Transaction, ctx: OpContext, record: InodeRecord, parent: int, name: bytes) -> None:
    """An inode moves: add its new entry and write its record. Removing the old entry is the caller's business."""
    attr = record.attr
    add_entry(tr, parent, name, attr.inode, attr.type)
    await touch_ctime(tr, record, ctx.now_ns)
    if attr.type == model.DIRECTORY:
        attr.parent, record.name = parent, name
    store(tr, record)


async def is_empty(tr: Transaction, ino: int) -> bool:
    """Whether a directory has no entries. Conflicts with every later creation in it."""
    return not await tr.get_range(*keys.dirents(ino), limit=1)


async def erase(tr: Transaction, ctx: OpContext, record: InodeRecord) -> None:
    """Remove the record for good; no entry, session or chunk may be left."""
    ino = record.attr.inode
    await quotas.leave(tr, ctx, record)
    tr.clear(keys.inode(ino))
    if record.attr.type == model.DIRECTORY:
        tr.clear(keys.directory_times(ino))
        tr.clear(keys.directory_subdirs(ino))
    if record.attr.xattrs:
        tr.clear_range(*keys.xattrs(ino))
    tr.add(keys.counter(ctx.counter_shard), -1)


def gc_key(record: InodeRecord) -> bytes:
    """The key that the inode's entry of the gc queue has, if there is one."""
    return keys.gc(record.queued_ns, record.attr.inode)


async def enqueue(tr: Transaction, ctx: OpContext, record: InodeRecord) -> None:
    """Store the record and hand the inode to the garbage collector: files after a while, directories at once."""
    record.left_quota = record.quota
    await quotas.leave(tr, ctx, record)
    record.queued_ns = 0 if record.attr.type == model.DIRECTORY else ctx.now_ns
    store(tr, record)
    entry = GcRecord(format=model.FORMAT, time_ns=ctx.now_ns, type=record.attr.type)
    tr.set(gc_key(record), entry.SerializeToString())
    ctx.collect = True


def waits_for_removal(record: InodeRecord) -> bool:
    """Whether a file has lost its last name and nobody is known to have it open."""
    return record.queued_ns != 0 and record.attr.nlink == 0


def dequeue(tr: Transaction, record: InodeRecord) -> None:
    """Take an inode off the gc queue, if it is there; the caller stores the record."""
    tr.clear(gc_key(record))
    record.queued_ns = record.left_quota = 0


async def detach(tr: Transaction, ctx: OpContext, record: InodeRecord) -> None:
    """A directory lost its name: the garbage collector takes it apart, with everything below it."""
    record.detached = True
    await enqueue(tr, ctx, record)


def has_chunks(record: InodeRecord) -> bool:
    """Whether storage may hold chunks, given that no write session exists."""
    return record.attr.type == model.FILE and (record.loose or record.truncating or record.extent_bytes > 0)


async def release(tr: Transaction, ctx: OpContext, record: InodeRecord) -> None:
    """An inode lost its last link, session and hold: it goes, now or through the queue."""
    if has_chunks(record):
        await enqueue(tr, ctx, record)
    else:
        await erase(tr, ctx, record)


async def has_sessions(tr: Transaction, ino: int) -> bool:
    """Whether anybody has the inode open for writing, or as what it unlinked itself. Conflicts with later opens."""
    return bool(await tr.get_range(*keys.sessions(ino), limit=1))


async def is_kept(tr: Transaction, ino: int) -> bool:
    """Whether the inode has to stay without a name: it has sessions or holds. Conflicts with later ones."""
    return await has_sessions(tr, ino) or bool(await tr.get_range(*keys.holds(ino), limit=1))


async def begin_hold(tr: Transaction, ctx: OpContext, ino: int, client_id: bytes) -> bool:
    """Let a file stay until the client ends the hold; False when it is gone, or about to go."""
    record = await load(tr, ino)
    if record is None or record.attr.type != model.FILE:
        return False
    if waits_for_removal(record) and not await _recall(tr, ctx, record):
        return False
    hold = HoldRecord(format=model.FORMAT, since_ns=ctx.now_ns)
    tr.set(keys.hold(ino, client_id), hold.SerializeToString())
    return True


async def _recall(tr: Transaction, ctx: OpContext, record: InodeRecord) -> bool:
    """Take a file off the gc queue, unless somebody may be at removing its chunks."""
    if record.queued_ns <= model.decode_count(await tr.get(keys.GC_HORIZON)):
        return False
    quota = await quotas.load(tr, record.left_quota)
    dequeue(tr, record)
    if quota is not None:
        await quotas.adopt(tr, ctx, record, quota.id)
    store(tr, record)
    return True


async def end_hold(tr: Transaction, ctx: OpContext, ino: int, client_id: bytes) -> None:
    """End a hold, if there is one. An inode that only it kept goes."""
    key = keys.hold(ino, client_id)
    if await tr.get(key) is None:
        return
    tr.clear(key)
    record = await load(tr, ino)
    if record is None or record.attr.nlink or waits_for_removal(record):
        return
    if not await is_kept(tr, ino):
        await release(tr, ctx, record)


async def drop_link(
    tr: Transaction, ctx: OpContext, record: InodeRecord, *, hold_session: bytes, client_id: bytes
) -> None:
    """One name of a file less. After the last one it lives on only while it has sessions or holds."""
    attr = record.attr
    assert attr.nlink > 0
    attr.nlink -= 1
    attr.ctime_ns = ctx.now_ns
    if attr.nlink == 0:
        if hold_session:
            key = keys.session(attr.inode, check_session(hold_session))
            if await tr.get(key) is None:
                tr.set(key, _session(ctx, client_id, held=True))
        elif not await is_kept(tr, attr.inode):
            await release(tr, ctx, record)
            return
    else:
        record.lost_names = True
    store(tr, record)


def check_session(session: bytes) -> bytes:
    """The session id, or INVALID_ARGUMENT."""
    if len(session) != SESSION_BYTES:
        raise error(Code.CODE_INVALID_ARGUMENT, f"a session has {SESSION_BYTES} bytes, not {len(session)}")
    return session


def _session(ctx: OpContext, client_id: bytes, *, held: bool) -> bytes:
    record = SessionRecord(format=model.FORMAT, client_id=client_id, opened_ns=ctx.now_ns, held=held)
    return record.SerializeToString()


def open_session(tr: Transaction, ctx: OpContext, ino: int, client_id: bytes) -> bytes:
    """A new write session; the inode's chunks stay while it exists."""
    session = ctx.new_session()
    if ctx.renew and client_id:
        keep_alive(tr, ctx, client_id, "")
        ctx.renewed_client = client_id
    tr.set(keys.session(ino, session), _session(ctx, client_id, held=False))
    return session


def keep_alive(tr: Transaction, ctx: OpContext, client_id: bytes, description: str) -> None:
    """Renew a client's record: its sessions are not reaped for another session time."""
    record = KeepaliveRecord(format=model.FORMAT, time_ns=ctx.now_ns, description=description)
    tr.set(keys.keepalive(client_id), record.SerializeToString())


def check_length(record: InodeRecord, length: int) -> None:
    """Raises FILE_TOO_LARGE when the file cannot be so long."""
    index_max = (length - 1) // record.attr.layout.chunk_bytes if length else 0
    if length > model.FILE_BYTES_MAX or index_max > model.CHUNK_INDEX_MAX:
        raise error(Code.CODE_FILE_TOO_LARGE, f"{length} bytes are more than a file can have")


def reserve(record: InodeRecord, count: int) -> int:
    """The next `count` bytes that no writer has been given; returns the first one. Raises FILE_TOO_LARGE.

    Chunks may reach to their end from here on. The caller stores the record.
    """
    attr, reserved = record.attr, record.reserved
    offset = attr.length
    if reserved.truncate_version == attr.truncate_version:
        offset = max(offset, reserved.end)
    end = offset + count
    check_length(record, end)
    reserved.end, reserved.truncate_version = end, attr.truncate_version
    record.extent_bytes = max(record.extent_bytes, end)
    return offset


async def set_length(tr: Transaction, ctx: OpContext, record: InodeRecord, length: int, *, sessions: bool) -> None:
    """Truncate to `length` bytes; the caller stores the record. Raises QUOTA_EXCEEDED.

    When chunks may reach beyond `length`, a PendingTruncation is written and ``ctx.cut`` set: the runner cuts them
    after the commit. `sessions`: somebody has the file open for writing, so that they may reach anywhere.
    """
    attr = record.attr
    await quotas.charge(tr, ctx, record.quota, quotas.Usage(0, length - attr.length))
    everywhere = sessions or record.loose
    extent = max(record.extent_bytes, attr.length)
    attr.truncate_version += 1
    attr.length = length
    if not everywhere and length >= extent:
        return
    record.truncating = True
    pending = PendingTruncation(
        format=model.FORMAT,
        length=length,
        truncate_version=attr.truncate_version,
        extent_bytes=extent,
        everywhere=everywhere,
        owner=ctx.instance_id,
        claim=1,
    )
    tr.set(keys.truncation(attr.inode), pending.SerializeToString())
    ctx.cut = Cut(attr.inode, attr.layout, pending)


def stale(ino: int) -> Fs3Error:
    """The inode is on its way out."""
    return error(Code.CODE_STALE_HANDLE, f"inode {ino:#x} has been removed")
