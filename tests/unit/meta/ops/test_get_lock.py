from fs3.meta import locks
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileLock, LockKind
from meta.harness import Meta, run


def lock(type=locks.WRITE, *, owner=1, start=0, end=locks.OFFSET_MAX) -> FileLock:
    return FileLock(kind=LockKind.LOCK_KIND_POSIX, type=type, owner=owner, start=start, end=end, pid=77)


def test_the_lock_in_the_way_is_told_with_whose_it_is() -> None:
    async def main() -> None:
        a = await Meta.start()
        b = await a.peer()
        inode = (await a.create("/f")).attr.inode
        held = lock(locks.READ, start=5, end=8)
        await a.do("Lock", inode=inode, lock=held)
        theirs = await b.do("GetLock", inode=inode, client_id=b.client_id, lock=lock())
        assert (theirs.conflict, theirs.own) == (held, False)
        own = await a.do("GetLock", inode=inode, client_id=a.client_id, lock=lock(owner=2))
        assert (own.conflict, own.own) == (held, True)
        for free in (lock(locks.READ), lock(start=9), lock(end=4)):
            assert not (await b.do("GetLock", inode=inode, client_id=b.client_id, lock=free)).HasField("conflict")
        assert not (await a.do("GetLock", inode=inode, client_id=a.client_id, lock=lock())).HasField("conflict")
        assert await a.code("GetLock", inode=inode, client_id=b"x", lock=lock()) == Code.CODE_INVALID_ARGUMENT

    run(main())
