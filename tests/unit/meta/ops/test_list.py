import random

from fs3.meta import keys
from fs3.meta.ops import list as listing
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, run, user


async def everything(meta: Meta, path: str, limit: int, **fields):
    entries, after = [], b""
    while True:
        page = await meta.do("List", path, after=after, limit=limit, **fields)
        assert len(page.entries) <= limit
        entries += page.entries
        if page.end:
            return entries
        after = page.entries[-1].name


def test_pages_are_complete_and_in_byte_order() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        names = {bytes(random.Random(i).choices(range(1, 47), k=1 + i % 9)) + b"%d" % i for i in range(150)}
        for name in names:
            await meta.create(b"/d/" + name)
        for limit in (1, 7, 150, 151, 4096):
            assert [e.name for e in await everything(meta, "/d", limit)] == sorted(names)

    run(main())


def test_attributes_in_a_listing_are_those_of_stat() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.mkdir("/other")
        for i in range(90):
            await meta.create(f"/d/f{i:03}")
            await meta.create(f"/other/f{i:03}")
        await meta.mkdir("/d/sub")
        await meta.mkdir("/d/sub/x")
        await meta.do("Symlink", "/d/link", target=b"f001")
        await meta.rename("/other/f010", "/d/moved")
        await meta.link("/other/f011", "/d/hard")
        entries = await everything(meta, "/d", 4096, with_attr=True)
        assert len(entries) == 94
        for entry in entries:
            attr = await meta.stat(b"/d/" + entry.name, follow=False)
            assert entry.attr == attr
            assert entry.inode == attr.inode
            assert entry.type == attr.type
        await audit(meta)

    run(main())


def test_a_directory_of_files_made_in_it_is_a_few_range_reads() -> None:
    async def main() -> None:
        meta = await Meta.start()
        for name in ("/d", "/e"):
            await meta.mkdir(name)
        for i in range(500):
            await meta.create(f"/d/f{i}")
            await meta.create(f"/e/f{i}")
        inodes = sorted(e.inode for e in (await meta.do("List", "/d", limit=4096)).entries)
        assert len(list(listing.runs(inodes))) <= 2

    run(main())


def test_listing_needs_read_and_attributes_need_search_permission() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.create("/d/f")
        await meta.do("Setattr", "/d", mode=0o711)
        assert await meta.code("List", "/d", caller=user(3)) == Code.CODE_ACCESS
        await meta.do("Setattr", "/d", mode=0o744)
        entries = (await meta.do("List", "/d", with_attr=True, caller=user(3))).entries
        assert [e.name for e in entries] == [b"f"]
        assert not entries[0].HasField("attr")
        assert await meta.code("List", "/d/f") == Code.CODE_NOT_DIRECTORY

    run(main())


def test_a_page_of_long_symlinks_stays_below_the_frame_limit() -> None:
    async def main() -> None:
        meta = await Meta.start()
        for i in range(1200):
            await meta.do("Symlink", f"/{i:0250}", target=b"t" * 4095)
        page = await meta.do("List", "", limit=4096, with_attr=True)
        assert not page.end
        assert page.ByteSize() < 5 << 20
        assert len(await everything(meta, "", 4096, with_attr=True)) == 1200

    run(main())


def test_every_id_block_is_disjoint() -> None:
    seen = set()
    for number in range(200):
        seen.update(keys.piece_ids(number))
    assert len(seen) == 200 * keys.PIECE_IDS
    for number in range(20):
        block = keys.block_ids(number)
        assert len(block) == keys.BLOCK_IDS
        assert not seen & set(block)
        seen.update(block)
    assert all(keys.ROOT_INODE < ino < 1 << 63 for ino in seen)
