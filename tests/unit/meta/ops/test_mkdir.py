import asyncio

from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, code, run, user


def test_mkdir_makes_one_directory() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.mkdir("/a/", mode=0o700)
        assert (made.nlink, made.mode, made.parent) == (2, 0o700, 1)
        assert made == await meta.stat("/a")
        await meta.create("/f")
        cases = [
            ("/a", Code.CODE_EXISTS),
            ("/f", Code.CODE_EXISTS),
            ("/", Code.CODE_EXISTS),
            ("/a/.", Code.CODE_EXISTS),
            ("/a/..", Code.CODE_EXISTS),
            ("/x/y", Code.CODE_NOT_FOUND),
            ("/f/y", Code.CODE_NOT_DIRECTORY),
            ("/" + "n" * 256, Code.CODE_NAME_TOO_LONG),
        ]
        for path, expected in cases:
            assert await meta.code("Mkdir", path) == expected, path
        assert await meta.code("Mkdir", "/a/x", caller=user(3)) == Code.CODE_ACCESS
        await audit(meta)

    run(main())


def test_parents_are_made_and_an_existing_directory_is_fine() -> None:
    async def main() -> None:
        meta = await Meta.start()
        deep = await meta.mkdir("/a/b/../b/c", parents=True)
        assert (await meta.stat("/a/b/c")).inode == deep.inode
        assert (await meta.mkdir("/a/b", parents=True)).nlink == 3
        await meta.do("Symlink", "/s", target=b"a/b")
        await meta.mkdir("/s/d", parents=True)
        assert await meta.names("/a/b") == [b"c", b"d"]
        await meta.create("/f")
        assert await meta.code("Mkdir", "/f", parents=True) == Code.CODE_EXISTS
        assert await meta.code("Mkdir", "/f/x", parents=True) == Code.CODE_NOT_DIRECTORY
        await audit(meta)

    run(main())


def test_concurrent_mkdir_p_of_overlapping_paths_all_succeed() -> None:
    async def main() -> None:
        meta = await Meta.start()
        peer = await meta.peer()
        paths = [f"/a/b{i % 3}/c{i % 5}/d" for i in range(30)]
        tasks = ((meta, peer)[i % 2].do("Mkdir", path, parents=True) for i, path in enumerate(paths))
        assert set(await asyncio.gather(*(code(t) for t in tasks))) == {0}
        await audit(meta)

    run(main())
