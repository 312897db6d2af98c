from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run, user


def lookup(meta: Meta, parent: int, name: bytes, caller: pb.Caller | None = None):
    return meta.do("Lookup", parent=parent, name=name, **({"caller": caller} if caller else {}))


def test_lookup_finds_an_entry_and_does_not_follow_symlinks() -> None:
    async def main() -> None:
        meta = await Meta.start()
        directory = await meta.mkdir("/d")
        made = await meta.create("/d/f")
        await meta.do("Symlink", "/d/s", target=b"f")
        assert (await lookup(meta, directory.inode, b"f")).attr == made.attr
        assert (await lookup(meta, directory.inode, b"s")).attr.type == pb.FILE_TYPE_SYMLINK
        assert (await lookup(meta, directory.inode, b".")).attr.inode == directory.inode
        assert (await lookup(meta, directory.inode, b"..")).attr.inode == 1
        assert (await lookup(meta, 1, b"..")).attr.inode == 1

    run(main())


def test_lookup_refuses_what_is_not_one_component_and_what_is_not_there() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/private", mode=0o700)
        made = await meta.create("/f")
        private = (await meta.stat("/private")).inode
        cases = [
            ({"parent": 1, "name": b"x"}, Code.CODE_NOT_FOUND),
            ({"parent": 1, "name": b"a/b"}, Code.CODE_INVALID_ARGUMENT),
            ({"parent": 1, "name": b""}, Code.CODE_INVALID_ARGUMENT),
            ({"parent": 1, "name": b"a\0b"}, Code.CODE_INVALID_ARGUMENT),
            ({"parent": 1, "name": b"x" * 256}, Code.CODE_NAME_TOO_LONG),
            ({"parent": made.attr.inode, "name": b"x"}, Code.CODE_NOT_DIRECTORY),
            ({"parent": 999, "name": b"x"}, Code.CODE_STALE_HANDLE),
            ({"parent": private, "name": b"x", "caller": user(7)}, Code.CODE_ACCESS),
        ]
        for fields, expected in cases:
            assert await meta.code("Lookup", **fields) == expected, fields

    run(main())
