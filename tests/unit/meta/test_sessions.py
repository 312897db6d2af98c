from collections.abc import AsyncIterator

import pytest

from fs3.core.clock import VirtualClock
from fs3.kv.api import KvStore
from fs3.meta import keys, scan
from fs3.meta.sessions import HOLDS_AT_ONCE
from fs3.v1 import meta_pb2 as pb
from meta.harness import CHAINS, CHUNK, Meta, audit, run

SESSION_S = 60


async def writer(clock: VirtualClock, **options) -> tuple[Meta, pb.OpenResponse]:
    meta = await Meta.start(clock=clock, session_ms=SESSION_S * 1000, **options)
    made = await meta.create("/f", open_write=True)
    meta.chunks.write(made.attr, 3 * CHUNK + 9)
    assert await meta.engine.reaper.step() == 0
    return meta, made


def test_length_of_a_dead_writer_is_what_storage_holds() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, made = await writer(clock)
        await clock.advance(SESSION_S - 1)
        assert await meta.engine.reaper.step() == 0
        await clock.advance(2)
        assert await meta.engine.reaper.step() == 1
        assert (await meta.stat("/f")).length == 3 * CHUNK + 9
        assert not await meta.has_session(made.attr.inode)
        await meta.do("Unlink", "/f")
        await meta.collect()
        assert meta.chunks.chunks == {}
        await audit(meta)

    run(main())


def test_keepalives_keep_sessions() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, made = await writer(clock)
        for _ in range(10):
            await clock.advance(SESSION_S - 5)
            await meta.do("Keepalive", client_id=meta.client_id)
            assert await meta.engine.reaper.step() == 0
        assert await meta.has_session(made.attr.inode)

    run(main())


def test_silence_is_measured_by_each_server_on_its_own_clock() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, made = await writer(clock)
        await clock.advance(10 * SESSION_S)
        late = await meta.peer(session_ms=SESSION_S * 1000)
        assert await late.engine.reaper.step() == 0, "this server has not watched the client for long enough"
        await clock.advance(SESSION_S + 1)
        assert await late.engine.reaper.step() == 1
        assert not await meta.has_session(made.attr.inode)

    run(main())


def test_unreachable_storage_keeps_the_session() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, made = await writer(clock)
        await clock.advance(SESSION_S + 1)
        meta.chunks.down = {CHAINS[0]}
        assert await meta.engine.reaper.step() == 0
        assert await meta.has_session(made.attr.inode)
        meta.chunks.down = set()
        assert await meta.engine.reaper.step() == 1

    run(main())


def test_unlinked_file_of_a_dead_client_is_collected() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, _ = await writer(clock)
        await meta.do("Unlink", "/f")
        await meta.create("/g")
        await meta.do("Unlink", "/g", hold_session=b"h" * 16)
        await meta.collect()
        assert meta.chunks.chunks
        await clock.advance(SESSION_S + 1)
        await meta.engine.reaper.step()
        await clock.advance(SESSION_S + 1)
        await meta.engine.reaper.step()
        await meta.collect()
        assert meta.chunks.chunks == {}
        assert (await meta.do("Statfs", "")).inodes == 1
        await audit(meta)

    run(main())


def test_holds_of_a_dead_client_end_and_those_of_others_stay() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, session_ms=SESSION_S * 1000)
        other = await meta.peer()
        inodes = []
        for i in range(HOLDS_AT_ONCE + 2):
            await meta.write(f"/{i}", CHUNK)
            inodes.append((await meta.stat(f"/{i}")).inode)
        await meta.do("Hold", begin=inodes)
        await other.do("Hold", begin=inodes[:2])
        for i in range(HOLDS_AT_ONCE + 2):
            await meta.do("Unlink", f"/{i}")
        await meta.collect()
        assert len(meta.chunks.chunks) == len(inodes)
        assert await meta.engine.reaper.step() == 0
        await clock.advance(SESSION_S - 1)
        await other.do("Keepalive", client_id=other.client_id)
        assert await meta.engine.reaper.step() == 0
        await clock.advance(1)
        assert await meta.engine.reaper.step() == len(inodes)
        assert len(await meta.rows(keys.HOLD)) == 2
        await meta.collect()
        assert {inode for _, inode, _ in meta.chunks.chunks} == set(inodes[:2])
        assert await meta.engine.reaper.step() == 0
        await audit(meta)

    run(main())


def test_a_client_that_holds_again_after_its_silence_is_watched_again() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, session_ms=SESSION_S * 1000)
        await meta.write("/f", CHUNK)
        for _ in range(2):
            await meta.do("Hold", begin=[(await meta.stat("/f")).inode])
            assert await meta.engine.reaper.step() == 0
            await clock.advance(SESSION_S)
            assert await meta.engine.reaper.step() == 1
            assert await meta.rows(keys.HOLD) == []
        assert (await meta.stat("/f")).nlink == 1

    run(main())


def test_holds_are_not_read_while_all_clients_are_heard_of() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, session_ms=SESSION_S * 1000)
        await meta.write("/f", CHUNK)
        await meta.do("Hold", begin=[(await meta.stat("/f")).inode])
        read = []
        pages = scan.pages

        def noting(store: KvStore, span: tuple[bytes, bytes], *, limit: int) -> AsyncIterator[scan.Rows]:
            read.append(span)
            return pages(store, span, limit=limit)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scan, "pages", noting)
            await meta.engine.reaper.step()
            assert keys.table(keys.HOLD) not in read
            await clock.advance(SESSION_S)
            for _ in range(3):
                await meta.engine.reaper.step()
        assert read.count(keys.table(keys.HOLD)) == 1, "once for a client that fell silent"

    run(main())


def test_a_client_that_comes_back_in_time_wins() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, made = await writer(clock)
        await clock.advance(SESSION_S + 1)

        async def come_back(*_: object) -> None:
            meta.chunks.before_call = None
            await meta.do("Keepalive", client_id=meta.client_id)

        # While the reaper asks storage for the length, after it has judged the client dead.
        meta.chunks.before_call = come_back
        assert await meta.engine.reaper.step() == 0
        assert await meta.has_session(made.attr.inode)

    run(main())


def test_slow_client_whose_session_was_reaped_still_reports() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, made = await writer(clock)
        await clock.advance(SESSION_S + 1)
        assert await meta.engine.reaper.step() == 1
        report = pb.WriteReport(wrote=True, length=10 * CHUNK)
        attr = (await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)).attr
        assert attr.length == 10 * CHUNK

    run(main())


def test_records_of_clients_long_gone_are_dropped() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta, made = await writer(clock)
        await meta.do("Close", inode=made.attr.inode, session=made.session)
        await meta.engine.reaper.step()
        await clock.advance(5 * SESSION_S)
        await meta.engine.reaper.step()
        assert len(await meta.rows(keys.KEEPALIVE)) == 1
        await clock.advance(6 * SESSION_S)
        await meta.engine.reaper.step()
        assert await meta.rows(keys.KEEPALIVE) == []

    run(main())
