from fs3.meta import keys
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import CHAINS, CHUNK, Meta, code, run, user


async def written(meta: Meta, length: int, path: str = "/f") -> pb.Attr:
    made = await meta.create(path, open_write=True)
    meta.chunks.write(made.attr, length)
    report = pb.WriteReport(wrote=True, length=length)
    return (await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)).attr


def test_shrinking_cuts_every_chunk_beyond_and_the_last_one() -> None:
    async def main() -> None:
        for length in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 6 * CHUNK + 100, 7 * CHUNK - 1):
            meta = await Meta.start()
            attr = await written(meta, 7 * CHUNK)
            after = (await meta.do("Truncate", "/f", length=length)).attr
            assert after.length == length
            assert after.truncate_version == attr.truncate_version + 1
            whole, rest = divmod(length, CHUNK)
            expected = dict.fromkeys(range(whole), CHUNK) | ({whole: rest} if rest else {})
            assert meta.chunks.of(attr.inode) == expected
            assert await meta.rows(keys.TRUNCATION) == []

    run(main())


def test_extending_is_only_a_length() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await written(meta, 100)
        assert (await meta.do("Truncate", "/f", length=1 << 40)).attr.length == 1 << 40
        assert meta.chunks.calls == []

    run(main())


def test_what_a_writer_has_not_reported_yet_is_cut_too() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        meta.chunks.write(made.attr, 5 * CHUNK)
        await meta.do("Truncate", "/f", length=2 * CHUNK + 7, session=made.session)
        assert meta.chunks.of(made.attr.inode) == {0: CHUNK, 1: CHUNK, 2: 7}
        await meta.do("Truncate", "/f", length=0)
        assert meta.chunks.of(made.attr.inode) == {}

    run(main())


def test_shrunk_and_extended_again_leaves_no_old_bytes() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = await written(meta, 4 * CHUNK)
        await meta.do("Truncate", "/f", length=4 * CHUNK + CHUNK // 2)
        await meta.do("Truncate", "/f", length=10)
        await meta.do("Truncate", "/f", length=4 * CHUNK)
        assert meta.chunks.of(attr.inode) == {0: 10}

    run(main())


def test_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/d")
        await meta.create("/fifo", type=pb.FILE_TYPE_FIFO)
        await written(meta, 10)
        made = await meta.do("Open", "/f", write=True)
        cases = [
            ("/d", {}, Code.CODE_IS_DIRECTORY),
            ("/fifo", {}, Code.CODE_INVALID_ARGUMENT),
            ("/n", {}, Code.CODE_NOT_FOUND),
            ("/f", {"caller": user(4)}, Code.CODE_ACCESS),
            ("/f", {"length": 1 << 63}, Code.CODE_FILE_TOO_LARGE),
            ("/f", {"caller": user(4), "session": made.session, "length": 3}, 0),
        ]
        for path, fields, expected in cases:
            assert await meta.code("Truncate", path, **fields) == expected, (path, fields)

    run(main())


def test_when_storage_fails_the_length_stands_and_the_cut_is_finished_by_the_next_operation() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = await written(meta, 4 * CHUNK)
        meta.chunks.down = set(CHAINS)
        request = meta.request("Truncate", "/f", length=10)
        ends_s = meta.clock.monotonic_ns() * 1e-9 + 0.3
        from meta.harness import BY_NAME

        assert await code(meta.engine.call(BY_NAME["Truncate"], request, ends_s=ends_s)) == Code.CODE_UNAVAILABLE
        assert (await meta.stat("/f")).length == 10
        assert len(await meta.rows(keys.TRUNCATION)) == 1
        meta.chunks.down = set()
        await meta.do("Open", "/f", write=True)
        assert meta.chunks.of(attr.inode) == {0: 10}
        assert await meta.rows(keys.TRUNCATION) == []
        again = (await meta.call("Truncate", request)).attr
        assert (again.length, again.truncate_version) == (10, 1)

    run(main())
