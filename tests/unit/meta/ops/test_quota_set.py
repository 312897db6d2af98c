from fs3.meta import keys, quotas
from fs3.meta.ops.quota_set import NO_LIMIT
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, faults, memory_of, run, user


def test_what_is_there_is_counted_before_the_quota_is_enforced() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/a/b", mode=0o755, parents=True)
        await meta.write("/a/f", 100)
        await meta.write("/a/b/g", 20)
        made = await meta.set_quota("/a", bytes_max=10, inodes_max=2)
        assert (made.state, made.bytes, made.inodes, made.path) == (pb.QUOTA_STATE_COUNTING, 0, 1, b"/a")
        await meta.create("/a/while-counting")
        await meta.settle_quotas()
        (quota,) = await meta.quotas("/a/b/g")
        assert (quota.state, quota.bytes, quota.inodes) == (pb.QUOTA_STATE_ACTIVE, 120, 5)
        assert await meta.code("Create", "/a/enforced") == Code.CODE_QUOTA_EXCEEDED
        assert await meta.rows(keys.QUOTA_WALK) == []
        await audit(meta)

    run(main())


def test_limits_change_one_by_one_and_go() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/a")
        first = await meta.set_quota("/a", bytes_max=10, inodes_max=2)
        second = await meta.set_quota("/a", inodes_max=7)
        assert (second.id, second.bytes_max, second.inodes_max) == (first.id, 10, 7)
        third = await meta.set_quota("/a", bytes_max=NO_LIMIT)
        assert not third.HasField("bytes_max")
        assert third.inodes_max == 7
        assert len(await meta.rows(keys.QUOTA)) == 1

    run(main())


def test_a_cleared_quota_leaves_nothing_and_enforces_nothing() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/a/b", mode=0o755, parents=True)
        await meta.set_quota("/a", inodes_max=2)
        await meta.settle_quotas()
        assert await meta.code("Create", "/a/b/f") == Code.CODE_QUOTA_EXCEEDED
        assert not (await meta.do("QuotaSet", "/a", clear=True)).HasField("quota")
        await meta.create("/a/b/f")
        await meta.settle_quotas()
        assert await meta.quotas("/a/b/f") == []
        for table in (keys.QUOTA, keys.QUOTA_COUNTER, keys.QUOTA_WALK):
            assert await meta.rows(table) == []
        assert await meta.code("QuotaSet", "/a", clear=True) == Code.CODE_NOT_FOUND
        await audit(meta)

    run(main())


def test_an_outer_quota_counts_what_inner_ones_had_counted_before_it() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/a/b/c", mode=0o755, parents=True)
        await meta.write("/a/b/c/f", 1000)
        await meta.set_quota("/a/b/c")
        await meta.settle_quotas()
        await meta.set_quota("/a")
        await meta.settle_quotas()
        assert [(q.path, q.inodes, q.bytes) for q in await meta.quotas("/a/b/c/f")] == [
            (b"/a/b/c", 2, 1000),
            (b"/a", 4, 1000),
        ]
        await meta.set_quota("/a/b")
        await meta.settle_quotas()
        assert [(q.inodes, q.bytes) for q in await meta.quotas("/a/b/c/f")] == [(2, 1000), (3, 1000), (4, 1000)]
        await meta.do("QuotaSet", "/a/b", clear=True)
        await meta.settle_quotas()
        assert [(q.inodes, q.bytes) for q in await meta.quotas("/a/b/c/f")] == [(2, 1000), (4, 1000)]
        await meta.do("QuotaSet", "/a/b/c", clear=True)
        await meta.settle_quotas()
        assert [(q.inodes, q.bytes) for q in await meta.quotas("/a/b/c/f")] == [(4, 1000)]
        await audit(meta)

    run(main())


def test_inner_quotas_grow_while_an_outer_one_takes_them_over() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/a/b", mode=0o755, parents=True)
        await meta.write("/a/b/f", 10)
        await meta.set_quota("/a/b")
        await meta.settle_quotas()
        # Two outer ones one after the other, before the counters have followed the first.
        await meta.set_quota("/a")
        await meta.engine.quota_walker._round(settling=False)
        await meta.write("/a/b/g", 200)
        await meta.do("QuotaSet", "/a", clear=True)
        await meta.set_quota("/a")
        await meta.write("/a/b/h", 3000)
        await meta.engine.quota_walker._round(settling=False)
        await meta.do("Unlink", "/a/b/f")
        await meta.settle_quotas()
        assert [(q.inodes, q.bytes) for q in await meta.quotas("/a/b")] == [(3, 3200), (4, 3200)]
        assert len(await meta.rows(keys.QUOTA)) == 2
        await audit(meta)

    run(main())


def test_a_quota_set_again_at_once_counts_everything() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/a/b/c", mode=0o755, parents=True)
        await meta.write("/a/b/c/f", 5)
        await meta.set_quota("/a")
        await meta.settle_quotas()
        await meta.do("QuotaSet", "/a", clear=True)
        await meta.set_quota("/a")
        await meta.settle_quotas()
        assert await meta.used("/a/b/c/f") == (4, 5)
        assert len(await meta.rows(keys.QUOTA)) == 1
        await audit(meta)

    run(main())


def test_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        await meta.mkdir("/d")
        assert await meta.code("QuotaSet", "/d", caller=user(7)) == Code.CODE_NOT_PERMITTED
        assert await meta.code("QuotaSet", "/f") == Code.CODE_NOT_DIRECTORY
        assert await meta.code("QuotaSet", "/n") == Code.CODE_NOT_FOUND
        path = ""
        for _ in range(quotas.DEPTH_MAX):
            path += "/x"
            await meta.mkdir(path)
            await meta.set_quota(path)
        await meta.mkdir(path + "/x")
        assert await meta.code("QuotaSet", path + "/x") == Code.CODE_INVALID_ARGUMENT

    run(main())


def test_a_quota_of_the_root_counts_everything() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.write("/f", 7)
        await meta.set_quota("/", inodes_max=3)
        await meta.settle_quotas()
        (quota,) = await meta.quotas("/f")
        assert (quota.path, quota.inodes, quota.bytes) == (b"/", 2, 7)
        await meta.mkdir("/d")
        assert await meta.code("Mkdir", "/e", mode=0o755) == Code.CODE_QUOTA_EXCEEDED

    run(main())


def test_every_inode_is_counted_once_under_faults() -> None:
    for seed in range(20):

        async def main(seed: int = seed) -> None:
            meta = await Meta.start(seed=seed)
            store = memory_of(meta)
            await meta.do("Mkdir", "/a/b", mode=0o755, parents=True)
            for i in range(10):
                await meta.write(f"/a/f{i}", 10)
            store.faults = faults(seed)
            await meta.set_quota("/a/b")
            await meta.set_quota("/a")
            await meta.settle_quotas()
            await meta.write("/a/b/g", 10)
            await meta.do("QuotaSet", "/a/b", clear=True)
            await meta.settle_quotas()
            store.faults = None
            await meta.settle_quotas()
            assert await meta.used("/a/b/g") == (13, 110)
            await audit(meta)

        run(main())
