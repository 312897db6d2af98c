import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from fs3.core.errors import Fs3Error
from fs3.kv.api import KvStore
from fs3.kv.fdb import FdbKv
from fs3.kv.lmdb import LmdbKv
from fs3.kv.memory import MemoryKv
from fs3.meta import keys, model
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.faulty import FaultyStore
from meta.harness import BY_NAME, CHAINS, CHUNK, Meta, audit, code, faults, run, user
from tests.conformance.kv.fake_fdb import FakeFdb

MIB = 1 << 20


def new_store(engine: str, directory: Path) -> KvStore:
    match engine:
        case "lmdb":
            return LmdbKv(directory, durable=False)
        case "fdb-fake":
            return FdbKv(os.devnull, binding=FakeFdb(MemoryKv()))
        case _:
            return MemoryKv()


async def append(meta: Meta, made: pb.OpenResponse, count: int, **fields) -> pb.AppendResponse:
    return await meta.do("Append", inode=made.attr.inode, session=made.session, bytes=count, **fields)


async def answered(call: Callable[[], Awaitable[pb.AppendResponse]]) -> pb.AppendResponse:
    while True:
        try:
            return await call()
        except Fs3Error as exc:
            if not exc.retryable:
                raise


def wrote(length: int, truncate_version: int = 0) -> pb.WriteReport:
    return pb.WriteReport(wrote=True, length=length, truncate_version=truncate_version)


def test_every_append_gets_bytes_of_its_own_and_the_length_follows_the_reports() -> None:
    async def main() -> None:
        meta = await Meta.start()
        a = await meta.create("/f", open_write=True)
        b = await meta.do("Open", "/f", write=True)
        first, second = await append(meta, a, 100), await append(meta, b, 7)
        assert (first.offset, second.offset, first.attr.length) == (0, 100, 0)
        assert (await meta.stat("/f")).length == 0
        # What was written to positions counts before the next append is placed.
        third = await append(meta, b, 1, report=wrote(5000))
        assert (third.offset, third.attr.length) == (5000, 5000)
        await meta.do("Sync", inode=a.attr.inode, session=a.session, report=wrote(100))
        assert (await meta.stat("/f")).length == 5000
        await meta.do("Close", inode=b.attr.inode, session=b.session, report=wrote(5001))
        assert (await append(meta, a, 9)).offset == (await meta.stat("/f")).length == 5001

    run(main())


@pytest.mark.parametrize("engine", ["memory", "lmdb", "fdb-fake"])
def test_appends_through_several_services_over_a_failing_store_never_overlap(engine: str, tmp_path: Path) -> None:
    async def main() -> None:
        faulty = FaultyStore(new_store(engine, tmp_path))
        meta = await Meta.start(store=faulty)
        servers = [meta, await meta.peer(2), await meta.peer(3)]
        rng = random.Random(4)
        made = await meta.create("/f", open_write=True)
        faulty.faults = faults(5)

        async def writer(size: int) -> list[range]:
            places: list[range] = []
            while len(places) < 12:
                request = meta.request("Append", inode=made.attr.inode, session=made.session, bytes=size)
                answer = await answered(lambda sent=request: rng.choice(servers).call("Append", sent))
                assert await rng.choice(servers).call("Append", request) == answer
                places.append(range(answer.offset, answer.offset + size))
            return places

        async with asyncio.timeout(60):
            found = await asyncio.gather(*(writer(size) for size in (1, 33, 100, 4097)))
        for places in found:
            assert places == sorted(places, key=lambda place: place.start), "a writer's appends keep their order"
        ends = 0
        for place in sorted((place for places in found for place in places), key=lambda place: place.start):
            assert place.start == ends, "nothing is left out either"
            ends = place.stop
        faulty.faults = None
        await audit(meta)
        await faulty.close()

    run(main())


def test_an_append_after_a_truncation_goes_to_the_new_end() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        await append(meta, made, 3 * CHUNK)
        meta.chunks.write(made.attr, 3 * CHUNK)
        version = (await meta.do("Truncate", "/f", length=10)).attr.truncate_version
        assert meta.chunks.of(made.attr.inode) == {0: 10}
        # A report from before it counts as far as storage has the bytes.
        answer = await append(meta, made, 5, report=wrote(3 * CHUNK))
        assert (answer.offset, answer.attr.truncate_version) == (10, version)
        assert (await append(meta, made, 5)).offset == 15

    run(main())


def test_a_place_is_given_only_after_a_pending_cut() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        meta.chunks.write(made.attr, 4 * CHUNK)
        meta.chunks.down = set(CHAINS)
        ends_s = meta.clock.monotonic_ns() * 1e-9 + 0.3
        cut = meta.engine.call(BY_NAME["Truncate"], meta.request("Truncate", "/f", length=10), ends_s=ends_s)
        assert await code(cut) == Code.CODE_UNAVAILABLE
        meta.chunks.down = set()
        assert (await append(meta, made, CHUNK)).offset == 10
        assert meta.chunks.of(made.attr.inode) == {0: 10}
        assert await meta.rows(keys.TRUNCATION) == []

    run(main())


def test_what_was_reserved_and_never_reported_goes_with_the_file() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        await append(meta, made, 5 * CHUNK)
        meta.chunks.write(made.attr, 5 * CHUNK)
        await meta.do("Close", inode=made.attr.inode, session=made.session)
        assert (await meta.stat("/f")).length == 0
        await meta.do("Unlink", "/f")
        await meta.collect()
        assert meta.chunks.of(made.attr.inode) == {}

    run(main())


def test_a_quota_refuses_a_place_and_counts_what_is_written() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/q")
        await meta.set_quota("/q", bytes_max=10 * MIB)
        await meta.settle_quotas()
        made = await meta.create("/q/f", open_write=True)
        answer = await append(meta, made, 9 * MIB)
        assert (answer.offset, answer.length_limit) == (0, 9 * MIB)
        request = {"inode": made.attr.inode, "session": made.session}
        assert await meta.code("Append", **request, bytes=2 * MIB) == Code.CODE_QUOTA_EXCEEDED
        assert (await append(meta, made, MIB, report=wrote(9 * MIB))).offset == 9 * MIB
        assert await meta.code("Append", **request, bytes=1) == Code.CODE_QUOTA_EXCEEDED
        await audit(meta)

    run(main())


def test_refusals() -> None:
    async def main() -> None:
        meta = await Meta.start()
        directory = await meta.mkdir("/d")
        made = await meta.create("/f", open_write=True)
        inode, session = made.attr.inode, made.session
        cases = [
            ({"inode": directory.inode, "bytes": 1}, Code.CODE_INVALID_ARGUMENT),
            ({"inode": inode, "session": session}, Code.CODE_INVALID_ARGUMENT),
            ({"inode": inode, "session": session, "bytes": 1 << 63}, Code.CODE_FILE_TOO_LARGE),
            ({"inode": inode, "session": session, "bytes": CHUNK << 32}, Code.CODE_FILE_TOO_LARGE),
            ({"inode": 1 << 40, "bytes": 1}, Code.CODE_STALE_HANDLE),
            ({"inode": inode, "session": bytes(16), "bytes": 1, "caller": user(5)}, Code.CODE_STALE_HANDLE),
            ({"inode": inode, "session": session, "bytes": 1, "caller": user(5)}, 0),
        ]
        for fields, expected in cases:
            assert await meta.code("Append", **fields) == expected, fields

    run(main())


def test_a_writer_whose_session_was_reaped_may_go_on_while_the_file_has_a_name() -> None:
    async def main() -> None:
        meta = await Meta.start()
        made = await meta.create("/f", open_write=True)
        other = await meta.do("Open", "/f", write=True)
        await meta.do("Close", inode=made.attr.inode, session=made.session)
        assert (await append(meta, made, 5)).offset == 0
        record = model.decode_inode(dict(await meta.rows(keys.INODE))[keys.inode(made.attr.inode)])
        assert record.loose, "its chunks are looked for everywhere"
        await meta.do("Unlink", "/f")
        assert await meta.code("Append", inode=made.attr.inode, session=made.session, bytes=1) == Code.CODE_STALE_HANDLE
        assert (await append(meta, other, 5)).offset == 5

    run(main())
