from fs3.meta import keys
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run, user


def test_only_opens_for_writing_make_sessions() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f")
        assert (await meta.do("Open", "/f", read=True)).session == b""
        assert not await meta.has_session(made.attr.inode)
        assert len((await meta.do("Open", "/f", write=True)).session) == 16
        assert await meta.has_session(made.attr.inode)

    run(main())


def test_opens_for_reading_alone_store_nothing() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        before = await meta.rows(b"F")
        await meta.do("Open", "/f", read=True)
        assert await meta.rows(b"F") == before
        await meta.do("Open", "/f", write=True)
        assert await meta.rows(b"F") != before

    run(main())


def test_open_checks_permission_bits_and_type() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.create("/f", mode=0o640)
        await meta.do("Symlink", "/s", target=b"f")
        cases = [
            ("/f", {"read": True, "caller": user(5)}, Code.CODE_ACCESS),
            ("/f", {"read": True, "caller": user(5, 0)}, 0),
            ("/f", {"write": True, "caller": user(5, 0)}, Code.CODE_ACCESS),
            ("/f", {"truncate": True, "caller": user(5, 0)}, Code.CODE_ACCESS),
            ("/d", {"read": True}, 0),
            ("/d", {"write": True}, Code.CODE_IS_DIRECTORY),
            ("/s", {"read": True}, Code.CODE_SYMLINK_LOOP),
            ("/s", {"read": True, "follow": True}, 0),
            ("/n", {"read": True}, Code.CODE_NOT_FOUND),
        ]
        for path, fields, expected in cases:
            assert await meta.code("Open", path, **fields) == expected, (path, fields)

    run(main())


def test_a_file_that_waits_for_removal_cannot_be_opened() -> None:
    async def main() -> None:
        meta = await Meta.start(gc_delay_ms=3_600_000)
        made = await meta.create("/f", open_write=True)
        meta.chunks.write(made.attr, 10)
        from fs3.v1.meta_pb2 import WriteReport

        inode = made.attr.inode
        report = WriteReport(wrote=True, length=10)
        await meta.do("Close", inode=inode, session=made.session, report=report)
        await meta.do("Unlink", "/f")
        assert len(await meta.rows(keys.GC)) == 1
        for fields in ({"read": True}, {"write": True}):
            assert await meta.code("Open", "", inode=inode, **fields) == Code.CODE_STALE_HANDLE

    run(main())


def test_an_open_renews_the_client_like_a_keepalive() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f", open_write=True)
        rows = await meta.rows(keys.KEEPALIVE)
        assert [key[2:] for key, _ in rows] == [meta.client_id]

    run(main())
