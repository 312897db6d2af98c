from fs3.core.clock import VirtualClock
from fs3.meta import keys
from fs3.meta.background import owner_of
from fs3.v1 import meta_pb2 as pb
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
        meta.chunks.down = set()
        assert await meta.engine.collector.step() == 0, "the entry backs off first"
        await clock.advance(2)
        assert await meta.engine.collector.step() == 1
        assert meta.chunks.chunks == {}
        assert await meta.rows(keys.GC) == []
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


def test_two_collectors_at_once_do_no_harm() -> None:
    async def main() -> None:
        import asyncio

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
