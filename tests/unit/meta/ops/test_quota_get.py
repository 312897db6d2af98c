from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run, user


def test_the_innermost_comes_first_and_paths_follow_renames() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/a/b", mode=0o755, parents=True)
        await meta.set_quota("/a", bytes_max=100)
        await meta.set_quota("/a/b", inodes_max=5)
        await meta.settle_quotas()
        await meta.rename("/a/b", "/a/c")
        await meta.create("/a/c/f")
        answer = await meta.do("QuotaGet", "/a/c/f")
        assert answer.inode == (await meta.stat("/a/c/f")).inode
        inner, outer = answer.quotas
        assert (inner.path, inner.inodes, inner.inodes_max) == (b"/a/c", 2, 5)
        assert not inner.HasField("bytes_max")
        assert (outer.path, outer.inodes, outer.bytes_max) == (b"/a", 3, 100)
        assert inner.directory == (await meta.stat("/a/c")).inode

    run(main())


def test_without_a_quota_there_is_none() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/a", mode=0o700)
        await meta.mkdir("/a/b")
        assert await meta.quotas("/a") == []
        assert await meta.code("QuotaGet", "/n") == Code.CODE_NOT_FOUND
        assert await meta.code("QuotaGet", "/a/b", caller=user(7)) == Code.CODE_ACCESS
        assert await meta.code("QuotaGet", "/a", caller=user(7)) == 0

    run(main())


def test_a_removed_directory_takes_its_quota_along() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/a/b", mode=0o755, parents=True)
        await meta.set_quota("/a")
        inner = await meta.set_quota("/a/b")
        await meta.settle_quotas()
        await meta.do("Rmdir", "/a/b")
        await meta.settle_quotas()
        assert [quota.path for quota in await meta.quotas("/a")] == [b"/a"]
        listed = (await meta.do("QuotaList")).quotas
        assert inner.id not in [quota.id for quota in listed]
        assert [quota.state for quota in listed] == [pb.QUOTA_STATE_ACTIVE]

    run(main())
