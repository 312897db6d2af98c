from __future__ import annotations

import asyncio

from fs3.core.clock import VirtualClock
from fs3.meta import keys
from fs3.v1 import meta_pb2 as pb
from meta.fsck.harness import fsck, kinds, record
from meta.harness import CHAINS, CHUNK, Meta, run, until


async def written(meta: Meta, path: str, length: int = 6 * CHUNK) -> pb.Attr:
    made = await meta.create(path, open_write=True)
    meta.chunks.write(made.attr, length)
    report = pb.WriteReport(wrote=True, length=length)
    await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
    return made.attr


async def gone(meta: Meta) -> int:
    """An inode id that was handed out, and whose inode has been removed, with chunks that were left."""
    ino = (await meta.create("/gone")).attr.inode
    await meta.do("Unlink", "/gone")
    meta.chunks.chunks |= {(CHAINS[0], ino, 0): CHUNK, (CHAINS[1], ino, 1): 10}
    return ino


def test_chunks_of_files_are_right_while_they_are_written_and_after_that() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await written(meta, "/f")
        await written(meta, "/tail", CHUNK + 1)
        made = await meta.create("/open", open_write=True)
        meta.chunks.write(made.attr, 20 * CHUNK)
        await written(meta, "/removed")
        await meta.do("Unlink", "/removed")
        assert await kinds(meta) == []

    run(main())


def test_chunks_without_inode_are_counted_and_removed_only_on_demand_and_old() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        kept = await written(meta, "/f")
        ino = await gone(meta)
        (finding,) = (await fsck(meta, repair=True)).findings
        assert (finding.kind, finding.inode, finding.bytes) == ("orphan-chunks", ino, CHUNK + 10)
        assert not finding.repaired
        assert meta.chunks.of(ino)

        started_ns = clock.monotonic_ns()
        task = asyncio.create_task(fsck(meta, repair_chunks=True, orphan_age_s=300))
        await clock.advance(299)
        assert meta.chunks.of(ino)
        assert not task.done()
        await clock.advance(2)
        await until(task.done)
        assert [f.repaired for f in task.result().findings] == [True]
        assert clock.monotonic_ns() - started_ns >= 300e9
        assert not meta.chunks.of(ino)
        assert len(meta.chunks.of(kept.inode)) == 6
        assert await kinds(meta) == []

    run(main())


def test_chunks_of_inodes_that_the_store_never_made_are_never_removed() -> None:
    async def main() -> None:
        meta = await Meta.start()
        await written(meta, "/f")
        ino = keys.piece_ids(1_000_000)[3]
        meta.chunks.chunks[CHAINS[0], ino, 0] = CHUNK
        (finding,) = (await fsck(meta, repair=True, repair_chunks=True, orphan_age_s=0)).findings
        assert (finding.kind, finding.repaired) == ("foreign-chunks", False)
        assert meta.chunks.of(ino)

    run(main())


def test_a_chunk_beyond_the_extent_is_found_when_the_file_goes() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = await written(meta, "/f", 10)
        meta.chunks.write(attr, 3 * CHUNK, 2 * CHUNK)
        assert await kinds(meta) == ["chunk-extent"]
        assert [f.repaired for f in (await fsck(meta, repair=True)).findings] == [True]
        assert await kinds(meta) == []
        assert (await record(meta, attr.inode)).loose
        await meta.do("Unlink", "/f")
        await meta.collect()
        assert meta.chunks.chunks == {}

    run(main())


def test_a_chunk_on_the_wrong_chain_is_found() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = await written(meta, "/f", 10)
        (here,) = [chain for chain, _, _ in meta.chunks.chunks]
        meta.chunks.chunks[next(chain for chain in CHAINS if chain != here), attr.inode, 0] = 10
        assert await kinds(meta) == ["chunk-layout"]

    run(main())


def test_replicas_that_differ_are_found() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = await written(meta, "/f", 10)
        (chain,) = [chain for chain, _, _ in meta.chunks.chunks]
        meta.chunks.versions[meta.chunks.replicas(chain)[1], attr.inode, 0] = 2
        (finding,) = (await fsck(meta, repair=True)).findings
        assert (finding.kind, finding.repaired) == ("replicas", False)
        assert "version 2, 10 bytes" in finding.problem

    run(main())


def test_replicas_that_differ_for_a_moment_are_right() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = await written(meta, "/f", 10)
        (chain,) = [chain for chain, _, _ in meta.chunks.chunks]
        target = meta.chunks.replicas(chain)[1]
        versions = iter(range(2, 100))

        async def updated(call: str, listed: int) -> None:
            if call == "list" and listed == target:
                meta.chunks.versions[target, attr.inode, 0] = next(versions)

        meta.chunks.before_call = updated
        assert await kinds(meta) == []

    run(main())


def test_a_chain_that_answers_later_is_looked_at_then() -> None:
    async def main() -> None:
        meta = await Meta.start()
        attr = await written(meta, "/f", 10)
        (chain,) = [chain for chain, _, _ in meta.chunks.chunks]
        meta.chunks.versions[meta.chunks.replicas(chain)[1], attr.inode, 0] = 2
        meta.chunks.down = {chain}
        asked = 0

        async def recover(call: str, target: int) -> None:
            nonlocal asked
            asked += target in meta.chunks.replicas(chain)
            if asked == 3:
                meta.chunks.down = set()

        meta.chunks.before_call = recover
        assert await kinds(meta) == ["replicas"]

    run(main())


def test_a_chain_that_does_not_answer_is_told_of() -> None:
    async def main() -> None:
        meta = await Meta.start()
        meta.chunks.down = {CHAINS[2]}
        (finding,) = (await fsck(meta)).findings
        assert (finding.kind, finding.where) == ("chain", f"chain {CHAINS[2]}")
        assert await kinds(meta, chunks=False) == []

    run(main())
