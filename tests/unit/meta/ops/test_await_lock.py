from fs3.meta import locks
from fs3.meta.registry import AWAIT_LOCK
from fs3.v1.meta_pb2 import AwaitLockRequest, FileLock, LockKind
from meta.harness import Meta, run


def lock(type=locks.WRITE, owner=1) -> FileLock:
    return FileLock(kind=LockKind.LOCK_KIND_POSIX, type=type, owner=owner, end=locks.OFFSET_MAX)


def test_the_first_in_the_queue_is_told_when_it_is_free() -> None:
    async def main() -> None:
        meta = await Meta.start()
        inode = (await meta.create("/f")).attr.inode

        async def free(owner: int) -> bool:
            request = AwaitLockRequest(client_id=meta.client_id, inode=inode, lock=lock(owner=owner))
            return (await meta.engine.call(AWAIT_LOCK, request)).free

        await meta.do("Lock", inode=inode, lock=lock())
        for owner in (2, 3):
            await meta.do("Lock", inode=inode, lock=lock(owner=owner), wait=True)
        assert not await free(2)
        await meta.do("Lock", inode=inode, lock=lock(locks.UNLOCK))
        assert (await free(2), await free(3)) == (True, False)

    run(main())
