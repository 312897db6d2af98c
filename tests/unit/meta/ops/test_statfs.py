from meta.harness import CHUNK, Meta, run


def test_space_is_divided_by_replicas_and_inodes_are_counted() -> None:
    async def main() -> None:
        meta = await Meta.start()
        peer = await meta.peer()
        await meta.mkdir("/d")
        await peer.create("/d/f")
        stats = await meta.do("Statfs", "")
        assert stats.capacity_bytes == 3 << 30
        assert stats.free_bytes == 3 << 29
        assert stats.inodes == 3
        assert stats.chunk_bytes == CHUNK
        assert stats.name_bytes_max == 255
        await meta.do("Unlink", "/d/f")
        assert (await peer.do("Statfs", "")).inodes == 2

    run(main())
