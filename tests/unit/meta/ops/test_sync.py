from fs3.v1.meta_pb2 import WriteReport
from meta.harness import Meta, run


def test_sync_publishes_the_length_and_keeps_the_session() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        inode = made.attr.inode
        attr = (
            await meta.do("Sync", inode=inode, session=made.session, report=WriteReport(wrote=True, length=42))
        ).attr
        assert attr.length == 42
        assert (await meta.stat("/f")).length == 42
        assert await meta.has_session(inode)

    run(main())


def test_sync_without_a_report_only_answers() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f")
        assert (await meta.do("Sync", inode=made.attr.inode)).attr == made.attr

    run(main())
