import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from fs3.core.clock import VirtualClock
from fs3.meta import keys
from fs3.meta.ops.hold import INODES_MAX
from fs3.v1.frame_pb2 import Code
from meta.harness import CHUNK, Meta, audit, code, faults, memory_of, run

GRACE_MS = 10_000


async def two_clients(**options) -> tuple[Meta, Meta]:
    """Two servers, each with a client."""
    a = await Meta.start(gc_delay_ms=GRACE_MS, **options)
    return a, await a.peer(gc_delay_ms=GRACE_MS)


async def written(meta: Meta, path: str) -> int:
    await meta.write(path, CHUNK)
    return (await meta.stat(path)).inode


async def hold(meta: Meta, *inodes: int) -> list[int]:
    """Begin holds; returns those for which it is too late."""
    return list((await meta.do("Hold", begin=inodes)).gone)


async def end(meta: Meta, *inodes: int) -> None:
    await meta.do("Hold", end=inodes)


async def collect(meta: Meta, clock: VirtualClock) -> None:
    """Remove everything that may go."""
    await clock.advance(GRACE_MS / 1000)
    while await meta.engine.collector.step():
        pass


def test_a_held_file_stays_until_the_last_hold_ends() -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, b = await two_clients(clock=clock)
        inode = await written(a, "/f")
        for meta in (a, b):
            assert await hold(meta, inode) == []
        await a.do("Unlink", "/f")
        await end(a, inode)
        await collect(a, clock)
        assert (await b.stat("", inode=inode)).nlink == 0
        assert a.chunks.of(inode)
        await audit(a)
        await end(b, inode)
        assert a.chunks.of(inode)
        await collect(a, clock)
        assert a.chunks.chunks == {}
        assert await a.code("Stat", "", inode=inode) == Code.CODE_STALE_HANDLE
        await audit(a)

    run(main())


async def replaced(meta: Meta) -> None:
    await written(meta, "/other")
    await meta.rename("/other", "/d/f")
    await meta.do("Unlink", "/d/f")


async def removed_with_its_directory(meta: Meta) -> None:
    await meta.do("RemoveAll", "/d")


async def purged(meta: Meta) -> None:
    await meta.keep("/d", 3600)
    await meta.do("Unlink", "/d/f")
    assert await meta.purge(*await meta.trash()) == 1


async def expired(meta: Meta) -> None:
    await meta.keep("/d", 60)
    await meta.do("Unlink", "/d/f")
    await meta.clock.advance(61)
    await meta.engine.expirer.step()


@pytest.mark.parametrize("lose_name", [replaced, removed_with_its_directory, purged, expired])
def test_however_a_held_file_loses_its_name_it_stays(lose_name: Callable[[Meta], Awaitable[None]]) -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, b = await two_clients(clock=clock)
        await a.mkdir("/d")
        inode = await written(a, "/d/f")
        await hold(b, inode)
        await lose_name(a)
        await collect(a, clock)
        assert {ino for _, ino, _ in a.chunks.chunks} == {inode}
        assert (await b.stat("", inode=inode)).nlink == 0
        await audit(a)
        await end(b, inode)
        await collect(a, clock)
        assert a.chunks.chunks == {}
        await audit(a)

    run(main())


def test_holds_and_sessions_keep_a_file_each_for_itself() -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, b = await two_clients(clock=clock)
        for ends_first in ("hold", "own hold of what was unlinked", "session"):
            inode = await written(a, "/f")
            await hold(a, inode)
            session = (await b.do("Open", "/f", write=True)).session
            await b.do("Unlink", "/f", hold_session=b"h" * 16)
            ends = {
                "hold": lambda inode=inode: end(a, inode),
                "own hold of what was unlinked": lambda inode=inode: b.do("Close", inode=inode, session=b"h" * 16),
                "session": lambda inode=inode, session=session: b.do("Close", inode=inode, session=session),
            }
            await ends.pop(ends_first)()
            for last in list(ends):
                await collect(a, clock)
                assert a.chunks.of(inode), (ends_first, last)
                await ends[last]()
            await collect(a, clock)
            assert a.chunks.chunks == {}
            await audit(a)

    run(main())


def test_a_file_that_waits_for_removal_may_still_be_held_until_its_time_has_come() -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, b = await two_clients(clock=clock)
        early, late = await written(a, "/early"), await written(a, "/late")
        await a.do("Unlink", "/early")
        await a.do("Unlink", "/late")
        await clock.advance(GRACE_MS / 1000 - 0.001)
        await a.engine.collector.step()
        assert await hold(b, early) == []
        assert len(await a.rows(keys.GC)) == 1
        assert await a.code("Open", "", inode=early, read=True) == 0
        await clock.advance(0.001)
        a.chunks.down = set(a.chunks.table)
        await a.engine.collector.step()
        assert await hold(b, late, early) == [late], "its chunks may be gone"
        a.chunks.down = set()
        await clock.advance(5)
        await collect(a, clock)
        assert not a.chunks.of(late)
        assert a.chunks.of(early)
        assert await hold(b, late) == [late]
        await end(b, early)
        await collect(a, clock)
        assert a.chunks.chunks == {}
        await audit(a)

    run(main())


def test_a_server_whose_clock_is_slow_recalls_nothing_whose_chunks_are_being_removed() -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, b = await two_clients(clock=clock)
        inode = await written(a, "/f")
        await a.do("Unlink", "/f")
        late: list[list[int]] = []

        async def recall(*_: object) -> None:
            a.chunks.before_call = None
            b.engine.clock = VirtualClock()
            late.append(await hold(b, inode))

        # When the chunks are about to go.
        a.chunks.before_call = recall
        await collect(a, clock)
        assert late == [[inode]]
        assert a.chunks.chunks == {}
        await audit(a)

    run(main())


def test_holds_do_not_pass_for_writers() -> None:
    async def main() -> None:
        a, b = await two_clients()
        inode = await written(a, "/f")
        await hold(b, inode)
        assert not await a.has_session(inode)
        calls = len(a.chunks.calls)
        await a.do("Truncate", "/f", length=2 * CHUNK)
        assert a.chunks.calls[calls:] == [], "nobody writes, so there is nothing behind the end to cut"

    run(main())


def test_a_recalled_file_counts_in_its_quota_until_it_is_closed() -> None:
    async def main() -> None:
        clock = VirtualClock()
        a, b = await two_clients(clock=clock)
        await a.mkdir("/q")
        await a.set_quota("/q", bytes_max=10 * CHUNK)
        await a.settle_quotas()
        inode = await written(a, "/q/f")
        assert await a.used("/q") == (2, CHUNK)
        await a.do("Unlink", "/q/f")
        assert await a.used("/q") == (1, 0)
        await hold(b, inode)
        assert await a.used("/q") == (2, CHUNK)
        await audit(a)
        await end(b, inode)
        assert await a.used("/q") == (1, 0)
        await a.do("QuotaSet", "/q", clear=True)
        await a.settle_quotas()
        assert await hold(b, inode) == []
        await audit(a)
        await end(b, inode)
        await collect(a, clock)
        assert a.chunks.chunks == {}
        await audit(a)

    run(main())


def test_what_is_begun_or_ended_again_changes_nothing() -> None:
    async def main() -> None:
        a, b = await two_clients()
        inode = await written(a, "/f")
        request = b.request("Hold", begin=[inode])
        for _ in range(2):
            assert list((await b.call("Hold", request)).gone) == []
        assert await hold(b, inode) == []
        assert len(await a.rows(keys.HOLD)) == 1
        await end(b, inode)
        assert list((await a.call("Hold", request)).gone) == [], "a late copy"
        await end(b, inode, 5 << 12)
        assert await a.rows(keys.HOLD) == []
        await audit(a)

    run(main())


def test_only_files_that_exist_are_held_and_not_too_many_at_once() -> None:
    async def main() -> None:
        a, b = await two_clients()
        await a.mkdir("/d")
        directory, inode = (await a.stat("/d")).inode, (await a.create("/f")).attr.inode
        others = [0, directory, 5 << 12, (1 << 64) - 1]
        assert await hold(b, inode, *others) == others
        assert await b.code("Hold", begin=[inode] * INODES_MAX, end=[inode]) == Code.CODE_INVALID_ARGUMENT
        anonymous = b.request("Hold", begin=[inode])
        anonymous.ClearField("op")
        assert await code(b.call("Hold", anonymous)) == Code.CODE_INVALID_ARGUMENT
        assert len(await a.rows(keys.HOLD)) == 1

    run(main())


def test_a_hold_renews_the_client_like_a_keepalive() -> None:
    async def main() -> None:
        a, b = await two_clients()
        inode = await written(a, "/f")
        await hold(b, inode)
        assert keys.keepalive(b.client_id) in dict(await a.rows(keys.KEEPALIVE))

    run(main())


@pytest.mark.parametrize("seed", range(8))
def test_held_files_keep_their_chunks_and_others_lose_them_under_faults(seed: int) -> None:
    async def main() -> None:
        rng = random.Random(seed)
        clock = VirtualClock()
        a, b = await two_clients(clock=clock)
        memory_of(a).faults = faults(seed, 0.04)
        held: dict[Meta, set[int]] = {a: set(), b: set()}
        linked: dict[int, str] = {}
        removed: list[int] = []

        async def reader(meta: Meta) -> None:
            for _ in range(40):
                inodes = [inode for inode in [*linked, *removed[-8:]] if rng.random() < 0.5]
                late = set(await hold(meta, *inodes))
                held[meta] |= set(inodes) - late
                ended = {inode for inode in held[meta] if rng.random() < 0.3}
                held[meta] -= ended
                await end(meta, *ended)

        async def remover() -> None:
            for turn in range(30):
                path = f"/{turn}"
                linked[await written(a, path)] = path
                if len(linked) > 6:
                    inode = rng.choice(list(linked))
                    removed.append(inode)
                    await b.do("Unlink", linked.pop(inode))

        async def collector(meta: Meta) -> None:
            while True:
                await meta.engine.collector.step()
                await asyncio.sleep(0)

        async def time() -> None:
            while True:
                await clock.advance(rng.random())

        background = [asyncio.create_task(work) for work in (collector(a), collector(b), time())]
        await asyncio.gather(reader(a), reader(b), remover())
        kept = set(linked) | held[a] | held[b]
        for inode in kept:
            assert a.chunks.of(inode)
            await a.stat("", inode=inode)
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        memory_of(a).faults = None
        for _ in range(4):
            await clock.advance(60)
            await a.engine.collector.step()
        assert {inode for _, inode, _ in a.chunks.chunks} == kept
        await audit(a)

    run(main())
