import asyncio

from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, code, run, user


def test_rename_moves_and_keeps_the_inode() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/a/s", parents=True)
        await meta.mkdir("/b")
        made = await meta.create("/a/f")
        await meta.rename("/a/f", "/b/g")
        assert (await meta.stat("/b/g")).inode == made.attr.inode
        await meta.rename("/a/s", "/b/s")
        assert (await meta.stat("/a")).nlink == 2
        assert (await meta.stat("/b")).nlink == 3
        assert (await meta.stat("/b/s")).parent == (await meta.stat("/b")).inode
        assert (await meta.stat("/b/s/..")).inode == (await meta.stat("/b")).inode
        await audit(meta)

    run(main())


def test_rename_replaces_atomically() -> None:
    async def main() -> None:
        meta = await Meta.start()
        old = await meta.create("/old", open_write=True)
        meta.chunks.write(old.attr, 100)
        report = pb.WriteReport(wrote=True, length=100)
        await meta.do("Close", inode=old.attr.inode, session=old.session, report=report)
        new = await meta.create("/new")
        response = await meta.rename("/new", "/old")
        assert response.replaced.inode == old.attr.inode
        assert response.replaced.nlink == 0
        assert (await meta.stat("/old")).inode == new.attr.inode
        assert await meta.names() == [b"old"]
        await meta.collect()
        assert meta.chunks.chunks == {}
        await meta.mkdir("/d1")
        await meta.mkdir("/d2/x", parents=True)
        await meta.rename("/d2", "/d1")
        assert await meta.names("/d1") == [b"x"]
        assert (await meta.stat("/")).nlink == 3
        await audit(meta)

    run(main())


def test_replaced_file_is_held_for_who_has_it_open() -> None:
    async def main() -> None:
        meta = await Meta.start()
        old = await meta.create("/old")
        await meta.create("/new")
        await meta.rename("/new", "/old", hold_session=b"h" * 16)
        assert (await meta.stat("", inode=old.attr.inode)).nlink == 0
        await meta.do("Close", inode=old.attr.inode, session=b"h" * 16)
        assert await meta.code("Stat", "", inode=old.attr.inode) == Code.CODE_STALE_HANDLE
        await audit(meta)

    run(main())


def test_rename_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d/e/g", parents=True)
        await meta.mkdir("/empty")
        await meta.create("/f")
        cases = [
            ("/n", "/m", {}, Code.CODE_NOT_FOUND),
            ("/f", "/n/m", {}, Code.CODE_NOT_FOUND),
            ("/f", "/d", {}, Code.CODE_IS_DIRECTORY),
            ("/d", "/f", {}, Code.CODE_NOT_DIRECTORY),
            ("/empty", "/d", {}, Code.CODE_NOT_EMPTY),
            ("/d", "/d/e/h", {}, Code.CODE_INVALID_ARGUMENT),
            ("/d", "/d/e", {}, Code.CODE_INVALID_ARGUMENT),
            ("/d/e", "/d", {}, Code.CODE_NOT_EMPTY),
            ("/f", "/empty", {"no_replace": True}, Code.CODE_EXISTS),
            ("/f", "/n", {"exchange": True}, Code.CODE_NOT_FOUND),
            ("/d", "/d/e", {"exchange": True}, Code.CODE_INVALID_ARGUMENT),
            ("/d/e", "/d", {"exchange": True}, Code.CODE_INVALID_ARGUMENT),
            ("/f", "/g", {"exchange": True, "no_replace": True}, Code.CODE_INVALID_ARGUMENT),
            ("/f/", "/g", {}, Code.CODE_NOT_DIRECTORY),
            ("/f", "/g/", {}, Code.CODE_NOT_DIRECTORY),
            ("/", "/g", {}, Code.CODE_BUSY),
            ("/d/.", "/g", {}, Code.CODE_BUSY),
            ("/f", "/" + "n" * 256, {}, Code.CODE_NAME_TOO_LONG),
            ("/f", "/g", {"caller": user(4)}, Code.CODE_ACCESS),
        ]
        for source, dest, fields, expected in cases:
            assert await code(meta.rename(source, dest, **fields)) == expected, (source, dest, fields)
        await audit(meta)

    run(main())


def test_names_of_one_inode_stay_when_renamed_onto_each_other() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/a")
        await meta.link("/a", "/b")
        await meta.rename("/a", "/b")
        await meta.rename("/a", "/a")
        assert await meta.names() == [b"a", b"b"]
        await audit(meta)

    run(main())


def test_exchange_swaps_file_and_directory() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/p/d", parents=True)
        await meta.mkdir("/q")
        made = await meta.create("/q/f")
        directory = await meta.stat("/p/d")
        await meta.rename("/p/d", "/q/f", exchange=True)
        assert (await meta.stat("/p/d")).inode == made.attr.inode
        assert (await meta.stat("/q/f")).inode == directory.inode
        assert (await meta.stat("/p")).nlink == 2
        assert (await meta.stat("/q")).nlink == 3
        await audit(meta)

    run(main())


def test_a_directory_of_somebody_else_is_not_moved_to_another_parent() -> None:
    async def main() -> None:
        meta = await Meta.start()
        for path in ("/a", "/b"):
            await meta.mkdir(path)
            await meta.do("Setattr", path, mode=0o777)
        await meta.mkdir("/a/d")
        assert await code(meta.rename("/a/d", "/b/d", caller=user(4))) == Code.CODE_ACCESS
        assert await code(meta.rename("/a/d", "/a/e", caller=user(4))) == 0

    run(main())


def test_concurrent_renames_make_no_cycle() -> None:
    async def main() -> None:
        for seed in range(15):
            meta = await Meta.start(seed=seed)
            peer = await meta.peer(seed=seed + 100)
            await meta.mkdir("/a/b/c", parents=True)
            await meta.mkdir("/x/y/z", parents=True)
            results = await asyncio.gather(
                code(meta.rename("/a", "/x/y/z/a")),
                code(peer.rename("/x", "/a/b/c/x")),
                code(meta.rename("/a/b", "/x/b")),
                code(peer.rename("/x/y", "/a/y")),
            )
            assert 0 in results
            await audit(meta)

    run(main())


def test_concurrent_renames_of_one_file_leave_one_name() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f")
        results = await asyncio.gather(*(code(meta.rename("/f", f"/g{i}")) for i in range(10)))
        assert results.count(0) == 1
        assert (await meta.stat(f"/g{results.index(0)}")).inode == made.attr.inode
        await audit(meta)

    run(main())


def test_exchange_of_directories_exchanges_their_parents() -> None:
    async def main() -> None:
        meta = await Meta.start()
        first = await meta.mkdir("/p/a", parents=True)
        second = await meta.mkdir("/q/b", parents=True)
        await meta.rename("/p/a", "/q/b", exchange=True)
        assert (await meta.stat("", inode=first.inode)).parent == (await meta.stat("/q")).inode
        assert (await meta.stat("", inode=second.inode)).parent == (await meta.stat("/p")).inode
        await audit(meta)

    run(main())


def test_concurrent_renames_by_handle_make_no_cycle() -> None:
    async def main() -> None:
        for seed in range(15):
            meta = await Meta.start(seed=seed)
            for top in ("a", "x"):
                await meta.mkdir(f"/{top}/1/2/3", parents=True)
            deep = {top: (await meta.stat(f"/{top}/1/2/3")).inode for top in ("a", "x")}

            def move(meta: Meta, name: bytes, inode: int):
                paths = {"from": pb.PathAt(inode=1, path=name), "to": pb.PathAt(inode=inode, path=name)}
                return code(meta.do("Rename", **paths))

            results = await asyncio.gather(move(meta, b"a", deep["x"]), move(meta, b"x", deep["a"]))
            assert sorted(results) == [0, Code.CODE_INVALID_ARGUMENT]
            await audit(meta)

    run(main())
