from fs3.meta.ops.accessed import DAY_NS, ITEMS_MAX
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run, user


async def accessed(meta: Meta, *times: tuple[int, int], caller: pb.Caller | None = None) -> None:
    inodes, atime_ns = [inode for inode, _ in times], [at for _, at in times]
    await meta.do("Accessed", inodes=inodes, atime_ns=atime_ns, **({"caller": caller} if caller else {}))


def test_the_first_read_after_a_change_sets_the_time_and_one_a_day_later() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = (await meta.create("/f")).attr
        first = attr.ctime_ns + 10
        await accessed(meta, (attr.inode, first))
        assert (await meta.stat("/f")).atime_ns == first
        await accessed(meta, (attr.inode, first + 5))
        after = await meta.stat("/f")
        assert (after.atime_ns, after.mtime_ns, after.ctime_ns) == (first, attr.mtime_ns, attr.ctime_ns)
        await accessed(meta, (attr.inode, first + DAY_NS))
        assert (await meta.stat("/f")).atime_ns == first + DAY_NS

    run(main())


def test_a_time_set_by_hand_after_the_read_stays() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = (await meta.create("/f")).attr
        await meta.do("Setattr", "/f", atime_ns=7, mtime_ns=9)
        await accessed(meta, (attr.inode, attr.ctime_ns))
        assert (await meta.stat("/f")).atime_ns == 7

    run(main())


def test_what_is_gone_or_forbidden_or_no_file_is_passed_over() -> None:
    async def main() -> None:
        meta = await Meta.start()
        secret = (await meta.create("/secret", mode=0o600)).attr
        plain = (await meta.create("/plain", mode=0o644)).attr
        directory = (await meta.do("Mkdir", "/d", mode=0o755)).attr
        later = max(plain.ctime_ns, directory.ctime_ns) + 10
        times = [(inode, later) for inode in (secret.inode, 999_999, directory.inode, plain.inode)]
        await accessed(meta, *times, caller=user(5))
        assert (await meta.stat("/plain")).atime_ns == later
        assert (await meta.stat("/secret")).atime_ns == secret.atime_ns
        assert (await meta.stat("/d")).atime_ns == directory.atime_ns

    run(main())


def test_a_request_is_bounded() -> None:
    async def main() -> None:
        meta = await Meta.start()
        assert await meta.code("Accessed", inodes=[2], atime_ns=[]) == Code.CODE_INVALID_ARGUMENT
        many = list(range(2, ITEMS_MAX + 3))
        assert await meta.code("Accessed", inodes=many, atime_ns=many) == Code.CODE_INVALID_ARGUMENT

    run(main())
