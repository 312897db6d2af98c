from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run, user


def test_directory_links_are_two_and_its_subdirectories() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/a")
        await meta.mkdir("/a/b")
        await meta.mkdir("/a/c")
        await meta.create("/a/f")
        assert (await meta.stat("/a")).nlink == 4
        assert (await meta.stat("/")).nlink == 3
        await meta.do("Rmdir", "/a/b")
        assert (await meta.stat("/a")).nlink == 3

    run(main())


def test_walk_follows_symlinks_in_the_middle_and_dots() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/a")
        await meta.mkdir("/a/b")
        made = await meta.create("/a/b/f")
        await meta.do("Symlink", "/abs", target=b"/a/b")
        await meta.do("Symlink", "/a/rel", target=b"../a/b/")
        inode = made.attr.inode
        for path in ("/abs/f", "/a/rel/f", "a/b/../b/./f", "//a///b/f", "/../../a/b/f", "/abs/../b/f"):
            assert (await meta.stat(path)).inode == inode, path
        assert (await meta.stat("/abs", follow=False)).length == len("/a/b")
        assert (await meta.stat("/abs/", follow=False)).inode == (await meta.stat("/a/b")).inode
        assert await meta.code("Stat", "/a/b/f/", follow=True) == Code.CODE_NOT_DIRECTORY
        assert await meta.code("Stat", "/a/b/f/x") == Code.CODE_NOT_DIRECTORY

    run(main())


def test_symlink_loops_and_long_paths_end() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Symlink", "/x", target=b"y")
        await meta.do("Symlink", "/y", target=b"x")
        assert await meta.code("Stat", "/x", follow=True) == Code.CODE_SYMLINK_LOOP
        assert await meta.code("Stat", b"a" * 256) == Code.CODE_NAME_TOO_LONG
        assert await meta.code("Stat", b"a/" * 2049) == Code.CODE_NAME_TOO_LONG
        assert await meta.code("Stat", b"a\0") == Code.CODE_INVALID_ARGUMENT
        previous = b"/"
        for depth in range(41):
            await meta.do("Symlink", f"/l{depth}", target=previous)
            previous = b"/l%d" % depth
        assert (await meta.stat("/l39")).inode == 1
        assert await meta.code("Stat", "/l40", follow=True) == Code.CODE_SYMLINK_LOOP

    run(main())


def test_search_permission_is_needed_on_the_way_only() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/a", mode=0o700)
        made = await meta.create("/a/f", mode=0)
        assert await meta.code("Stat", "/a/f", caller=user(5)) == Code.CODE_ACCESS
        assert (await meta.stat("/a", caller=user(5))).mode == 0o700
        assert (await meta.stat("", inode=made.attr.inode, caller=user(5))).mode == 0

    run(main())


def test_permission_class_is_owner_then_group_then_others() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/d", mode=0o070, caller=user(0))
        await meta.do("Setattr", "/d", uid=5, gid=6)
        await meta.create("/d/f")
        assert await meta.code("Stat", "/d/f", caller=user(5, 6)) == Code.CODE_ACCESS
        assert await meta.code("Stat", "/d/f", caller=user(7, 6)) == 0
        assert await meta.code("Stat", "/d/f", caller=user(7, 1, 2, 6)) == 0
        assert await meta.code("Stat", "/d/f", caller=user(7, 1)) == Code.CODE_ACCESS

    run(main())
