"""A retry of a mutating operation gets the first answer, whatever has happened in between and whoever serves it."""

import asyncio
import random

import pytest

from fs3.core.clock import VirtualClock
from fs3.meta import keys
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import BY_NAME, CHAINS, CHUNK, Meta, audit, code, faults, memory_of, run


async def prepared(**options) -> tuple[Meta, pb.OpenResponse]:
    meta = await Meta.start(**options)
    await meta.set_quota("/", bytes_max=1 << 30)
    await meta.settle_quotas()
    await meta.mkdir("/d/sub", parents=True)
    await meta.mkdir("/empty")
    made = await meta.create("/f", open_write=True)
    meta.chunks.write(made.attr, 3 * CHUNK)
    await meta.do("Sync", inode=made.attr.inode, session=made.session, report=pb.WriteReport(wrote=True, length=200))
    await meta.do("Setxattr", "/f", name=b"user.old", value=b"old")
    await meta.mkdir("/kept")
    await meta.keep("/kept", 100)
    for path in ("/kept/one", "/kept/two"):
        await meta.create(path)
        await meta.do("Unlink", path)
    meta.trashed = [entry.id for entry in await meta.trash()]
    return meta, made


def paths(source: str, dest: str) -> dict[str, pb.PathAt]:
    return {"from": pb.PathAt(inode=1, path=source.encode()), "to": pb.PathAt(inode=1, path=dest.encode())}


def every_mutation(meta: Meta, made: pb.OpenResponse) -> dict[str, object]:
    report = pb.WriteReport(wrote=True, length=5000)
    handle = {"inode": made.attr.inode, "session": made.session, "report": report}
    return {
        "Create": meta.request("Create", "/new", exclusive=True, open_write=True),
        "Open": meta.request("Open", "/f", write=True, truncate=True),
        "Close": meta.request("Close", **handle),
        "Sync": meta.request("Sync", **handle),
        "Append": meta.request("Append", **handle, bytes=77),
        "Lock": meta.request("Lock", inode=made.attr.inode, lock=pb.FileLock(kind=1, type=2, owner=1, end=9)),
        "Hold": meta.request("Hold", begin=[made.attr.inode]),
        "Mkdir": meta.request("Mkdir", "/newdir", mode=0o700),
        "Symlink": meta.request("Symlink", "/s", target=b"t"),
        "Link": meta.request("Link", **paths("/f", "/g")),
        "Unlink": meta.request("Unlink", "/f"),
        "Rmdir": meta.request("Rmdir", "/empty"),
        "RemoveAll": meta.request("RemoveAll", "/d"),
        "Rename": meta.request("Rename", **paths("/f", "/d/f")),
        "Setattr": meta.request("Setattr", "/f", mode=0o600),
        "Truncate": meta.request("Truncate", "/f", length=7),
        "QuotaSet": meta.request("QuotaSet", "/d", inodes_max=5),
        "Setxattr": meta.request("Setxattr", "/f", name=b"user.new", value=b"v", create=True),
        "Removexattr": meta.request("Removexattr", "/f", name=b"user.old"),
        "TrashRestore": meta.request("TrashRestore", id=meta.trashed[0]),
        "TrashPurge": meta.request("TrashPurge", ids=[meta.trashed[1]]),
    }


MUTATIONS = [operation.name for operation in BY_NAME.values() if operation.mutates]


def test_every_mutating_operation_is_listed() -> None:
    async def main() -> None:
        assert sorted(every_mutation(*await prepared())) == sorted(MUTATIONS)

    run(main())


@pytest.mark.parametrize("name", MUTATIONS)
def test_repeated_request_gets_the_first_answer_from_any_server(name: str) -> None:
    async def main() -> None:
        meta, made = await prepared()
        peer = await meta.peer()
        request = every_mutation(meta, made)[name]
        first = await meta.call(name, request)
        before = await meta.rows(b"Fe"), await meta.rows(b"Fi"), await meta.rows(b"Fx")
        assert await peer.call(name, request) == first
        assert await meta.call(name, request) == first
        assert (await meta.rows(b"Fe"), await meta.rows(b"Fi"), await meta.rows(b"Fx")) == before
        await audit(meta)

    run(main())


@pytest.mark.parametrize("name", MUTATIONS)
def test_concurrent_copies_of_a_request_take_effect_once(name: str) -> None:
    async def main() -> None:
        meta, made = await prepared()
        peer = await meta.peer()
        request = every_mutation(meta, made)[name]
        answers = await asyncio.gather(*((meta, peer)[i % 2].call(name, request) for i in range(6)))
        assert all(answer == answers[0] for answer in answers)
        await audit(meta)

    run(main())


@pytest.mark.parametrize("name", MUTATIONS)
def test_unknown_commit_outcomes_take_effect_once(name: str) -> None:
    async def main() -> None:
        for seed in range(12):
            meta, made = await prepared(seed=seed)
            store = memory_of(meta)
            request = every_mutation(meta, made)[name]
            store.faults = faults(seed, rate=0.12)
            await meta.call(name, request)
            store.faults = None
            answer = await meta.call(name, request)
            rows = [row for row in await meta.rows(keys.IDEMPOTENCY) if row[0].startswith(b"Fo" + meta.client_id)]
            assert len([r for r in rows if r[0] == keys.idempotency(request.op.client_id, request.op.sequence)]) == 1
            assert answer == await meta.call(name, request)
            await audit(meta)

    run(main())


def test_an_op_id_belongs_to_one_operation() -> None:
    async def main() -> None:
        meta = await Meta.start()
        op = meta.op()
        await meta.mkdir("/a", op=op)
        assert await meta.code("Create", "/a", op=op) == Code.CODE_INVALID_ARGUMENT
        assert await meta.code("Create", "/b", op=pb.OpId(client_id=b"short")) == Code.CODE_INVALID_ARGUMENT

    run(main())


def test_errors_are_not_stored() -> None:
    async def main() -> None:
        meta = await Meta.start()
        request = meta.request("Create", "/d/f")
        assert await meta.code("Stat", "/d") == Code.CODE_NOT_FOUND
        with pytest.raises(FileNotFoundError):
            await meta.call("Create", request)
        await meta.mkdir("/d")
        assert (await meta.call("Create", request)).created

    run(main())


def test_a_refusal_of_a_request_that_was_sent_before_is_final() -> None:
    async def main() -> None:
        meta = await Meta.start()
        peer = await meta.peer()
        first = meta.request("Mkdir", "/d/sub", mode=0o755)
        again = type(first)()
        again.CopyFrom(first)
        again.op.resent = True
        assert await code(peer.call("Mkdir", again)) == Code.CODE_NOT_FOUND
        await meta.mkdir("/d")
        # The first copy arrives late: the caller has been told that there is no such directory.
        assert await code(meta.call("Mkdir", first)) == Code.CODE_NOT_FOUND
        assert await meta.names("/d") == []

    run(main())


def test_requests_without_op_id_survive_unknown_outcomes() -> None:
    async def main() -> None:
        meta = await Meta.start()
        store = memory_of(meta)
        store.faults = faults(3, rate=0.12)
        for i in range(30):
            made = await meta.create(f"/f{i}", exclusive=True, op=pb.OpId())
            assert made.created
        store.faults = None
        await audit(meta)

    run(main())


def test_sweeper_removes_what_is_older_than_the_limit_and_nothing_else() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, idempotency_ms=3_600_000)
        other = await meta.peer()
        for i in range(300):
            await (meta, other)[i % 2].mkdir(f"/old{i}")
        await clock.advance(3000)
        for i in range(10):
            await (meta, other)[i % 2].mkdir(f"/new{i}")
        assert await meta.engine.sweeper.step() == 0
        await clock.advance(700)
        assert await meta.engine.sweeper.step() == 300
        assert len(await meta.rows(keys.IDEMPOTENCY)) == 10
        await clock.advance(4000)
        assert await meta.engine.sweeper.step() == 10
        assert await meta.engine.sweeper.step() == 0

    run(main())


def test_sweeper_never_keeps_less_than_half_an_hour() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, idempotency_ms=1)
        await meta.mkdir("/d")
        await clock.advance(1799)
        assert await meta.engine.sweeper.step() == 0
        await clock.advance(2)
        assert await meta.engine.sweeper.step() == 1

    run(main())


def test_random_faults_and_concurrency_keep_the_namespace_whole() -> None:
    async def main(seed: int) -> None:
        meta = await Meta.start(seed=seed)
        peer = await meta.peer(seed=seed + 1000)
        store = memory_of(meta)
        rng = random.Random(seed)
        names = ["a", "b", "c"]

        def path() -> str:
            return "/" + "/".join(rng.choice(names) for _ in range(rng.randint(1, 3)))

        async def one(server: Meta) -> None:
            kind = rng.choice(
                [
                    "Create",
                    "Create",
                    "Mkdir",
                    "Mkdir",
                    "Unlink",
                    "Rmdir",
                    "Rename",
                    "Rename",
                    "Link",
                    "RemoveAll",
                    "Symlink",
                    "Exchange",
                ]
            )
            fields = {"target": b"a/b"} if kind == "Symlink" else {}
            if kind == "Exchange":
                kind, fields = "Rename", {"exchange": True}
            if kind in ("Rename", "Link"):
                await server.code(kind, **paths(path(), path()), **fields)
            else:
                await server.code(kind, path(), **fields)

        store.faults = faults(seed)
        for _ in range(25):
            await asyncio.gather(*(one(rng.choice([meta, peer])) for _ in range(8)))
            await meta.engine.collector.step()
        store.faults = None
        await audit(meta)
        await meta.collect()
        await audit(meta)

    for seed in range(6):
        run(main(seed))


def test_concurrent_copies_of_an_open_make_one_session() -> None:
    async def main() -> None:
        meta, _ = await prepared()
        before = len(await meta.rows(keys.SESSION))
        request = meta.request("Open", "/f", write=True)
        answers = await asyncio.gather(*(meta.call("Open", request) for _ in range(5)))
        assert len({answer.session for answer in answers}) == 1
        assert len(await meta.rows(keys.SESSION)) == before + 1

    run(main())


def test_a_repeated_truncation_answers_only_after_the_cut() -> None:
    async def main() -> None:
        meta, made = await prepared()
        request = meta.request("Truncate", "/f", length=7)
        meta.chunks.down = set(CHAINS)
        ends_s = meta.clock.monotonic_ns() * 1e-9 + 0.2
        assert await code(meta.engine.call(BY_NAME["Truncate"], request, ends_s=ends_s)) == Code.CODE_UNAVAILABLE
        meta.chunks.down = set()
        assert (await meta.call("Truncate", request)).attr.length == 7
        assert meta.chunks.of(made.attr.inode) == {0: 7}

    run(main())
