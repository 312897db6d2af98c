from fs3.v1.frame_pb2 import Code
from meta.harness import CHAINS, CHUNK, Meta, audit, run, user


async def prepared() -> Meta:
    meta = await Meta.start()
    await meta.do("Setattr", "/", mode=0o777)
    await meta.create("/f", mode=0o644, caller=user(5, 6))
    return meta


def test_only_the_owner_and_root_change_mode() -> None:
    async def main() -> None:
        meta = await prepared()
        assert await meta.code("Setattr", "/f", mode=0o600, caller=user(7)) == Code.CODE_NOT_PERMITTED
        assert (await meta.do("Setattr", "/f", mode=0o4711, caller=user(5, 6))).attr.mode == 0o4711
        assert (await meta.do("Setattr", "/f", mode=0o102644)).attr.mode == 0o2644

    run(main())


def test_set_gid_is_dropped_by_who_is_not_of_the_group() -> None:
    async def main() -> None:
        meta = await prepared()
        assert (await meta.do("Setattr", "/f", mode=0o2755, caller=user(5, 9))).attr.mode == 0o755
        assert (await meta.do("Setattr", "/f", mode=0o2755, caller=user(5, 9, 6))).attr.mode == 0o2755

    run(main())


def test_owner_changes_follow_posix_and_clear_set_id_bits() -> None:
    async def main() -> None:
        meta = await prepared()
        owner = user(5, 6, 8)
        assert await meta.code("Setattr", "/f", uid=9, caller=owner) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Setattr", "/f", gid=9, caller=owner) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Setattr", "/f", gid=6, caller=user(9)) == Code.CODE_NOT_PERMITTED
        await meta.do("Setattr", "/f", mode=0o6755)
        attr = (await meta.do("Setattr", "/f", gid=8, caller=owner)).attr
        assert (attr.uid, attr.gid, attr.mode) == (5, 8, 0o755)
        attr = (await meta.do("Setattr", "/f", uid=1, gid=2)).attr
        assert (attr.uid, attr.gid) == (1, 2)

    run(main())


def test_explicit_times_need_the_owner_and_now_needs_write_permission() -> None:
    async def main() -> None:
        meta = await prepared()
        attr = (await meta.do("Setattr", "/f", atime_ns=-5, mtime_ns=123456789, caller=user(5))).attr
        assert (attr.atime_ns, attr.mtime_ns) == (-5, 123456789)
        assert attr.ctime_ns > 123456789
        assert attr == await meta.stat("/f")
        assert await meta.code("Setattr", "/f", mtime_ns=1, caller=user(7)) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Setattr", "/f", mtime_now=True, caller=user(7)) == Code.CODE_ACCESS
        await meta.do("Setattr", "/f", mode=0o666)
        assert await meta.code("Setattr", "/f", mtime_ns=1, caller=user(7)) == Code.CODE_NOT_PERMITTED
        attr = (await meta.do("Setattr", "/f", mtime_now=True, atime_now=True, caller=user(7))).attr
        assert attr.mtime_ns == attr.atime_ns == attr.ctime_ns

    run(main())


def test_directory_times_are_set_and_then_moved_by_entries() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.do("Setattr", "/d", mtime_ns=5, atime_ns=6)
        attr = await meta.stat("/d")
        assert (attr.mtime_ns, attr.atime_ns) == (5, 6)
        await meta.do("Setattr", "/d", mode=0o700)
        assert (await meta.stat("/d")).mtime_ns == 5
        await meta.create("/d/f")
        moved = await meta.stat("/d")
        assert moved.mtime_ns == moved.ctime_ns > 5
        assert moved.mode == 0o700

    run(main())


def test_nothing_to_change_changes_nothing() -> None:
    async def main() -> None:
        meta = await prepared()
        before = await meta.stat("/f")
        assert (await meta.do("Setattr", "/f", caller=user(99))).attr == before
        assert await meta.stat("/f") == before

    run(main())


def test_a_directory_passes_the_layout_that_was_set_on_to_what_is_made_in_it() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        before = (await meta.create("/d/before")).attr.layout
        await meta.do("Setattr", "/d", chunk_bytes=4 * CHUNK)
        await meta.do("Setattr", "/d", stripe=2)
        await meta.mkdir("/d/below")
        for path in ("/d/file", "/d/below/file"):
            layout = (await meta.create(path)).attr.layout
            assert (layout.chunk_bytes, layout.stripe) == (4 * CHUNK, 2)
        assert (await meta.stat("/d/before")).layout == before
        await meta.do("Setattr", "/d", chunk_bytes=0, stripe=0)
        layout = (await meta.create("/d/again")).attr.layout
        assert (layout.chunk_bytes, layout.stripe) == (CHUNK, len(CHAINS))

    run(main())


def test_only_owners_of_directories_set_layouts_and_only_possible_ones() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.mkdir("/d", caller=user(5, 6))
        assert await meta.code("Setattr", "/f", stripe=1) == Code.CODE_NOT_DIRECTORY
        assert await meta.code("Setattr", "/d", stripe=1, caller=user(7)) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Setattr", "/d", stripe=len(CHAINS) + 1) == Code.CODE_INVALID_ARGUMENT
        assert await meta.code("Setattr", "/d", chunk_bytes=CHUNK + 1) == Code.CODE_INVALID_ARGUMENT
        await meta.do("Setattr", "/d", stripe=1, caller=user(5, 6))

    run(main())


def test_a_new_owner_takes_capabilities_away() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.do("Setxattr", "/f", name=b"security.capability", value=bytes(20))
        await meta.do("Setattr", "/f", mode=0o700)
        assert (await meta.do("Getxattr", "/f", name=b"security.capability")).value == bytes(20)
        await meta.do("Setattr", "/f", uid=9)
        assert await meta.code("Getxattr", "/f", name=b"security.capability") == Code.CODE_NO_DATA
        await audit(meta)

    run(main())
