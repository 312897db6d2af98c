from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, run


def test_symlink_keeps_its_target_as_it_is() -> None:
    async def main() -> None:
        meta = await Meta.start()
        target = b"..//x/\xff./"
        made = (await meta.do("Symlink", "/s", target=target)).attr
        assert (made.symlink_target, made.length, made.mode) == (target, len(target), 0o777)
        assert made == await meta.stat("/s", follow=False)
        await audit(meta)

    run(main())


def test_symlink_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        assert await meta.code("Symlink", "/d", target=b"x") == Code.CODE_EXISTS
        assert await meta.code("Symlink", "/s", target=b"") == Code.CODE_NOT_FOUND
        assert await meta.code("Symlink", "/s", target=b"t" * 4096) == Code.CODE_NAME_TOO_LONG
        assert await meta.code("Symlink", "/s", target=b"a\0") == Code.CODE_INVALID_ARGUMENT
        assert await meta.code("Symlink", "/s/", target=b"x") == Code.CODE_NOT_FOUND

    run(main())
