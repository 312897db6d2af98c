from fs3.meta import keys
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import WriteReport
from meta.harness import CHUNK, Meta, audit, run, user


def test_close_adopts_the_length_and_drops_the_session() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        inode = made.attr.inode
        report = WriteReport(wrote=True, length=1000, mtime_ns=77, atime_ns=66)
        attr = (await meta.do("Close", inode=inode, session=made.session, report=report)).attr
        assert (attr.length, attr.mtime_ns, attr.atime_ns) == (1000, 77, 66)
        assert attr == await meta.stat("/f")
        assert not await meta.has_session(inode)

    run(main())


def test_length_only_grows_by_reports() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        other = await meta.do("Open", "/f", write=True)
        inode = made.attr.inode
        await meta.do("Close", inode=inode, session=made.session, report=WriteReport(wrote=True, length=1000))
        await meta.do("Close", inode=inode, session=other.session, report=WriteReport(wrote=True, length=400))
        assert (await meta.stat("/f")).length == 1000

    run(main())


def test_report_from_before_a_truncation_counts_for_nothing_but_stored_bytes_do() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        inode = made.attr.inode
        meta.chunks.write(made.attr, 3 * CHUNK)
        await meta.do("Truncate", "/f", length=10)
        assert meta.chunks.of(inode) == {0: 10}
        attr = (
            await meta.do("Sync", inode=inode, session=made.session, report=WriteReport(wrote=True, length=3 * CHUNK))
        ).attr
        assert attr.length == 10
        meta.chunks.write(attr, CHUNK + 5, CHUNK)
        report = WriteReport(wrote=True, length=3 * CHUNK)
        attr = (await meta.do("Close", inode=inode, session=made.session, report=report)).attr
        assert attr.length == CHUNK + 5

    run(main())


def test_last_close_of_an_unlinked_file_hands_it_to_the_collector() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        inode = made.attr.inode
        meta.chunks.write(made.attr, 10)
        await meta.do("Unlink", "/f")
        assert (await meta.stat("", inode=inode)).nlink == 0
        await meta.collect()
        assert meta.chunks.of(inode)
        await meta.do("Close", inode=inode, session=made.session, report=WriteReport(wrote=True, length=10))
        await audit(meta)
        await meta.collect()
        assert meta.chunks.chunks == {}
        assert await meta.code("Stat", "", inode=inode) == Code.CODE_STALE_HANDLE
        assert await meta.code("Close", inode=inode, session=made.session) == Code.CODE_STALE_HANDLE
        await audit(meta)

    run(main())


def test_report_without_a_session_needs_permission() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", mode=0o644, open_write=True)
        inode = made.attr.inode
        report = WriteReport(wrote=True, length=1 << 40)
        fields = {"inode": inode, "session": b"x" * 16, "report": report, "caller": user(5)}
        assert await meta.code("Close", **fields) == Code.CODE_STALE_HANDLE
        assert (await meta.stat("/f")).length == 0
        assert await meta.code("Close", **{**fields, "session": b"short"}) == Code.CODE_INVALID_ARGUMENT
        assert await meta.has_session(inode)

    run(main())


def test_write_by_a_user_clears_set_id_bits() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Setattr", "/", mode=0o777)
        caller = user(5)
        made = await meta.create("/f", open_write=True, caller=caller)
        await meta.do("Setattr", "/f", mode=0o6777)
        fields = {"inode": made.attr.inode, "session": made.session}
        root = (await meta.do("Sync", **fields, report=WriteReport(wrote=True, length=1))).attr
        assert root.mode == 0o6777
        own = (await meta.do("Close", **fields, report=WriteReport(wrote=True, length=1), caller=caller)).attr
        assert own.mode == 0o777
        assert await meta.rows(keys.SESSION) == []

    run(main())
