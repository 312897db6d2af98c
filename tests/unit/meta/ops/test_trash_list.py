from fs3.core.clock import VirtualClock
from meta.harness import Meta, audit, run, user


def test_the_trash_is_listed_in_the_order_of_expiry_with_paths() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        await meta.mkdir("/a/b", parents=True)
        await meta.keep("/a", 100)
        await meta.keep("/a/b", 10)
        removed = {}
        for path in ("/a/one", "/a/b/two", "/a/b/three"):
            attr = (await meta.create(path)).attr
            await clock.advance(1.0)
            await meta.do("Unlink", path)
            removed[path.encode()] = attr.inode
        entries = await meta.trash()
        assert [entry.path for entry in entries] == [b"/a/b/two", b"/a/b/three", b"/a/one"]
        assert {entry.path: entry.attr.inode for entry in entries} == removed
        assert [entry.name for entry in entries] == [b"two", b"three", b"one"]
        assert [entry.expires_ns - entry.removed_ns for entry in entries] == [10 * 10**9, 10 * 10**9, 100 * 10**9]
        directory = (await meta.stat("/a/b")).inode
        assert [entry.name for entry in await meta.trash(parent=directory)] == [b"two", b"three"]
        await audit(meta)

    run(main())


def test_paths_follow_directories_that_moved_or_are_in_the_trash_themselves() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/a/b/c", parents=True)
        await meta.keep("/", 100)
        for path in ("/a", "/a/b", "/a/b/c"):
            await meta.keep(path, 100)
        await meta.create("/a/b/c/f")
        await meta.do("Unlink", "/a/b/c/f")
        await meta.rename("/a/b", "/a/d")
        assert [entry.path for entry in await meta.trash()] == [b"/a/d/c/f"]
        for path in ("/a/d/c", "/a/d", "/a"):
            await meta.do("Rmdir", path)
        assert {entry.path for entry in await meta.trash()} == {b"/a/d/c/f", b"/a/d/c", b"/a/d", b"/a"}
        top = next(entry for entry in await meta.trash() if entry.path == b"/a")
        await meta.purge(top)
        await meta.collect()
        paths = {entry.name: entry.path for entry in await meta.trash()}
        assert paths == {b"d": b"", b"c": b"", b"f": b""}
        await audit(meta)

    run(main())


def test_others_see_what_they_own_or_removed() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/shared", mode=0o777)
        await meta.keep("/shared", 100)
        for name, owner, remover in (("mine", 4, 4), ("taken", 5, 4), ("other", 5, 5)):
            await meta.create(f"/shared/{name}", caller=user(owner))
            await meta.do("Unlink", f"/shared/{name}", caller=user(remover))
        assert {entry.name for entry in await meta.trash(user(4))} == {b"mine", b"taken"}
        assert {entry.name for entry in await meta.trash(user(5))} == {b"taken", b"other"}
        assert not await meta.trash(user(6))
        assert len(await meta.trash()) == 3

    run(main())
