import asyncio

import pytest

from fs3.core.clock import VirtualClock
from fs3.meta import keys, locks
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileLock, LockKind
from meta.harness import Meta, audit, faults, memory_of, run

POSIX, FLOCK = LockKind.LOCK_KIND_POSIX, LockKind.LOCK_KIND_FLOCK


def lock(type=locks.WRITE, *, owner=1, start=0, end=locks.OFFSET_MAX, kind=POSIX) -> FileLock:
    return FileLock(kind=kind, type=type, owner=owner, start=start, end=end, pid=77)


async def two_clients(**options) -> tuple[Meta, Meta, int]:
    """Two servers, each with a client, and a file."""
    a = await Meta.start(**options)
    b = await a.peer()
    return a, b, (await a.create("/f")).attr.inode


def test_locks_hold_between_clients_of_different_servers() -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        granted = await a.do("Lock", inode=inode, lock=lock(end=9))
        assert granted.granted
        assert granted.attr == await a.stat("/f")
        assert granted.session_ms == a.engine.session_ms
        assert not (await b.do("Lock", inode=inode, lock=lock(start=9))).granted
        assert (await b.do("Lock", inode=inode, lock=lock(start=10))).granted
        assert (await b.do("Lock", inode=inode, lock=lock(kind=FLOCK))).granted, "the kinds do not conflict"
        await a.do("Lock", inode=inode, lock=lock(locks.UNLOCK))
        assert (await b.do("Lock", inode=inode, lock=lock(start=9))).granted
        await b.do("Lock", inode=inode, lock=lock(locks.UNLOCK))
        await b.do("Lock", inode=inode, lock=lock(locks.UNLOCK, kind=FLOCK))
        assert await a.rows(keys.LOCK) == []
        await audit(a)

    run(main())


def test_a_repeated_request_gets_the_first_answer() -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        request = a.request("Lock", inode=inode, lock=lock())
        assert (await a.call("Lock", request)).granted
        await a.do("Lock", inode=inode, lock=lock(locks.UNLOCK))
        assert (await b.do("Lock", inode=inode, lock=lock())).granted
        assert (await b.call("Lock", request)).granted, "a late copy"
        assert (await a.do("GetLock", inode=inode, client_id=a.client_id, lock=lock())).HasField("conflict")
        assert len(await a.rows(keys.LOCK)) == 1, "it did not take the lock again"

    run(main())


def test_those_who_wait_get_it_in_their_order_through_any_server() -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        assert (await a.do("Lock", inode=inode, lock=lock(owner=1))).granted
        for meta, owner in ((b, 2), (a, 3)):
            assert not (await meta.do("Lock", inode=inode, lock=lock(owner=owner), wait=True)).granted
        await a.do("Lock", inode=inode, lock=lock(locks.UNLOCK, owner=1))
        assert not (await a.do("Lock", inode=inode, lock=lock(owner=3), wait=True)).granted
        assert not (await a.do("Lock", inode=inode, lock=lock(owner=1), wait=True)).granted, "it is behind them now"
        assert (await b.do("Lock", inode=inode, lock=lock(owner=2), wait=True)).granted

    run(main())


def test_a_successor_takes_over_locks_and_places_in_the_queue() -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        heir, other = await a.peer(seed=3), await a.peer(seed=4)
        await a.do("Lock", inode=inode, lock=lock(end=9))
        await b.do("Lock", inode=inode, lock=lock(start=10))
        await a.do("Lock", inode=inode, lock=lock(owner=2, start=10), wait=True)
        request = heir.request("Lock", inode=inode, predecessor=a.client_id)
        for _ in range(2):
            granted = await heir.call("Lock", request)
            assert (granted.granted, granted.attr.inode, granted.session_ms) == (True, inode, a.engine.session_ms)
        assert not (await b.do("Lock", inode=inode, lock=lock(end=5))).granted
        assert (await a.do("GetLock", inode=inode, client_id=heir.client_id, lock=lock(owner=9, end=9))).own
        await b.do("Lock", inode=inode, lock=lock(locks.UNLOCK, start=10))
        assert not (await other.do("Lock", inode=inode, lock=lock(start=10), wait=True)).granted, "the heir was first"
        assert (await heir.do("Lock", inode=inode, lock=lock(owner=2, start=10), wait=True)).granted
        await audit(a)

    run(main())


def test_only_one_without_locks_can_be_a_successor() -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        await a.do("Lock", inode=inode, lock=lock(end=9))
        await b.do("Lock", inode=inode, lock=lock(start=10))
        for wrong in (a.client_id, b"short"):
            assert await b.code("Lock", inode=inode, predecessor=wrong) == Code.CODE_INVALID_ARGUMENT
        heir = await a.peer(seed=3)
        assert (await heir.do("Lock", inode=inode, predecessor=b"\x01" * 16)).granted, "there is nothing to take over"
        assert (await b.do("GetLock", inode=inode, client_id=b.client_id, lock=lock(end=9))).HasField("conflict")

    run(main())


def test_one_who_gives_up_is_not_waited_for() -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        await a.do("Lock", inode=inode, lock=lock())
        await b.do("Lock", inode=inode, lock=lock(owner=2), wait=True)
        await b.do("Lock", inode=inode, lock=lock(owner=2), leave=True)
        await a.do("Lock", inode=inode, lock=lock(locks.UNLOCK))
        assert (await a.do("Lock", inode=inode, lock=lock(owner=3), wait=True)).granted

    run(main())


def test_two_that_upgrade_their_flock_do_not_stop_each_other() -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        for meta in (a, b):
            assert (await meta.do("Lock", inode=inode, lock=lock(locks.READ, kind=FLOCK))).granted
        assert not (await a.do("Lock", inode=inode, lock=lock(kind=FLOCK), wait=True)).granted
        assert (await b.do("Lock", inode=inode, lock=lock(kind=FLOCK))).granted

    run(main())


def test_what_is_no_lock_is_refused() -> None:
    async def main() -> None:
        a, _, inode = await two_clients()
        for wrong in (lock(kind=0), lock(7), lock(start=5, end=4), lock(end=1 << 63)):
            assert await a.code("Lock", inode=inode, lock=wrong) == Code.CODE_INVALID_ARGUMENT
        assert await a.code("Lock", inode=12345, lock=lock()) == Code.CODE_STALE_HANDLE
        assert (await a.do("Lock", inode=12345, lock=lock(locks.UNLOCK))).granted, "there is nothing to end"

    run(main())


@pytest.mark.parametrize("seed", range(8))
def test_never_two_hold_it_whatever_the_store_does(seed: int) -> None:
    async def main() -> None:
        a, b, inode = await two_clients()
        memory_of(a).faults = faults(seed)
        holders: list[Meta] = []

        async def others() -> None:
            await asyncio.sleep(0)

        async def client(meta: Meta, owner: int) -> None:
            for _ in range(15):
                while not (await meta.do("Lock", inode=inode, lock=lock(owner=owner), wait=True)).granted:
                    await others()
                holders.append(meta)
                assert len(holders) == 1
                await others()
                holders.pop()
                await meta.do("Lock", inode=inode, lock=lock(locks.UNLOCK, owner=owner))

        await asyncio.gather(client(a, 1), client(a, 2), client(b, 1))
        memory_of(a).faults = None
        assert await a.rows(keys.LOCK) == []

    run(main())


def test_locks_of_a_silent_client_end_and_those_of_others_stay() -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, b, inode = await two_clients(clock=clock, session_ms=60_000)
        await a.do("Lock", inode=inode, lock=lock(end=9))
        await b.do("Lock", inode=inode, lock=lock(start=10))
        await a.engine.reaper.step()
        await clock.advance(50)
        await b.do("Keepalive", client_id=b.client_id)
        await clock.advance(15)
        await a.engine.reaper.step()
        assert [keys.lock_client(key) for key, _ in await a.rows(keys.LOCK)] == [b.client_id]

    run(main())


def test_a_lock_renews_its_client() -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, _, inode = await two_clients(clock=clock, session_ms=60_000)
        for at in range(5):
            await a.do("Lock", inode=inode, lock=lock(start=at, end=at))
            await a.engine.reaper.step()
            await clock.advance(45)
        await a.engine.reaper.step()
        assert len(await a.rows(keys.LOCK)) == 1

    run(main())
