import asyncio

from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, audit, code, run, user


def test_rmdir_removes_only_empty_directories() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d/e", parents=True)
        await meta.create("/f")
        cases = [
            ("/d", Code.CODE_NOT_EMPTY),
            ("/d/e/..", Code.CODE_NOT_EMPTY),
            ("/d/.", Code.CODE_INVALID_ARGUMENT),
            ("/", Code.CODE_BUSY),
            ("/f", Code.CODE_NOT_DIRECTORY),
            ("/n", Code.CODE_NOT_FOUND),
        ]
        for path, expected in cases:
            assert await meta.code("Rmdir", path) == expected, path
        assert await meta.code("Rmdir", "/d/e", caller=user(4)) == Code.CODE_ACCESS
        await meta.do("Rmdir", "/d/e/")
        await meta.do("Rmdir", "/d")
        assert await meta.names() == [b"f"]
        await audit(meta)

    run(main())


def test_a_removed_directory_takes_no_entries() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.mkdir("/d")
        await meta.do("Rmdir", "/d")
        for name in ("Create", "Mkdir", "Symlink"):
            fields = {"target": b"x"} if name == "Symlink" else {}
            assert await meta.code(name, "f", inode=made.inode, **fields) == Code.CODE_STALE_HANDLE

    run(main())


def test_creation_by_handle_and_removal_exclude_each_other() -> None:
    async def main() -> None:
        meta = await Meta.start()
        for i in range(30):
            made = await meta.mkdir(f"/d{i}")
            # Who starts first commits first here, so both orders are tried.
            racers = [("created", meta.do("Mkdir", "sub", inode=made.inode)), ("removed", meta.do("Rmdir", f"/d{i}"))]
            racers = racers[:: 1 if i % 2 else -1]
            codes = await asyncio.gather(*(code(racer) for _, racer in racers))
            results = dict(zip([name for name, _ in racers], codes, strict=True))
            created, removed = results["created"], results["removed"]
            assert (created, removed) in {(0, Code.CODE_NOT_EMPTY), (Code.CODE_STALE_HANDLE, 0)}
            await audit(meta)

    run(main())
