import asyncio

import pytest

from fs3.core import settings
from fs3.core.clock import VirtualClock
from fs3.meta import gc, keys, tree
from fs3.meta.background import owner_of
from fs3.v1 import meta_pb2 as pb
from fs3.v1.routing_pb2 import RoutingSent
from meta.harness import CHAINS, CHUNK, Meta, audit, run


async def removed(meta: Meta, length: int = 6 * CHUNK, attempted: int = 0) -> int:
    made = await meta.create("/f", open_write=True)
    meta.chunks.write(made.attr, max(length, attempted))
    report = pb.WriteReport(wrote=True, length=length, attempted_length=attempted)
    await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
    await meta.do("Unlink", "/f")
    return made.attr.inode


def test_records_stay_until_every_chain_has_removed_the_chunks() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        inode = await removed(meta)
        meta.chunks.down = {CHAINS[1]}
        assert await meta.engine.collector.step() == 0
        assert meta.engine.collector.queued == 1
        assert len(await meta.rows(keys.GC)) == 1
        assert (await meta.stat("", inode=inode)).nlink == 0
        await clock.advance(0.5)
        status = meta.engine.status(7, RoutingSent())
        assert (status.gc_waiting, status.gc_refused, status.gc_collected, status.routing_version) == (1, 1, 0, 7)
        assert status.gc_oldest_ms == 500
        meta.chunks.down = set()
        assert await meta.engine.collector.step() == 0, "the entry backs off first"
        await clock.advance(2)
        assert await meta.engine.collector.step() == 1
        assert meta.chunks.chunks == {}
        assert await meta.rows(keys.GC) == []
        status = meta.engine.status(7, RoutingSent())
        assert (status.gc_waiting, status.gc_oldest_ms, status.gc_refused, status.gc_collected) == (0, 0, 0, 1)
        await audit(meta)

    run(main())


def test_small_files_are_removed_with_one_request() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await removed(meta, length=4096)
        await meta.collect()
        assert [call[0] for call in meta.chunks.calls] == ["remove"]
        assert meta.chunks.chunks == {}

    run(main())


def test_writes_that_were_never_acknowledged_are_looked_for_too() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await removed(meta, length=10, attempted=3 * CHUNK)
        await meta.collect()
        assert meta.chunks.chunks == {}

    run(main())


def test_delay_keeps_chunks() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, gc_delay_ms=60_000)
        await removed(meta)
        await clock.advance(59)
        assert await meta.engine.collector.step() == 0
        await clock.advance(2)
        assert await meta.engine.collector.step() == 1
        assert meta.chunks.chunks == {}

    run(main())


def test_a_pass_reads_what_is_due_and_no_more() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, gc_delay_ms=60_000)
        for _ in range(3):
            await removed(meta)
        await clock.advance(50)
        for _ in range(gc.SCAN_ROWS + 1):
            await removed(meta)
        await clock.advance(11)
        read = 0
        entry = gc._entry

        def counting(row: tuple[bytes, bytes]) -> gc._Entry:
            nonlocal read
            read += 1
            return entry(row)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gc, "_entry", counting)
            assert await meta.engine.collector.step() == 3
        assert read == 4, "the three, and one to know when the first of the others was queued"
        status = meta.engine.status(1, RoutingSent())
        assert (status.gc_waiting, status.gc_oldest_ms) == (gc.SCAN_ROWS + 1, 11_000)
        await clock.advance(49)
        assert await meta.engine.collector.step() == gc.SCAN_ROWS + 1
        assert meta.engine.status(1, RoutingSent()).gc_waiting == 0
        await audit(meta)

    run(main())


def test_directories_are_taken_apart_at_once_and_their_files_wait() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, gc_delay_ms=60_000)
        await meta.mkdir("/d")
        await meta.mkdir("/d/e")
        await meta.write("/d/e/f", CHUNK)
        await meta.do("RemoveAll", "/d")
        while await meta.engine.collector.step():
            pass
        assert (await meta.do("Statfs", "")).inodes == 2
        assert meta.chunks.chunks != {}
        await clock.advance(60)
        assert await meta.engine.collector.step() == 1
        assert meta.chunks.chunks == {}
        await audit(meta)

    run(main())


def test_what_an_earlier_version_queued_gets_its_place_in_the_order_of_time() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, gc_delay_ms=60_000)
        inode = await removed(meta)
        ((key, value),) = await meta.rows(keys.GC)
        tr = meta.store.transaction()
        record = await tree.load(tr, inode)
        assert record is not None
        tree.dequeue(tr, record)
        tree.store(tr, record)
        tr.set(keys.UNORDERED_GC + key[-8:], value)
        tr.set(keys.UNORDERED_GC + bytes(7) + b"x", value)
        await tr.commit()
        await clock.advance(59)
        assert await meta.engine.collector.step() == 0
        assert await meta.rows(keys.UNORDERED_GC) == []
        assert await meta.rows(keys.GC) == [(key, value)]
        await audit(meta)
        await clock.advance(1)
        assert await meta.engine.collector.step() == 1
        assert meta.chunks.chunks == {}
        await audit(meta)

    run(main())


def test_one_file_that_fails_does_not_hold_up_its_batch() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        for i in range(8):
            made = await meta.create(f"/f{i}", open_write=True)
            meta.chunks.write(made.attr, CHUNK)
            report = pb.WriteReport(wrote=True, length=CHUNK)
            await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
            await meta.do("Unlink", f"/f{i}")
        meta.chunks.down = {CHAINS[0]}
        waiting = sum(chain == CHAINS[0] for chain, _, _ in meta.chunks.chunks)
        assert 0 < waiting < 8
        assert await meta.engine.collector.step() == 8 - waiting
        assert len(await meta.rows(keys.GC)) == waiting
        meta.chunks.down = set()
        await clock.advance(2)
        assert await meta.engine.collector.step() == waiting
        assert meta.chunks.chunks == {}
        await audit(meta)

    run(main())


def test_the_collector_rests_while_clients_are_served_and_entries_are_young() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        steps = []
        for age_s in (0, 40):
            await removed(meta)
            await clock.advance(age_s)

            async def busy(*_: object) -> None:
                await meta.stat("/")
                await clock.advance(0.1)

            meta.chunks.before_call = busy
            started_ns = clock.monotonic_ns()
            step = asyncio.create_task(meta.engine.collector.step())
            while not step.done():
                await clock.advance(0.01)
            assert step.result() == 1
            meta.chunks.before_call = None
            steps.append((clock.monotonic_ns() - started_ns) / 1e9)
        # A file of 6 chunks costs as many calls as the stripe has chains, 0.1 s each; the rest comes on top.
        assert steps[0] > steps[1] + 0.3

    run(main())


def test_two_collectors_at_once_do_no_harm() -> None:
    async def main() -> None:
        meta = await Meta.start()
        peer = await meta.peer()
        for i in range(40):
            made = await meta.create(f"/f{i}", open_write=True)
            meta.chunks.write(made.attr, 2 * CHUNK)
            report = pb.WriteReport(wrote=True, length=2 * CHUNK)
            await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
            await meta.do("Unlink", f"/f{i}")
        await asyncio.gather(meta.collect(), peer.collect())
        assert meta.chunks.chunks == {}
        assert (await meta.do("Statfs", "")).inodes == 1
        await audit(meta)

    run(main())


def test_another_servers_share_is_left_to_it_for_a_while() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        await removed(meta)
        meta.engine.collector.owns = lambda inode: False
        assert await meta.engine.collector.step() == 0
        await clock.advance(31)
        assert await meta.engine.collector.step() == 1

    run(main())


def test_shares_are_even_and_move_little_when_a_server_goes() -> None:
    metas = [3, 8, 11]
    owners = {inode: owner_of(inode, metas) for inode in range(1, 3001)}
    counts = [list(owners.values()).count(node) for node in metas]
    assert min(counts) > 700
    without = {inode: owner_of(inode, [3, 11]) for inode in owners}
    assert all(without[i] == owners[i] for i in owners if owners[i] != 8)
    assert owner_of(5, []) == 0


def test_how_long_removed_files_stay_may_change_while_the_service_runs() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        values = {settings.GC_DELAY: "10s"}
        meta.engine.collector.settings = lambda: values
        await removed(meta)
        assert await meta.engine.collector.step() == 0
        await clock.advance(11)
        assert await meta.engine.collector.step() == 1
        await removed(meta)
        assert await meta.engine.collector.step() == 0
        values.clear()
        assert await meta.engine.collector.step() == 1

    run(main())
