"""What quotas count and refuse, operation by operation."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from fs3.core.clock import VirtualClock
from fs3.meta import keys, quotas
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.fsck.harness import kinds
from meta.harness import Meta, audit, code, faults, memory_of, run

MIB = 1 << 20


async def limited(**limits: int) -> Meta:
    """A directory /q with an active quota, next to a directory /o without one."""
    meta = await Meta.start()
    await meta.mkdir("/q")
    await meta.mkdir("/o")
    await meta.set_quota("/q", **limits)
    await meta.settle_quotas()
    return meta


async def checked(meta: Meta, inodes: int, length: int) -> None:
    assert await meta.used("/q") == (inodes, length)
    await audit(meta)


def test_everything_that_has_an_inode_counts_and_uncounts() -> None:
    async def main() -> None:
        meta = await limited()
        await meta.write("/q/f", 100)
        await meta.mkdir("/q/d")
        await meta.do("Symlink", "/q/d/s", target=b"target")
        await meta.create("/q/fifo", type=pb.FILE_TYPE_FIFO)
        await meta.link("/q/f", "/q/d/g")
        await checked(meta, 5, 106)
        await meta.do("Unlink", "/q/f")
        await checked(meta, 5, 106)
        await meta.do("Unlink", "/q/d/g")
        await checked(meta, 4, 6)
        await meta.do("Unlink", "/q/d/s")
        await meta.do("Rmdir", "/q/d")
        await meta.do("Unlink", "/q/fifo")
        await checked(meta, 1, 0)
        await meta.collect()
        await checked(meta, 1, 0)

    run(main())


def test_a_tree_removed_at_once_is_uncounted_as_it_is_taken_apart() -> None:
    async def main() -> None:
        meta = await limited()
        await meta.do("Mkdir", "/q/d/e", mode=0o755, parents=True)
        await meta.write("/q/d/e/f", 100)
        await meta.set_quota("/q/d/e")
        await meta.settle_quotas()
        await meta.do("RemoveAll", "/q/d")
        await checked(meta, 3, 100)
        await meta.collect()
        await checked(meta, 1, 0)
        await meta.settle_quotas()
        assert len(await meta.rows(keys.QUOTA)) == 1

    run(main())


def test_a_quota_directory_that_is_removed_with_its_tree_leaves_nothing() -> None:
    async def main() -> None:
        meta = await limited()
        await meta.write("/q/f", 100)
        await meta.do("RemoveAll", "/q")
        await meta.settle_quotas()
        assert len(await meta.rows(keys.QUOTA)) == 1
        await meta.collect()
        await meta.settle_quotas()
        for table in (keys.QUOTA, keys.QUOTA_COUNTER, keys.QUOTA_WALK):
            assert await meta.rows(table) == []
        await audit(meta)

    run(main())


def test_an_unlinked_file_counts_until_it_is_closed() -> None:
    async def main() -> None:
        meta = await limited()
        made = await meta.create("/q/f", open_write=True)
        await meta.do("Unlink", "/q/f")
        report = pb.WriteReport(wrote=True, length=500)
        await meta.do("Sync", inode=made.attr.inode, session=made.session, report=report)
        await checked(meta, 2, 500)
        await meta.do("Close", inode=made.attr.inode, session=made.session)
        await checked(meta, 1, 0)

    run(main())


def test_truncations_and_reports_count_lengths() -> None:
    async def main() -> None:
        meta = await limited(bytes_max=1000)
        await meta.write("/q/f", 400)
        await checked(meta, 2, 400)
        await meta.do("Truncate", "/q/f", length=1000)
        await checked(meta, 2, 1000)
        assert await meta.code("Truncate", "/q/f", length=1001) == Code.CODE_QUOTA_EXCEEDED
        await meta.do("Truncate", "/q/f", length=10)
        await checked(meta, 2, 10)
        await meta.create("/q/f", truncate=True, open_write=True)
        await checked(meta, 2, 0)

    run(main())


def test_what_was_written_is_counted_whatever_the_limit() -> None:
    async def main() -> None:
        meta = await limited(bytes_max=100)
        await meta.write("/q/f", 500)
        await checked(meta, 2, 500)
        await meta.create("/q/g")
        assert await meta.code("Truncate", "/q/g", length=1) == Code.CODE_QUOTA_EXCEEDED
        await meta.do("Truncate", "/q/f", length=500)

    run(main())


def test_a_reaped_session_is_counted() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock, session_ms=1000)
        await meta.mkdir("/q")
        await meta.set_quota("/q", bytes_max=10)
        await meta.settle_quotas()
        made = await meta.create("/q/f", open_write=True)
        meta.chunks.write(made.attr, 300)
        await meta.engine.reaper.step()
        await clock.advance(1.5)
        assert await meta.engine.reaper.step() == 1
        await checked(meta, 2, 300)

    run(main())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Create", {}),
        ("Mkdir", {"mode": 0o755}),
        ("Symlink", {"target": b"t"}),
        ("Create", {"type": pb.FILE_TYPE_FIFO}),
    ],
)
def test_creations_beyond_the_limit_are_refused_and_leave_nothing(name: str, fields: dict[str, Any]) -> None:
    async def main() -> None:
        meta = await limited(inodes_max=2)
        await meta.create("/q/f")
        assert await meta.code(name, "/q/g", **fields) == Code.CODE_QUOTA_EXCEEDED
        await checked(meta, 2, 0)
        await meta.do("Unlink", "/q/f")
        assert await meta.code(name, "/q/g", **fields) == 0

    run(main())


def test_both_of_two_nested_quotas_refuse() -> None:
    async def main() -> None:
        meta = await limited(inodes_max=4)
        await meta.mkdir("/q/i")
        await meta.set_quota("/q/i", inodes_max=2)
        await meta.settle_quotas()
        await meta.create("/q/i/f")
        assert await meta.code("Create", "/q/i/g") == Code.CODE_QUOTA_EXCEEDED
        await meta.create("/q/f")
        await meta.set_quota("/q/i", inodes_max=9)
        assert await meta.code("Create", "/q/i/g") == Code.CODE_QUOTA_EXCEEDED
        await meta.set_quota("/q", inodes_max=9)
        await meta.create("/q/i/g")
        await checked(meta, 5, 0)

    run(main())


def test_a_file_takes_its_count_along_and_a_directory_stays() -> None:
    async def main() -> None:
        meta = await limited(bytes_max=1000)
        await meta.write("/o/f", 600)
        await meta.mkdir("/o/d")
        await meta.rename("/o/f", "/q/f")
        await checked(meta, 2, 600)
        await meta.write("/o/g", 600)
        assert await code(meta.rename("/o/g", "/q/g")) == Code.CODE_QUOTA_EXCEEDED
        await meta.rename("/o/g", "/q/f")
        await checked(meta, 2, 600)
        assert await code(meta.rename("/o/d", "/q/d")) == Code.CODE_CROSS_QUOTA
        await meta.write("/o/h", 1)
        await meta.rename("/q/f", "/o/h", exchange=True)
        await checked(meta, 2, 1)
        await meta.rename("/q/f", "/o/f")
        await checked(meta, 1, 0)

    run(main())


def test_names_of_a_file_are_under_one_quota() -> None:
    async def main() -> None:
        meta = await limited()
        await meta.create("/o/f")
        assert await code(meta.link("/o/f", "/q/f")) == Code.CODE_CROSS_QUOTA
        await meta.link("/o/f", "/o/g")
        assert await code(meta.rename("/o/f", "/q/f")) == Code.CODE_CROSS_QUOTA
        await meta.do("Unlink", "/o/g")
        await meta.rename("/o/f", "/q/f")
        await meta.link("/q/f", "/q/g")
        await checked(meta, 2, 0)

    run(main())


def test_a_quota_directory_moves_where_its_outer_quota_is_the_same() -> None:
    async def main() -> None:
        meta = await limited()
        await meta.mkdir("/q/d")
        await meta.mkdir("/q/i")
        await meta.write("/q/i/f", 10)
        await meta.set_quota("/q/i")
        await meta.settle_quotas()
        await meta.rename("/q/i", "/q/d/i")
        assert await code(meta.rename("/q/d/i", "/o/i")) == Code.CODE_CROSS_QUOTA
        assert await code(meta.rename("/q/d", "/q/d/i/d")) == Code.CODE_CROSS_QUOTA
        await checked(meta, 4, 10)

    run(main())


def test_what_moves_before_a_walk_gets_there_is_counted_once() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.do("Mkdir", "/q/z/y", mode=0o755, parents=True)
        await meta.mkdir("/q/i")
        await meta.mkdir("/o")
        await meta.write("/q/z/y/f", 10)
        await meta.write("/q/g", 200)
        await meta.set_quota("/q/i")
        await meta.settle_quotas()
        await meta.set_quota("/q")
        # Under another name, so that a walk that has passed it would not see it.
        await meta.rename("/q/z", "/q/a")
        await meta.rename("/q/i", "/q/a/i")
        await meta.rename("/q/g", "/o/g")
        await meta.create("/q/a/new")
        assert await code(meta.rename("/q/a", "/o/a")) == Code.CODE_CROSS_QUOTA
        await meta.settle_quotas()
        await checked(meta, 6, 10)
        assert len(await meta.quotas("/q/a/i")) == 2

    run(main())


def test_a_second_name_outside_lets_nothing_be_lost() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await meta.mkdir("/q")
        await meta.write("/q/f", 10)
        await meta.link("/q/f", "/f")
        await meta.set_quota("/q")
        await meta.settle_quotas()
        await checked(meta, 2, 10)
        await meta.do("Unlink", "/q/f")
        await meta.do("QuotaSet", "/q", clear=True)
        await meta.settle_quotas()
        # It is still counted there: the record of the quota stays until the file goes.
        assert await kinds(meta) == []
        assert [quota.state for quota in await meta.quotas("/f")] == [pb.QUOTA_STATE_CLEARING]
        await meta.do("Unlink", "/f")
        await meta.settle_quotas()
        assert await meta.rows(keys.QUOTA) == []
        await audit(meta)

    run(main())


def test_a_file_without_a_name_counts_where_it_was_made_until_it_gets_one() -> None:
    async def main() -> None:
        meta = await limited(inodes_max=2)
        made = await meta.create("/o", unnamed=True, open_write=True)
        paths = {"from": pb.PathAt(inode=made.attr.inode), "to": pb.PathAt(inode=1, path=b"q/f")}
        await meta.do("Link", **paths)
        await checked(meta, 2, 0)
        assert await meta.code("Create", "/q", unnamed=True, open_write=True) == Code.CODE_QUOTA_EXCEEDED
        await meta.do("Unlink", "/q/f")
        await meta.do("Close", inode=made.attr.inode, session=made.session)
        await checked(meta, 1, 0)
        made = await meta.create("/q", unnamed=True, open_write=True)
        await checked(meta, 2, 0)
        await meta.do("Close", inode=made.attr.inode, session=made.session)
        await checked(meta, 1, 0)

    run(main())


def test_a_file_left_under_a_removed_quota_gets_names_and_is_counted_there() -> None:
    async def main() -> None:
        meta = await limited()
        await meta.write("/o/f", 10)
        await meta.set_quota("/o")
        await meta.settle_quotas()
        assert await code(meta.link("/o/f", "/h")) == Code.CODE_CROSS_QUOTA
        await meta.do("QuotaSet", "/o", clear=True)
        assert await meta.rows(keys.QUOTA_WALK)
        await meta.link("/o/f", "/h")
        assert await meta.quotas("/h") == []
        await meta.settle_quotas()
        assert len(await meta.rows(keys.QUOTA)) == 1
        await audit(meta)

    run(main())


def test_a_writer_hears_how_long_its_file_may_become() -> None:
    async def main() -> None:
        meta = await limited(bytes_max=100 * MIB)
        made = await meta.create("/q/f", open_write=True)
        assert made.length_limit == 25 * MIB
        inode, session = made.attr.inode, made.session
        report = pb.WriteReport(wrote=True, length=20 * MIB)
        synced = await meta.do("Sync", inode=inode, session=session, report=report)
        assert synced.length_limit == 40 * MIB
        wanted = await meta.do("Sync", inode=inode, session=session, wanted_length=90 * MIB)
        assert wanted.length_limit == 90 * MIB
        wanted = await meta.do("Sync", inode=inode, session=session, wanted_length=300 * MIB)
        assert wanted.length_limit == 100 * MIB
        await meta.write("/q/g", 78 * MIB)
        assert (await meta.do("Open", "/q/f", write=True)).length_limit == 22 * MIB
        assert not (await meta.do("Open", "/q/f", read=True)).HasField("length_limit")
        await meta.write("/q/g", 90 * MIB)
        assert (await meta.do("Open", "/q/f", write=True)).length_limit == 20 * MIB
        cut = await meta.do("Truncate", "/q/f", length=0)
        assert cut.length_limit == quotas.GRANT_BYTES_MIN

    run(main())


def test_without_a_limit_a_writer_hears_nothing() -> None:
    async def main() -> None:
        meta = await limited(inodes_max=9)
        for path in ("/q/f", "/o/f"):
            made = await meta.create(path, open_write=True)
            assert not made.HasField("length_limit")
            synced = await meta.do("Sync", inode=made.attr.inode, session=made.session, wanted_length=1 << 50)
            assert not synced.HasField("length_limit")

    run(main())


def test_statfs_shows_the_smallest_room_of_the_chain() -> None:
    async def main() -> None:
        meta = await limited(bytes_max=1000, inodes_max=10)
        await meta.mkdir("/q/i")
        await meta.set_quota("/q/i", bytes_max=700)
        await meta.settle_quotas()
        await meta.write("/q/f", 400)
        await meta.write("/q/i/f", 50)
        inside = await meta.do("Statfs", "/q/i")
        assert (inside.capacity_bytes, inside.free_bytes) == (1000, 550)
        assert (inside.inodes, inside.free_inodes) == (4, 6)
        await meta.do("Truncate", "/q/f", length=10)
        inside = await meta.do("Statfs", "", inode=(await meta.stat("/q/i/f")).inode)
        assert (inside.capacity_bytes, inside.free_bytes) == (700, 650)
        assert not (await meta.do("Statfs", "/o")).HasField("free_inodes")
        assert (await meta.do("Statfs", "/o")).capacity_bytes == 3 << 30

    run(main())


def test_two_servers_count_without_conflicts_between_them() -> None:
    async def main() -> None:
        meta = await limited()
        peer = await meta.peer(seed=3)
        await asyncio.gather(
            *(server.create(f"/q/f{i}-{j}") for i in range(20) for j, server in enumerate((meta, peer)))
        )
        await checked(meta, 41, 0)

    run(main())


@pytest.mark.parametrize("seed", range(12))
def test_operations_under_faults_and_during_walks_count_exactly(seed: int) -> None:
    async def main() -> None:
        meta = await Meta.start(seed=seed)
        store = memory_of(meta)
        peer = await meta.peer(seed=100 + seed)
        for path in ("/q/i", "/o"):
            await meta.do("Mkdir", path, mode=0o755, parents=True)
        store.faults = faults(seed, 0.04)
        done = asyncio.Event()

        async def walk(server: Meta) -> None:
            while not done.is_set():
                await server.engine.quota_walker.step()
                await asyncio.sleep(0)

        walkers = [asyncio.create_task(walk(server)) for server in (meta, peer)]
        await asyncio.gather(
            *(_disturb(server, random.Random(seed * 7 + i)) for i, server in enumerate((meta, peer, meta)))
        )
        done.set()
        await asyncio.gather(*walkers)
        store.faults = None
        await meta.collect()
        await meta.settle_quotas()
        await audit(meta)

    run(main())


async def _disturb(meta: Meta, rng: random.Random) -> None:
    """Random operations; what cannot be done is left."""
    directories = ("/q", "/q/i", "/q/d", "/q/i/d", "/o", "/o/d")
    for _ in range(60):
        path, other = (f"{rng.choice(directories)}/{rng.choice('fgh')}" for _ in range(2))
        match rng.randrange(9):
            case 0:
                await code(meta.write(path, rng.randrange(1000)))
            case 1:
                await meta.code("Mkdir", rng.choice(directories), mode=0o755)
            case 2:
                await meta.code("Unlink", path)
            case 3:
                await code(meta.rename(path, other, exchange=rng.random() < 0.2))
            case 4:
                await code(meta.link(path, other))
            case 5:
                await code(meta.rename(rng.choice(directories), rng.choice(directories)))
            case 6:
                await meta.code("Truncate", path, length=rng.randrange(1000))
            case 7:
                await meta.code("QuotaSet", rng.choice(directories), clear=rng.random() < 0.4)
            case 8:
                await meta.code("RemoveAll", rng.choice(directories[2:]))


def test_what_is_in_the_trash_counts_and_is_restored_under_the_quotas_of_its_place() -> None:
    async def main() -> None:
        meta = await limited()
        await meta.do("Setattr", "/q", trash_ms=3_600_000)
        await meta.do("Mkdir", "/q/d", mode=0o755)
        await meta.write("/q/d/f", 100)
        await meta.write("/q/g", 20)
        await meta.do("RemoveAll", "/q/d")
        await meta.do("Unlink", "/q/g")
        await checked(meta, 4, 120)
        await meta.do("QuotaSet", "/q", clear=True)
        await meta.set_quota("/q")
        await meta.settle_quotas()
        await checked(meta, 1, 0)
        entries = (await meta.do("TrashList")).entries
        for entry in entries:
            await meta.do("TrashRestore", id=entry.id)
        await meta.settle_quotas()
        await checked(meta, 4, 120)
        assert len(await meta.rows(keys.QUOTA)) == 1

    run(main())
