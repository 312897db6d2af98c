from fs3.meta import keys
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, run, user


def test_a_removed_attribute_is_gone_and_the_inode_says_so() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f")
        for name in (b"user.a", b"security.capability"):
            before = (await meta.do("Setxattr", "/f", name=name, value=bytes(24))).attr
            attr = (await meta.do("Removexattr", "/f", name=name)).attr
            assert attr == await meta.stat("/f")
            assert attr.ctime_ns > before.ctime_ns
            assert attr.xattrs == 0
            assert await meta.code("Removexattr", "/f", name=name) == Code.CODE_NO_DATA
        assert await meta.rows(keys.XATTR) == []
        await audit(meta)

    run(main())


def test_removing_needs_the_permission_to_set() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.create("/f", mode=0o644)
        for name in (b"user.a", b"trusted.a"):
            await meta.do("Setxattr", "/f", name=name, value=b"")
        assert await meta.code("Removexattr", "/f", name=b"user.a", caller=user(5)) == Code.CODE_ACCESS
        assert await meta.code("Removexattr", "/f", name=b"trusted.a", caller=user(5)) == Code.CODE_NOT_PERMITTED
        assert await meta.code("Removexattr", "/f", name=b"system.a") == Code.CODE_NOT_SUPPORTED

    run(main())
