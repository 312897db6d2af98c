from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import CHUNK, Meta, audit, code, run, user


def test_purging_gives_the_space_back_and_takes_trees_apart() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d/tree", parents=True)
        await meta.keep("/d", 100)
        made = await meta.create("/d/tree/f", open_write=True)
        meta.chunks.write(made.attr, CHUNK)
        report = pb.WriteReport(wrote=True, length=CHUNK)
        await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
        await meta.create("/d/g")
        await meta.do("Unlink", "/d/g")
        await meta.do("RemoveAll", "/d/tree")
        entries = await meta.trash()
        assert await meta.purge(*entries, entries[0]) == 2
        await meta.collect()
        assert not await meta.trash()
        assert not meta.chunks.of(made.attr.inode)
        assert await meta.purge(*entries) == 0
        assert (await meta.do("Statfs", "/")).inodes == 3
        await audit(meta)

    run(main())


def test_all_are_purged_or_none() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d", mode=0o777)
        await meta.keep("/d", 100)
        for name, owner in (("mine", 4), ("other", 5)):
            await meta.create(f"/d/{name}", caller=user(owner))
            await meta.do("Unlink", f"/d/{name}", caller=user(owner))
        entries = await meta.trash()
        assert await code(meta.purge(*entries, caller=user(4))) == Code.CODE_NOT_PERMITTED
        assert len(await meta.trash()) == 2
        too_many = [pb.TrashEntry(id=b"0" * 47 + str(i % 10).encode()) for i in range(300)]
        assert await code(meta.purge(*too_many)) == Code.CODE_INVALID_ARGUMENT

    run(main())
