import asyncio

import pytest

from fs3.meta import keys, xattrs
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileType
from meta.harness import ROOT, Meta, audit, faults, memory_of, run, user

CAPABILITY = b"security.capability"


async def put(meta: Meta, path: str, name: bytes, value: bytes = b"v", caller: pb.Caller = ROOT, **fields: bool) -> int:
    """The error code, 0 if it succeeds."""
    return await meta.code("Setxattr", path, name=name, value=value, caller=caller, **fields)


async def value_of(meta: Meta, path: str, name: bytes) -> bytes:
    value: bytes = (await meta.do("Getxattr", path, name=name)).value
    return value


async def prepared() -> Meta:
    meta = await Meta.start()
    await meta.do("Setattr", "/", mode=0o777)
    await meta.create("/f", mode=0o644, caller=user(5))
    await meta.mkdir("/d", mode=0o755, caller=user(5))
    return meta


@pytest.mark.parametrize("path", ["/f", "/d", "/"])
def test_attributes_are_set_replaced_and_change_ctime_alone(path: str) -> None:
    async def main() -> None:
        meta = await prepared()
        before = await meta.stat(path)
        attr = (await meta.do("Setxattr", path, name=b"user.a", value=b"1")).attr
        assert attr == await meta.stat(path)
        assert attr.ctime_ns > before.ctime_ns
        assert (attr.mtime_ns, attr.nlink, attr.mode) == (before.mtime_ns, before.nlink, before.mode)
        assert attr.xattrs == pb.XATTR_BIT_ANY
        await meta.do("Setxattr", path, name=b"user.a", value=b"")
        assert await value_of(meta, path, b"user.a") == b""
        await audit(meta)

    run(main())


def test_create_and_replace_say_what_has_to_be_there() -> None:
    async def main() -> None:
        meta = await prepared()
        assert await put(meta, "/f", b"user.a", replace=True) == Code.CODE_NO_DATA
        assert await put(meta, "/f", b"user.a", create=True) == 0
        assert await put(meta, "/f", b"user.a", create=True) == Code.CODE_EXISTS
        assert await put(meta, "/f", b"user.a", b"new", replace=True) == 0
        assert await value_of(meta, "/f", b"user.a") == b"new"

    run(main())


def test_names_and_values_have_the_limits_of_linux() -> None:
    async def main() -> None:
        meta = await prepared()
        assert await put(meta, "/f", b"") == Code.CODE_OUT_OF_RANGE
        assert await put(meta, "/f", b"user." + b"n" * 251) == Code.CODE_OUT_OF_RANGE
        assert await put(meta, "/f", b"user." + b"n" * 250) == 0
        assert await put(meta, "/f", b"user.") == Code.CODE_INVALID_ARGUMENT
        for name in (b"plain", b"system.nfs4_acl", b"users.x"):
            assert await put(meta, "/f", name) == Code.CODE_NOT_SUPPORTED
        assert await put(meta, "/f", b"user.v", bytes(65537)) == Code.CODE_TOO_LARGE
        assert await put(meta, "/f", b"user.v", bytes(65536)) == 0
        assert await put(meta, "/f", CAPABILITY, b"short") == Code.CODE_INVALID_ARGUMENT

    run(main())


def test_all_attributes_of_an_inode_are_bounded() -> None:
    async def main() -> None:
        meta = await prepared()
        for i in range(15):
            assert await put(meta, "/f", b"user.%02d" % i, bytes(65536)) == 0
        assert await put(meta, "/f", b"user.last", bytes(65536)) == Code.CODE_NO_SPACE
        assert await put(meta, "/f", b"user.00", b"small") == 0
        assert await put(meta, "/f", b"user.last", bytes(65536)) == 0
        for i in range(xattrs.LIST_BYTES_MAX // 256):
            assert await put(meta, "/d", b"user.%0250d" % i, b"") == 0
        assert await put(meta, "/d", b"user.more", b"") == Code.CODE_NO_SPACE
        await audit(meta)

    run(main())


def test_user_attributes_need_write_permission() -> None:
    async def main() -> None:
        meta = await prepared()
        assert await put(meta, "/f", b"user.a", caller=user(5)) == 0
        assert await put(meta, "/f", b"user.a", caller=user(7)) == Code.CODE_ACCESS
        await meta.do("Setattr", "/f", mode=0o646)
        assert await put(meta, "/f", b"user.a", caller=user(7)) == 0

    run(main())


def test_in_a_sticky_directory_only_the_owner_sets_user_attributes() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.do("Setattr", "/d", mode=0o1777)
        assert await put(meta, "/d", b"user.a", caller=user(7)) == Code.CODE_NOT_PERMITTED
        assert await put(meta, "/d", b"user.a", caller=user(5)) == 0
        await meta.do("Setattr", "/d", mode=0o777)
        assert await put(meta, "/d", b"user.a", caller=user(7)) == 0

    run(main())


def test_only_files_and_directories_have_user_attributes() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.do("Symlink", "/s", target=b"nowhere")
        await meta.create("/fifo", type=FileType.FILE_TYPE_FIFO)
        for path in ("/s", "/fifo"):
            assert await put(meta, path, b"user.a") == Code.CODE_NOT_PERMITTED
            assert await put(meta, path, b"trusted.a") == 0

    run(main())


def test_trusted_and_security_attributes_are_roots() -> None:
    async def main() -> None:
        meta = await prepared()
        for name in (b"trusted.a", b"security.selinux", CAPABILITY):
            assert await put(meta, "/f", name, bytes(20), caller=user(5)) == Code.CODE_NOT_PERMITTED
            assert await put(meta, "/f", name, bytes(20)) == 0
        assert (await meta.stat("/f")).xattrs == pb.XATTR_BIT_ANY | pb.XATTR_BIT_CAPABILITY

    run(main())


@pytest.mark.parametrize("change", ["write", "truncate", "open"])
def test_capabilities_do_not_survive_a_change_of_the_content(change: str) -> None:
    async def main() -> None:
        meta = await prepared()
        opened = await meta.do("Open", "/f", write=True)
        await put(meta, "/f", b"user.a")
        await put(meta, "/f", CAPABILITY, bytes(20))
        handle = {"inode": opened.attr.inode, "session": opened.session}
        await meta.do("Sync", **handle, report=pb.WriteReport())
        assert await value_of(meta, "/f", CAPABILITY) == bytes(20)
        if change == "write":
            await meta.do("Sync", **handle, report=pb.WriteReport(wrote=True, length=1))
        elif change == "truncate":
            await meta.do("Truncate", "/f", length=7)
        else:
            await meta.do("Open", "/f", write=True, truncate=True)
        assert await meta.code("Getxattr", "/f", name=CAPABILITY) == Code.CODE_NO_DATA
        assert (await meta.stat("/f")).xattrs == pb.XATTR_BIT_ANY
        await audit(meta)

    run(main())


def test_attributes_go_with_the_inode() -> None:
    async def main() -> None:
        meta = await prepared()
        await meta.mkdir("/tree/d", parents=True)
        await meta.create("/tree/f")
        for path in ("/f", "/d", "/tree", "/tree/d", "/tree/f"):
            await put(meta, path, b"user.a")
            await put(meta, path, b"trusted.b")
        await meta.do("Unlink", "/f")
        await meta.do("Rmdir", "/d")
        await meta.do("RemoveAll", "/tree")
        await meta.collect()
        assert await meta.rows(keys.XATTR) == []
        await audit(meta)

    run(main())


def test_concurrent_changes_under_faults_keep_the_counts_right() -> None:
    async def main(seed: int) -> None:
        meta = await prepared()
        peer = await meta.peer()
        store = memory_of(meta)
        store.faults = faults(seed)
        for round_ in range(5):
            calls = []
            for i in range(12):
                server, path, name = (meta, peer)[i % 2], ("/f", "/d")[i % 3 == 0], b"user.%d" % (i % 4)
                if (i + round_) % 5 == 0:
                    calls.append(server.code("Removexattr", path, name=name))
                else:
                    calls.append(server.code("Setxattr", path, name=name, value=bytes(i)))
            await asyncio.gather(*calls)
        store.faults = None
        await audit(meta)

    for seed in range(4):
        run(main(seed))
