import asyncio

from fs3.meta import model
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, code, run


def test_links_share_the_inode_and_are_counted() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/a")
        await meta.mkdir("/d")
        assert (await meta.link("/a", "/d/b")).nlink == 2
        assert (await meta.stat("/d/b")).inode == made.attr.inode
        await meta.do("Unlink", "/a")
        assert (await meta.stat("/d/b")).nlink == 1
        await audit(meta)

    run(main())


def test_link_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.create("/a")
        assert await code(meta.link("/d", "/e")) == Code.CODE_NOT_PERMITTED
        assert await code(meta.link("/a", "/d")) == Code.CODE_EXISTS
        assert await code(meta.link("/n", "/e")) == Code.CODE_NOT_FOUND
        assert await code(meta.link("/a", "/n/e")) == Code.CODE_NOT_FOUND
        assert await code(meta.link("/a", "/e/")) == Code.CODE_NOT_FOUND

    run(main())


def test_an_inode_without_names_gets_none() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/a", open_write=True)
        await meta.do("Unlink", "/a")
        paths = {"from": pb.PathAt(inode=made.attr.inode), "to": pb.PathAt(inode=1, path=b"b")}
        assert await meta.code("Link", **paths) == Code.CODE_NOT_FOUND
        await audit(meta)

    run(main())


def test_too_many_links(monkeypatch) -> None:
    async def main() -> None:
        meta = await Meta.start()
        monkeypatch.setattr(model, "NLINK_MAX", 3)
        await meta.create("/a")
        await meta.link("/a", "/b")
        await meta.link("/a", "/c")
        assert await code(meta.link("/a", "/d")) == Code.CODE_TOO_MANY_LINKS

    run(main())


def test_concurrent_links_are_all_counted() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/a")
        await asyncio.gather(*(meta.link("/a", f"/l{i}") for i in range(10)))
        assert (await meta.stat("/a")).nlink == 11
        await audit(meta)

    run(main())
