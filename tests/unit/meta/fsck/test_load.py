"""A sound file system is sound while it is used: nothing is reported, whatever overlaps with the audit."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from fs3.core.errors import Fs3Error
from fs3.meta.fsck import audit, links, tables
from fs3.v1 import meta_pb2 as pb
from meta.fsck.harness import fsck, kinds
from meta.harness import CHUNK, Meta, faults, memory_of, run

DIRECTORIES = ("", "/a", "/b", "/a/c", "/b/c", "/a/c/d")
NAMES = ("f", "g", "h", "i", "j", "k", "a", "b", "c", "d")
AUDITS = 6
# On each of two servers.
USERS = 4


async def use(meta: Meta, rng: random.Random, done: asyncio.Event) -> None:
    """Random operations, most of which succeed."""
    while not done.is_set():
        path, other = (f"{rng.choice(DIRECTORIES)}/{rng.choice(NAMES)}" for _ in range(2))
        with contextlib.suppress(Fs3Error):
            await operate(meta, rng, path, other)
        await asyncio.sleep(0)


async def operate(meta: Meta, rng: random.Random, path: str, other: str) -> None:
    choice = rng.randrange(12)
    if choice < 3:
        await write(meta, rng, path)
    elif choice < 5:
        await meta.mkdir(path)
    elif choice < 7:
        await meta.rename(path, other, exchange=rng.random() < 0.3)
    elif choice == 7:
        await meta.link(path, other)
    elif choice == 8:
        await meta.do(rng.choice(("Unlink", "Rmdir", "RemoveAll")), path)
    elif choice == 9:
        await meta.do("QuotaSet", rng.choice(DIRECTORIES), clear=rng.random() < 0.4)
    elif choice == 10:
        await meta.engine.quota_walker.step()
    else:
        await meta.engine.collector.step()


async def write(meta: Meta, rng: random.Random, path: str) -> None:
    made = await meta.create(path, open_write=True, truncate=rng.random() < 0.3)
    length = rng.randrange(4) * CHUNK
    meta.chunks.write(made.attr, length)
    await asyncio.sleep(0)
    report = pb.WriteReport(wrote=True, length=length, truncate_version=made.attr.truncate_version)
    await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)


@pytest.mark.parametrize("seed", range(4))
def test_a_sound_file_system_is_sound_while_it_is_used(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small pages, so that much changes between them.
    monkeypatch.setattr(audit, "PAGE_ROWS", 3)
    monkeypatch.setattr(links, "SCAN_ROWS", 3)
    monkeypatch.setattr(tables, "COUNT_ROWS", 5)

    async def main() -> None:
        meta = await Meta.start(seed=seed)
        if seed % 2:
            memory_of(meta).faults = faults(seed, rate=0.02)
        peer = await meta.peer(seed=seed + 100)
        done = asyncio.Event()
        users = [
            asyncio.create_task(use(server, random.Random(f"{seed} {i}"), done))
            for i in range(USERS)
            for server in (meta, peer)
        ]
        try:
            for _ in range(AUDITS):
                assert (await fsck(meta)).findings == []
        finally:
            done.set()
            await asyncio.gather(*users)
        await meta.collect()
        await meta.settle_quotas()
        assert await kinds(meta) == []

    run(main())
