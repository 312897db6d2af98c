import asyncio

from fs3.meta import keys
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, code, run, user


def test_unlink_removes_an_empty_file_at_once() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f")
        assert (await meta.do("Unlink", "/f")).attr.nlink == 0
        assert await meta.code("Stat", "", inode=made.attr.inode) == Code.CODE_STALE_HANDLE
        assert await meta.rows(keys.GC) == []
        assert meta.chunks.calls == []
        await audit(meta)

    run(main())


def test_unlink_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.create("/f")
        await meta.create("/d/g")
        cases = [
            ("/d", {}, Code.CODE_IS_DIRECTORY),
            ("/", {}, Code.CODE_IS_DIRECTORY),
            ("/d/..", {}, Code.CODE_IS_DIRECTORY),
            ("/n", {}, Code.CODE_NOT_FOUND),
            ("/f/", {}, Code.CODE_NOT_DIRECTORY),
            ("/f/x", {}, Code.CODE_NOT_DIRECTORY),
            ("/d/g", {"caller": user(4)}, Code.CODE_ACCESS),
            ("/f", {"hold_session": b"abc"}, Code.CODE_INVALID_ARGUMENT),
        ]
        for path, fields, expected in cases:
            assert await meta.code("Unlink", path, **fields) == expected, (path, fields)
        await audit(meta)

    run(main())


def test_symlink_itself_is_unlinked() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        await meta.do("Symlink", "/s", target=b"f")
        await meta.do("Unlink", "/s")
        assert await meta.names() == [b"f"]
        await meta.mkdir("/d")
        await meta.do("Symlink", "/s", target=b"d")
        assert await meta.code("Unlink", "/s/") == Code.CODE_NOT_DIRECTORY
        assert await meta.code("Rmdir", "/s/") == Code.CODE_NOT_DIRECTORY

    run(main())


def test_sticky_directory_protects_entries_of_others() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/tmp")
        await meta.do("Setattr", "/tmp", mode=0o1777)
        await meta.create("/tmp/f", caller=user(4))
        assert await meta.code("Unlink", "/tmp/f", caller=user(5)) == Code.CODE_NOT_PERMITTED
        await meta.create("/tmp/g", caller=user(5))
        for source, dest in (("/tmp/f", "/tmp/h"), ("/tmp/g", "/tmp/f")):
            assert await code(meta.rename(source, dest, caller=user(5))) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Unlink", "/tmp/f", caller=user(4)) == 0

    run(main())


def test_unlinked_file_lives_until_its_holder_closes() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        inode = made.attr.inode
        meta.chunks.write(made.attr, 10)
        await meta.do("Close", inode=inode, session=made.session, report=pb.WriteReport(wrote=True, length=10))
        hold = b"h" * 16
        assert (await meta.do("Unlink", "/f", hold_session=hold)).attr.nlink == 0
        await meta.collect()
        assert meta.chunks.of(inode) == {0: 10}
        assert (await meta.stat("", inode=inode)).length == 10
        second = await meta.do("Open", "", inode=inode, write=True)
        await meta.do("Close", inode=inode, session=hold)
        await meta.collect()
        assert meta.chunks.of(inode) == {0: 10}
        await meta.do("Close", inode=inode, session=second.session)
        await meta.collect()
        assert meta.chunks.chunks == {}
        await audit(meta)

    run(main())


def test_hold_matters_only_for_the_last_name() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        await meta.link("/f", "/g")
        await meta.do("Unlink", "/f", hold_session=b"h" * 16)
        assert await meta.rows(keys.SESSION) == []

    run(main())


def test_unlink_and_open_for_writing_never_lose_an_open_file() -> None:
    async def main() -> None:
        for i in range(20):
            meta = await Meta.start(seed=i)
            made = await meta.create("/f", open_write=True)
            inode = made.attr.inode
            meta.chunks.write(made.attr, 10)
            await meta.do("Close", inode=inode, session=made.session, report=pb.WriteReport(wrote=True, length=10))
            opened, unlinked = await asyncio.gather(
                code(meta.do("Open", "", inode=inode, write=True)), code(meta.do("Unlink", "/f"))
            )
            assert unlinked == 0
            assert opened in (0, Code.CODE_STALE_HANDLE)
            await meta.collect()
            assert bool(meta.chunks.chunks) == (opened == 0)
            await audit(meta)

    run(main())
