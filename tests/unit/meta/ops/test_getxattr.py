from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileType
from meta.harness import Meta, run, user


async def prepared() -> Meta:
    meta = await Meta.start()
    await meta.do("Setattr", "/", mode=0o777)
    await meta.create("/f", mode=0o640, caller=user(5, 6))
    for name in (b"user.a", b"trusted.a", b"security.a"):
        await meta.do("Setxattr", "/f", name=name, value=name + b" value")
    return meta


def test_values_are_read_with_the_permissions_of_linux() -> None:
    async def main() -> None:
        meta = await prepared()
        for name in (b"user.a", b"trusted.a", b"security.a"):
            assert (await meta.do("Getxattr", "/f", name=name)).value == name + b" value"
        assert (await meta.do("Getxattr", "/f", name=b"user.a", caller=user(9, 6))).value == b"user.a value"
        assert await meta.code("Getxattr", "/f", name=b"user.a", caller=user(9)) == Code.CODE_ACCESS
        assert await meta.code("Getxattr", "/f", name=b"trusted.a", caller=user(5)) == Code.CODE_NO_DATA
        assert (await meta.do("Getxattr", "/f", name=b"security.a", caller=user(9))).value == b"security.a value"

    run(main())


def test_what_is_not_there_is_no_data() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.create("/fifo", type=FileType.FILE_TYPE_FIFO)
        await meta.mkdir("/d")
        assert await meta.code("Getxattr", "/f", name=b"user.b") == Code.CODE_NO_DATA
        assert await meta.code("Getxattr", "/d", name=b"security.capability") == Code.CODE_NO_DATA
        assert await meta.code("Getxattr", "/fifo", name=b"user.a") == Code.CODE_NO_DATA
        assert await meta.code("Getxattr", "/f", name=b"system.nfs4_acl") == Code.CODE_NOT_SUPPORTED
        assert await meta.code("Getxattr", "/f", name=b"user." + b"n" * 251) == Code.CODE_OUT_OF_RANGE
        assert await meta.code("Getxattr", "/absent", name=b"user.a") == Code.CODE_NOT_FOUND

    run(main())


def test_symlinks_are_followed_when_asked_to() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.do("Symlink", "/s", target=b"f")
        await meta.do("Setxattr", "/s", name=b"trusted.a", value=b"the link's")
        assert (await meta.do("Getxattr", "/s", name=b"trusted.a")).value == b"the link's"
        assert (await meta.do("Getxattr", "/s", name=b"trusted.a", follow=True)).value == b"trusted.a value"

    run(main())
