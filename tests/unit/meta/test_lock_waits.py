import asyncio

import pytest

from fs3.core.clock import VirtualClock
from fs3.meta import locks
from fs3.v1.meta_pb2 import AwaitLockRequest, FileLock, LockKind
from meta.harness import Meta, run, until


def lock(type=locks.WRITE, owner=1) -> FileLock:
    return FileLock(kind=LockKind.LOCK_KIND_POSIX, type=type, owner=owner, end=locks.OFFSET_MAX)


def asking(meta: Meta, inode: int, wait_ms: int = 15_000) -> AwaitLockRequest:
    return AwaitLockRequest(client_id=meta.client_id, inode=inode, lock=lock(owner=2), wait_ms=wait_ms)


async def held() -> tuple[Meta, int]:
    meta = await Meta.start()
    inode = (await meta.create("/f")).attr.inode
    await meta.do("Lock", inode=inode, lock=lock())
    return meta, inode


@pytest.mark.parametrize("through_peer", [False, True])
def test_a_waiter_hears_of_an_unlock_through_any_server(through_peer: bool) -> None:
    async def main() -> None:
        meta, inode = await held()
        peer = await meta.peer()
        waiter = asyncio.create_task(peer.engine.await_lock(asking(peer, inode), left_s=20))
        await until(lambda: bool(peer.engine.lock_waits._waiting))
        request = meta.request("Lock", inode=inode, lock=lock(locks.UNLOCK))
        await (peer if through_peer else meta).call("Lock", request)
        assert (await waiter).free
        assert peer.engine.lock_waits._waiting == {}

    run(main())


def test_the_wait_ends_with_its_time() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        inode = (await meta.create("/f")).attr.inode
        await meta.do("Lock", inode=inode, lock=lock())
        waiter = asyncio.create_task(meta.engine.await_lock(asking(meta, inode, 5_000), left_s=20))
        await clock.advance(4.9)
        assert not waiter.done()
        await clock.advance(0.2)
        assert not (await waiter).free

    run(main())


def test_a_wait_that_is_given_up_leaves_nothing() -> None:
    async def main() -> None:
        meta, inode = await held()
        waiter = asyncio.create_task(meta.engine.await_lock(asking(meta, inode), left_s=20))
        await until(lambda: bool(meta.engine.lock_waits._waiting))
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        assert meta.engine.lock_waits._waiting == {}

    run(main())
