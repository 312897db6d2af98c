import asyncio

from fs3.core.clock import VirtualClock
from fs3.meta import chunks, keys, truncation
from fs3.meta.chunks import positions
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import CHAINS, CHUNK, Meta, code, run


async def crashed(meta: Meta) -> pb.Attr:
    """A file whose truncation to 10 bytes was committed by a server that ended before it cut anything."""
    made = await meta.create("/f", open_write=True)
    meta.chunks.write(made.attr, 4 * CHUNK)
    report = pb.WriteReport(wrote=True, length=4 * CHUNK)
    await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
    server = await meta.peer(seed=77)
    task = asyncio.create_task(server.do("Truncate", "/f", length=10))
    reached = asyncio.Event()

    async def stop(*_: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    meta.chunks.before_call = stop
    await reached.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    meta.chunks.before_call = None
    assert len(await meta.rows(keys.TRUNCATION)) == 1
    return await meta.stat("/f")


def test_a_truncation_of_a_dead_server_is_taken_over_only_after_its_time() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        attr = await crashed(meta)
        assert attr.length == 10
        step = asyncio.create_task(meta.engine.truncator.step())
        await clock.advance(2)
        assert await step == 1
        assert len(meta.chunks.of(attr.inode)) == 4
        await clock.advance(truncation.TAKEOVER_S)
        assert await meta.engine.truncator.step() == 0
        assert meta.chunks.of(attr.inode) == {0: 10}
        assert await meta.rows(keys.TRUNCATION) == []

    run(main())


def test_opening_for_writing_waits_for_the_cut_so_that_no_new_byte_is_lost() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        attr = await crashed(meta)
        assert (await meta.do("Open", "/f", read=True)).attr.length == 10
        opening = asyncio.create_task(meta.do("Open", "/f", write=True))
        await clock.advance(1)
        assert not opening.done()
        await clock.advance(truncation.TAKEOVER_S + 1)
        assert (await opening).session
        assert meta.chunks.of(attr.inode) == {0: 10}

    run(main())


def test_removal_of_a_file_with_a_pending_truncation_removes_everything() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await crashed(meta)
        await meta.do("Unlink", "/f")
        await meta.collect()
        assert meta.chunks.chunks == {}
        assert await meta.rows(keys.TRUNCATION) == []

    run(main())


def test_concurrent_truncations_and_reports_agree_with_the_chunks() -> None:
    async def main() -> None:
        for seed in range(10):
            meta = await Meta.start(seed=seed)
            made = await meta.create("/f", open_write=True)
            inode = made.attr.inode
            meta.chunks.write(made.attr, 4 * CHUNK)
            report = pb.WriteReport(wrote=True, length=4 * CHUNK)
            await asyncio.gather(
                meta.do("Truncate", "/f", length=CHUNK + 1),
                meta.do("Sync", inode=inode, session=made.session, report=report),
                meta.do("Truncate", "/f", length=3 * CHUNK),
            )
            attr = (await meta.do("Close", inode=inode, session=made.session)).attr
            end = max((i * CHUNK + n for i, n in meta.chunks.of(inode).items()), default=0)
            assert end <= attr.length
            assert await meta.rows(keys.TRUNCATION) == []

    run(main())


def test_a_partly_failed_cut_is_repeated_until_every_chain_has_it() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        inode = made.attr.inode
        meta.chunks.write(made.attr, 8 * CHUNK)
        meta.chunks.down = {CHAINS[2]}
        asked = asyncio.Event()

        async def notice(*_: object) -> None:
            asked.set()

        meta.chunks.before_call = notice
        task = asyncio.create_task(meta.do("Truncate", "/f", length=0))
        await asked.wait()
        await asyncio.sleep(0)
        assert not task.done()
        meta.chunks.down = set()
        assert (await task).attr.length == 0
        assert meta.chunks.of(inode) == {}

    run(main())


def test_an_operation_on_another_server_is_told_to_try_again_in_time() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await crashed(meta)
        from meta.harness import BY_NAME

        request = meta.request("Open", "/f", write=True)
        ends_s = meta.clock.monotonic_ns() * 1e-9 + 0.3
        assert await code(meta.engine.call(BY_NAME["Open"], request, ends_s=ends_s)) == Code.CODE_UNAVAILABLE

    run(main())


def test_positions_cover_exactly_what_may_exist() -> None:
    layout = pb.Layout(chunk_bytes=CHUNK, stripe=4)
    assert positions(layout, 0, None) == [0, 1, 2, 3]
    assert positions(layout, 0, 0) == []
    assert positions(layout, 0, 1) == [0]
    assert positions(layout, 2, 4 * CHUNK) == [2, 3]
    assert positions(layout, 3, 5 * CHUNK) == [0, 3]
    assert positions(layout, 9, 5 * CHUNK) == []
    assert positions(layout, 1, 100 * CHUNK) == [0, 1, 2, 3]


def test_end_is_the_largest_over_all_chains() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = (await meta.create("/f")).attr
        assert await chunks.end(meta.chunks, attr.inode, attr.layout, ends_s=0) == 0
        meta.chunks.write(attr, 9 * CHUNK + 5)
        assert await chunks.end(meta.chunks, attr.inode, attr.layout, ends_s=0) == 9 * CHUNK + 5

    run(main())
