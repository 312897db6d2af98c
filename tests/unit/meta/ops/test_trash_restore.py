from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import CHUNK, Meta, audit, code, run, user


async def kept(**options: object) -> Meta:
    """A service with /d, which keeps what is removed from it."""
    meta = await Meta.start(**options)
    await meta.mkdir("/d", mode=0o777)
    await meta.keep("/d", 100)
    return meta


def test_a_file_comes_back_as_it_was() -> None:
    async def main() -> None:
        meta = await kept()
        made = await meta.create("/d/f", open_write=True)
        meta.chunks.write(made.attr, 3 * CHUNK)
        report = pb.WriteReport(wrote=True, length=3 * CHUNK)
        await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
        await meta.do("Unlink", "/d/f")
        assert await meta.code("Stat", "/d/f") == Code.CODE_NOT_FOUND
        await meta.collect()
        [entry] = await meta.trash()
        assert (await meta.restore(entry)).inode == made.attr.inode
        attr = await meta.stat("/d/f")
        assert (attr.inode, attr.length, attr.nlink) == (made.attr.inode, 3 * CHUNK, 1)
        assert meta.chunks.of(made.attr.inode)
        assert not await meta.trash()
        assert await code(meta.restore(entry)) == Code.CODE_NOT_FOUND
        await audit(meta)

    run(main())


def test_a_tree_that_was_removed_in_one_step_comes_back_whole() -> None:
    async def main() -> None:
        meta = await kept()
        await meta.mkdir("/d/tree/sub", parents=True)
        await meta.create("/d/tree/sub/f")
        await meta.do("RemoveAll", "/d/tree")
        [entry] = await meta.trash()
        assert entry.path == b"/d/tree"
        await meta.collect()
        await meta.restore(entry)
        assert await meta.names("/d/tree/sub") == [b"f"]
        assert (await meta.stat("/d")).nlink == 3
        await audit(meta)

    run(main())


def test_a_name_that_is_taken_or_a_parent_that_is_gone_is_told() -> None:
    async def main() -> None:
        meta = await kept()
        await meta.keep("/", 100)
        await meta.create("/d/f")
        await meta.do("Unlink", "/d/f")
        await meta.create("/d/f")
        [entry] = await meta.trash()
        assert await code(meta.restore(entry)) == Code.CODE_EXISTS
        assert await code(meta.restore(entry, "/d/f")) == Code.CODE_EXISTS
        assert await code(meta.restore(entry, "/none/f")) == Code.CODE_NOT_FOUND
        await meta.do("RemoveAll", "/d")
        assert await code(meta.restore(entry)) == Code.CODE_NOT_FOUND
        directory = next(found for found in await meta.trash() if found.path == b"/d")
        await meta.purge(directory)
        assert await code(meta.restore(entry)) == Code.CODE_NOT_FOUND
        await meta.restore(entry, "/elsewhere")
        assert await meta.names() == [b"elsewhere"]
        await audit(meta)

    run(main())


def test_a_directory_is_not_restored_below_itself() -> None:
    async def main() -> None:
        meta = await kept()
        inner = await meta.mkdir("/d/a/b", parents=True)
        await meta.do("RemoveAll", "/d/a")
        [entry] = await meta.trash()
        to = pb.PathAt(inode=inner.inode, path=b"a")
        request = pb.TrashRestoreRequest(caller=user(0), op=meta.op(), id=entry.id, to=to)
        assert await code(meta.call("TrashRestore", request)) == Code.CODE_INVALID_ARGUMENT
        await audit(meta)

    run(main())


def test_only_who_removed_or_owns_it_restores_it_and_only_where_he_may_write() -> None:
    async def main() -> None:
        meta = await kept()
        await meta.mkdir("/closed", mode=0o755)
        await meta.create("/d/f", caller=user(4))
        await meta.do("Unlink", "/d/f", caller=user(5))
        [entry] = await meta.trash()
        assert await code(meta.restore(entry, caller=user(6))) == Code.CODE_NOT_PERMITTED
        assert await code(meta.restore(entry, "/closed/f", caller=user(4))) == Code.CODE_ACCESS
        await meta.restore(entry, caller=user(4))
        assert (await meta.stat("/d/f")).uid == 4

    run(main())


def test_what_is_no_id_is_refused() -> None:
    async def main() -> None:
        meta = await kept()
        for bad in (b"", b"x" * 48, b"0" * 47):
            expected = Code.CODE_INVALID_ARGUMENT
            assert await code(meta.restore(pb.TrashEntry(id=bad))) == expected
            assert await code(meta.purge(pb.TrashEntry(id=bad))) == expected
        assert await code(meta.restore(pb.TrashEntry(id=b"0" * 48))) == Code.CODE_NOT_FOUND
        assert await meta.purge(pb.TrashEntry(id=b"0" * 48)) == 0

    run(main())
