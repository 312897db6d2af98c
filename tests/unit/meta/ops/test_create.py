import asyncio

import pytest

from fs3.meta import keys
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import CHUNK, Meta, audit, code, run, user


def test_created_file_has_owner_mode_times_and_layout() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Setattr", "/", mode=0o777)
        made = await meta.create("/f", mode=0o640, open_write=True, caller=user(7, 8))
        attr = made.attr
        assert made.created
        assert len(made.session) == 16
        assert (attr.uid, attr.gid, attr.mode, attr.nlink, attr.length) == (7, 8, 0o640, 1, 0)
        assert attr.atime_ns == attr.mtime_ns == attr.ctime_ns > 0
        assert attr.layout.chunk_bytes == CHUNK
        assert attr.layout.stripe == 4
        assert attr == await meta.stat("/f")
        assert (await meta.stat("/")).mtime_ns == attr.mtime_ns
        assert await meta.has_session(attr.inode)
        await audit(meta)

    run(main())


def test_existing_file_is_opened_unless_exclusive() -> None:
    async def main() -> None:
        meta = await Meta.start()
        first = await meta.create("/f")
        again = await meta.create("/f", mode=0o600, open_write=True)
        assert not again.created
        assert again.attr.inode == first.attr.inode
        assert again.attr.mode == 0o644
        assert again.session
        assert await meta.code("Create", "/f", exclusive=True) == Code.CODE_EXISTS
        await meta.do("Symlink", "/dangling", target=b"nothing")
        assert await meta.code("Create", "/dangling", exclusive=True, follow=True) == Code.CODE_EXISTS

    run(main())


def test_create_follows_a_dangling_symlink_when_asked() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.do("Symlink", "/s", target=b"d/new")
        assert await meta.code("Create", "/s", follow=False) == Code.CODE_SYMLINK_LOOP
        made = await meta.create("/s", follow=True)
        assert (await meta.stat("/d/new")).inode == made.attr.inode

    run(main())


def test_truncate_of_an_existing_file_cuts_its_chunks_before_the_answer() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        meta.chunks.write(made.attr, 5 * CHUNK + 10)
        report = pb.WriteReport(wrote=True, length=5 * CHUNK + 10)
        await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
        again = await meta.create("/f", truncate=True, open_write=True)
        assert again.attr.length == 0
        assert again.attr.truncate_version == 1
        assert meta.chunks.of(made.attr.inode) == {}
        assert await meta.rows(keys.TRUNCATION) == []

    run(main())


def test_truncate_of_an_empty_closed_file_asks_storage_nothing() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        await meta.create("/f", truncate=True)
        assert meta.chunks.calls == []

    run(main())


def test_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.create("/f", mode=0o600)
        cases = [
            ("/d", {}, Code.CODE_IS_DIRECTORY),
            ("/d", {"exclusive": True}, Code.CODE_EXISTS),
            ("/d/.", {}, Code.CODE_IS_DIRECTORY),
            ("/new/", {}, Code.CODE_IS_DIRECTORY),
            ("/no/f", {}, Code.CODE_NOT_FOUND),
            ("/f/g", {}, Code.CODE_NOT_DIRECTORY),
            ("/d/f", {"caller": user(5)}, Code.CODE_ACCESS),
            ("/f", {"caller": user(5), "open_read": True}, Code.CODE_ACCESS),
            ("/f", {"caller": user(5), "open_write": True}, Code.CODE_ACCESS),
            ("/f", {"caller": user(5), "truncate": True}, Code.CODE_ACCESS),
            ("/x", {"type": pb.FILE_TYPE_DIRECTORY}, Code.CODE_INVALID_ARGUMENT),
            ("/" + "n" * 256, {}, Code.CODE_NAME_TOO_LONG),
        ]
        for path, fields, expected in cases:
            assert await meta.code("Create", path, **fields) == expected, (path, fields)
        await audit(meta)

    run(main())


def test_special_files_have_no_layout_and_devices_need_root() -> None:
    async def main() -> None:
        meta = await Meta.start(chains=[])
        await meta.do("Setattr", "/", mode=0o777)
        made = await meta.create("/fifo", type=pb.FILE_TYPE_FIFO, caller=user(4), open_write=True)
        assert not made.session
        assert not made.attr.HasField("layout")
        device = await meta.create("/dev", type=pb.FILE_TYPE_CHAR_DEVICE, rdev=0x103)
        assert device.attr.rdev == 0x103
        fields = {"type": pb.FILE_TYPE_BLOCK_DEVICE, "caller": user(4)}
        assert await meta.code("Create", "/b", **fields) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Create", "/fifo", type=pb.FILE_TYPE_FIFO) == Code.CODE_EXISTS

    run(main())


def test_files_need_chains() -> None:
    async def main() -> None:
        meta = await Meta.start(chains=[])
        assert await meta.code("Create", "/f") == Code.CODE_UNAVAILABLE
        await meta.mkdir("/d")

    run(main())


def test_set_gid_directory_passes_on_its_group() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.do("Setattr", "/d", mode=0o2777, gid=50)
        made = await meta.create("/d/f", caller=user(7))
        sub = await meta.mkdir("/d/s", caller=user(7))
        assert (made.attr.gid, made.attr.mode) == (50, 0o644)
        assert (sub.gid, sub.mode) == (50, 0o2755)
        stranger = await meta.create("/d/g", mode=0o2755, caller=user(7))
        assert stranger.attr.mode == 0o755

    run(main())


def test_directory_layout_is_inherited_and_a_requested_one_wins() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d", layout=pb.Layout(chunk_bytes=128 << 10, stripe=2))
        await meta.mkdir("/d/sub")
        made = await meta.create("/d/sub/f")
        assert (made.attr.layout.chunk_bytes, made.attr.layout.stripe) == (128 << 10, 2)
        other = await meta.create("/d/g", layout=pb.Layout(chunk_bytes=1 << 20, stripe=1))
        assert (other.attr.layout.chunk_bytes, other.attr.layout.stripe) == (1 << 20, 1)
        for bad in (pb.Layout(chunk_bytes=100_000), pb.Layout(stripe=5), pb.Layout(table_id=9)):
            assert await meta.code("Create", "/bad", layout=bad) == Code.CODE_INVALID_ARGUMENT

    run(main())


@pytest.mark.parametrize("exclusive", [True, False])
def test_of_many_concurrent_creators_of_a_name_one_creates(exclusive: bool) -> None:
    async def main() -> None:
        meta = await Meta.start()
        peer = await meta.peer()
        results = await asyncio.gather(
            *((meta, peer)[i % 2].do("Create", "/f", exclusive=exclusive) for i in range(20)), return_exceptions=True
        )
        made = [r for r in results if isinstance(r, pb.OpenResponse)]
        assert sum(r.created for r in made) == 1
        assert len(made) == (1 if exclusive else 20)
        assert len({r.attr.inode for r in made}) == 1
        await audit(meta)

    run(main())


def test_concurrent_creates_in_one_directory_do_not_conflict() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/warm")
        attempts = 0
        inner = meta.store.transaction

        def counted():
            nonlocal attempts
            attempts += 1
            return inner()

        meta.store.transaction = counted  # type: ignore[method-assign]
        await asyncio.gather(*(meta.create(f"/f{i}", open_write=True) for i in range(50)))
        assert attempts == 50
        await audit(meta)

    run(main())


def test_create_and_rmdir_of_the_parent_exclude_each_other() -> None:
    async def main() -> None:
        meta = await Meta.start()
        for i in range(30):
            await meta.mkdir(f"/d{i}")
            made, removed = await asyncio.gather(code(meta.do("Create", f"/d{i}/f")), code(meta.do("Rmdir", f"/d{i}")))
            assert (made, removed) in {(0, Code.CODE_NOT_EMPTY), (Code.CODE_NOT_FOUND, 0)}
            await audit(meta)

    run(main())


def test_a_file_without_a_name_lives_as_long_as_its_session() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        made = await meta.create("/d", mode=0o640, unnamed=True, open_write=True)
        assert (made.attr.nlink, made.attr.mode, await meta.names("/d")) == (0, 0o640, [])
        meta.chunks.write(made.attr, 5 * CHUNK)
        await audit(meta)
        report = pb.WriteReport(wrote=True, length=5 * CHUNK)
        await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
        await meta.collect()
        assert meta.chunks.chunks == {}
        await audit(meta)

    run(main())


def test_a_file_without_a_name_may_get_one_once_unless_it_is_exclusive() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("", unnamed=True, open_write=True)
        at = {"from": pb.PathAt(inode=made.attr.inode), "to": pb.PathAt(inode=1, path=b"f")}
        assert (await meta.do("Link", **at)).attr.nlink == 1
        await meta.do("Unlink", "/f")
        assert await meta.code("Link", **at) == Code.CODE_NOT_FOUND, "as any file that lost its last name"
        other = await meta.create("", unnamed=True, open_write=True, exclusive=True)
        at["from"] = pb.PathAt(inode=other.attr.inode)
        assert await meta.code("Link", **at) == Code.CODE_NOT_FOUND
        await audit(meta)

    run(main())


def test_a_file_without_a_name_that_was_closed_gets_none_while_it_waits_for_removal() -> None:
    async def main() -> None:
        meta = await Meta.start(gc_delay_ms=60_000)
        made = await meta.create("", unnamed=True, open_write=True)
        meta.chunks.write(made.attr, CHUNK)
        report = pb.WriteReport(wrote=True, length=CHUNK)
        await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
        assert len(await meta.rows(keys.GC)) == 1
        at = {"from": pb.PathAt(inode=made.attr.inode), "to": pb.PathAt(inode=1, path=b"f")}
        assert await meta.code("Link", **at) == Code.CODE_NOT_FOUND
        await audit(meta)

    run(main())


def test_a_file_without_a_name_needs_a_directory_that_may_be_written() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        await meta.mkdir("/d")
        unnamed = {"unnamed": True, "open_write": True}
        assert await meta.code("Create", "/f", **unnamed) == Code.CODE_NOT_DIRECTORY
        assert await meta.code("Create", "/none", **unnamed) == Code.CODE_NOT_FOUND
        assert await meta.code("Create", "/d", caller=user(5), **unnamed) == Code.CODE_ACCESS
        assert await meta.code("Create", "/d", unnamed=True) == Code.CODE_INVALID_ARGUMENT

    run(main())
