import asyncio

from fs3.meta import keys
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, code, run, user


async def tree_with_data(meta: Meta) -> list[int]:
    await meta.mkdir("/t/a/b", parents=True)
    inodes = []
    for path in ("/t/f", "/t/a/f", "/t/a/b/f"):
        made = await meta.create(path, open_write=True)
        meta.chunks.write(made.attr, 300_000)
        report = pb.WriteReport(wrote=True, length=300_000)
        await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
        inodes.append(made.attr.inode)
    return inodes


def test_the_tree_is_gone_at_once_and_its_chunks_after_collection() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await tree_with_data(meta)
        await meta.create("/keep")
        await meta.link("/t/a/f", "/linked")
        await meta.do("RemoveAll", "/t")
        assert await meta.names() == [b"keep", b"linked"]
        assert await meta.code("Stat", "/t") == Code.CODE_NOT_FOUND
        assert (await meta.stat("/")).nlink == 2
        await audit(meta)
        linked = (await meta.stat("/linked")).inode
        await meta.collect()
        assert {key[1] for key in meta.chunks.chunks} == {linked}
        assert (await meta.stat("/linked")).nlink == 1
        assert await meta.rows(keys.GC) == []
        assert len([k for k, _ in await meta.rows(keys.INODE) if len(k) == keys.INODE_KEY_BYTES]) == 3
        await audit(meta)

    run(main())


def test_large_directories_are_expanded_in_bounded_transactions() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/t")
        for i in range(700):
            await meta.create(f"/t/{i}")
        await meta.do("RemoveAll", "/t")
        await meta.collect()
        assert (await meta.do("Statfs", "")).inodes == 1
        await audit(meta)

    run(main())


def test_open_files_of_the_tree_live_on() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/t")
        made = await meta.create("/t/f", open_write=True)
        meta.chunks.write(made.attr, 10)
        await meta.do("RemoveAll", "/t")
        await meta.collect()
        inode = made.attr.inode
        assert (await meta.stat("", inode=inode)).nlink == 0
        await meta.do("Close", inode=inode, session=made.session, report=pb.WriteReport(wrote=True, length=10))
        await meta.collect()
        assert meta.chunks.chunks == {}
        await audit(meta)

    run(main())


def test_nothing_is_removed_when_one_directory_below_forbids_it() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Setattr", "/", mode=0o777)
        me = user(4)
        await meta.mkdir("/t", caller=me)
        await meta.mkdir("/t/a", caller=me)
        await meta.mkdir("/t/a/theirs")
        await meta.create("/t/a/theirs/f")
        assert await meta.code("RemoveAll", "/t", caller=me) == Code.CODE_ACCESS
        assert await meta.names("/t/a/theirs") == [b"f"]
        await meta.do("Setattr", "/t/a/theirs", mode=0o1777)
        assert await meta.code("RemoveAll", "/t", caller=me) == Code.CODE_NOT_PERMITTED
        await meta.do("Unlink", "/t/a/theirs/f")
        assert await meta.code("RemoveAll", "/t", caller=me) == 0
        await meta.collect()
        await audit(meta)

    run(main())


def test_files_and_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        await meta.do("RemoveAll", "/f")
        assert await meta.names() == []
        assert await meta.code("RemoveAll", "/f") == Code.CODE_NOT_FOUND
        assert await meta.code("RemoveAll", "/") == Code.CODE_BUSY

    run(main())


def test_a_detached_directory_takes_no_entries_before_it_is_expanded() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.mkdir("/t")
        await meta.create("/t/f")
        await meta.mkdir("/d")
        await meta.do("RemoveAll", "/t")
        assert await meta.code("Create", "g", inode=made.inode) == Code.CODE_NOT_FOUND
        assert await meta.code("Lookup", parent=made.inode, name=b"f") == Code.CODE_NOT_FOUND
        paths = {"from": pb.PathAt(inode=1, path=b"d"), "to": pb.PathAt(inode=made.inode, path=b"d")}
        assert await meta.code("Rename", **paths) == Code.CODE_NOT_FOUND

    run(main())


def test_creations_that_race_with_removal_leave_nothing_behind() -> None:
    async def main() -> None:
        for i in range(10):
            meta = await Meta.start(seed=i)
            made = await meta.mkdir("/t/a", parents=True)
            tasks = [code(meta.do("Create", f"f{n}", inode=made.inode)) for n in range(5)]
            results = await asyncio.gather(code(meta.do("RemoveAll", "/t")), *tasks, meta.collect())
            assert results[0] == 0
            await meta.collect()
            await audit(meta)
            assert (await meta.do("Statfs", "")).inodes == 1

    run(main())
