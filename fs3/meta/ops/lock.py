"""Set, change and end locks of a file; take and give up places in the queue for one; take over those of a client."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import keys, locks, model, tree
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import LockRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import LockKind, LockRequest, LockResponse


async def run(tr: Transaction, request: LockRequest, ctx: OpContext) -> LockResponse:
    """Grant the lock, or else give it a place in the queue if it waits. Ending a lock is always granted.

    Raises STALE_HANDLE when the inode is gone, NO_SPACE when the client has too many locks of it, INVALID_ARGUMENT.
    """
    client_id, lock, ino = request.op.client_id, request.lock, request.inode
    if request.predecessor:
        return await _inherit(tr, request, ctx)
    locks.check(client_id, lock)
    records = await load(tr, ino)
    record = records.setdefault(client_id, locks.new_record())
    response = LockResponse(session_ms=ctx.session_ms)
    if request.leave:
        if locks.leave(record, lock):
            _store(tr, ctx, ino, client_id, record)
        return response
    if lock.type == locks.UNLOCK:
        response.granted = True
        if not locks.is_empty(record):
            locks.grant(record, lock)
            _store(tr, ctx, ino, client_id, record)
        return response
    response.attr.CopyFrom(await tree.complete(tr, await tree.load_handle(tr, ino)))
    blocked = locks.in_the_way(records, client_id, lock) is not None
    response.granted = not blocked and not (request.wait and locks.must_queue(records, client_id, lock, ctx.now_ns))
    if response.granted:
        locks.grant(record, lock)
    else:
        # A lock of flock(2) is not kept while it waits to be another one: two that do so would stop each other.
        surrendered = lock.kind == LockKind.LOCK_KIND_FLOCK and locks.surrender(record, lock)
        if request.wait:
            locks.queue(records, record, lock, ctx.now_ns)
        elif not surrendered:
            return response
    _store(tr, ctx, ino, client_id, record)
    tree.keep_alive(tr, ctx, client_id, "")
    return response


async def _inherit(tr: Transaction, request: LockRequest, ctx: OpContext) -> LockResponse:
    """Make what the predecessor has the caller's; it is granted also when that is nothing any more."""
    client_id, ino = request.op.client_id, request.inode
    locks.check_client(client_id)
    locks.check_client(request.predecessor)
    records = await load(tr, ino)
    inherited = records.get(request.predecessor)
    if inherited is not None and request.predecessor != client_id:
        if client_id in records:
            raise error(Code.CODE_INVALID_ARGUMENT, "who has locks of a file cannot take over those of another client")
        tr.clear(keys.lock(ino, request.predecessor))
        _store(tr, ctx, ino, client_id, inherited)
        tree.keep_alive(tr, ctx, client_id, "")
    attr = await tree.complete(tr, await tree.load_handle(tr, ino))
    return LockResponse(session_ms=ctx.session_ms, granted=True, attr=attr)


async def load(tr: Transaction, ino: int) -> dict[bytes, LockRecord]:
    """The locks of an inode by client. Conflicts with every change of them."""
    rows = await tr.get_range(*keys.locks(ino))
    return {keys.lock_client(key): model.decode_lock(value) for key, value in rows}


def _store(tr: Transaction, ctx: OpContext, ino: int, client_id: bytes, record: LockRecord) -> None:
    key = keys.lock(ino, client_id)
    if locks.is_empty(record):
        tr.clear(key)
    else:
        tr.set(key, record.SerializeToString())
    ctx.relocked = ino
