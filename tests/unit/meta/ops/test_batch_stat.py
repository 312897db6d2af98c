from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run


def test_every_path_gets_its_own_answer_in_order() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        made = await meta.create("/d/f")
        at = [pb.PathAt(inode=1, path=path) for path in (b"d/f", b"nope", b"d", b"d/f/x")]
        items = (await meta.do("BatchStat", **{"at": at})).items
        assert [item.code for item in items] == [0, Code.CODE_NOT_FOUND, 0, Code.CODE_NOT_DIRECTORY]
        assert items[0].attr == made.attr
        assert items[2].attr.nlink == 2

    run(main())


def test_too_many_paths_are_refused() -> None:
    async def main() -> None:
        meta = await Meta.start()
        at = [pb.PathAt(inode=1)] * 4097
        assert await meta.code("BatchStat", at=at) == Code.CODE_INVALID_ARGUMENT

    run(main())
