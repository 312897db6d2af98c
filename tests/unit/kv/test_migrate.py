"""Copying a store into another: whole, resumable, never over somebody else's data, and checked."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from fs3.kv import lmdb_wal, migrate
from fs3.kv.api import KEY_BYTES_MAX, VALUE_BYTES_MAX, KvError, KvStore
from fs3.kv.faults import KvFaults
from fs3.kv.fdb import FdbKv
from fs3.kv.lmdb import LmdbKv
from fs3.kv.memory import MemoryKv
from tests.conformance.kv.fake_fdb import FakeFdb
from tests.conformance.kv.support import contents, write

Open = Callable[[Path], KvStore]

ENGINES: dict[str, Open] = {
    "memory": lambda _: MemoryKv(),
    "lmdb": lambda path: LmdbKv(path, durable=False),
    "fdb": lambda _: FdbKv(os.devnull, binding=FakeFdb(MemoryKv())),
}


def quiet(_records: int, _content_bytes: int) -> None:
    return None


async def fill(store: KvStore, seed: int = 1) -> dict[bytes, bytes]:
    """Small records, some of the largest, and more than one read takes."""
    rng = random.Random(seed)
    rows = {b"Fe%06d" % i: rng.randbytes(rng.randint(0, 60)) for i in range(2 * migrate.READ_ROWS_MAX + 7)}
    rows |= {b"M" + bytes([i]) * (KEY_BYTES_MAX - 1): rng.randbytes(VALUE_BYTES_MAX) for i in range(25)}
    for at in range(0, len(rows), 50):
        await write(store, dict(list(rows.items())[at : at + 50]))
    return rows


@pytest.mark.parametrize("target_engine", ENGINES)
@pytest.mark.parametrize("source_engine", ENGINES)
def test_everything_is_copied_and_compared(source_engine: str, target_engine: str, tmp_path: Path) -> None:
    async def main() -> None:
        source, target = ENGINES[source_engine](tmp_path / "a"), ENGINES[target_engine](tmp_path / "b")
        rows = await fill(source)
        assert not await migrate.copy(source, target, source_name="x", report=quiet)
        found = await migrate.compare(source, target, report=quiet)
        await migrate.finish(target)
        assert found.records == len(rows)
        assert found.content_bytes == sum(len(key) + len(value) for key, value in rows.items())
        assert await contents(target) == await contents(source) == rows
        await source.close()
        await target.close()

    asyncio.run(main())


def test_a_copy_that_was_interrupted_anywhere_goes_on_to_the_same_contents() -> None:
    class Interrupted(Exception):
        pass

    async def main() -> None:
        source = MemoryKv()
        rows = await fill(source)
        target = MemoryKv()
        resumed = []
        progress = [0]

        def interrupt(records: int, _: int) -> None:
            progress[0] += 1
            if progress[0] % 2:
                raise Interrupted

        while True:
            try:
                resumed.append(await migrate.copy(source, target, source_name="x", report=interrupt))
                break
            except Interrupted:
                resumed.append(False)
        assert len(resumed) > 3
        assert resumed[-1]
        await migrate.compare(source, target, report=quiet)
        await migrate.finish(target)
        assert await contents(target) == rows

    asyncio.run(main())


def test_a_copy_survives_conflicts_and_unknown_outcomes() -> None:
    async def main() -> None:
        source = MemoryKv()
        rows = await fill(source)
        faults = KvFaults(random.Random(5), commit_conflict=0.2, unknown_applied=0.2, unknown_not_applied=0.2)
        target = MemoryKv(faults=faults)
        await migrate.copy(source, target, source_name="x", report=quiet)
        await migrate.finish(target)
        assert faults.injected
        assert await contents(target) == rows

    asyncio.run(main())


def test_what_is_there_already_is_never_touched() -> None:
    async def main() -> None:
        source, target = MemoryKv(), MemoryKv()
        await fill(source)
        await write(target, {b"Fi": b"somebody's"})
        with pytest.raises(KvError, match="not empty"):
            await migrate.copy(source, target, source_name="x", report=quiet)
        assert await contents(target) == {b"Fi": b"somebody's"}

    asyncio.run(main())


def test_an_unfinished_copy_of_another_store_is_refused_at_both_ends() -> None:
    async def main() -> None:
        source, target = MemoryKv(), MemoryKv()
        await fill(source)
        await migrate.copy(source, target, source_name="x", report=quiet)
        with pytest.raises(KvError, match="unfinished copy of x"):
            await migrate.copy(source, target, source_name="y", report=quiet)
        with pytest.raises(KvError, match="unfinished copy itself"):
            await migrate.copy(target, MemoryKv(), source_name="y", report=quiet)

    asyncio.run(main())


@pytest.mark.parametrize("rows", [{}, {b"\x00": b"another program's"}])
def test_a_source_without_a_cluster_is_refused(rows: dict[bytes, bytes]) -> None:
    async def main() -> None:
        source, target = MemoryKv(), MemoryKv()
        await write(source, rows)
        with pytest.raises(KvError, match="the store to copy from is"):
            await migrate.copy(source, target, source_name="x", report=quiet)
        assert await contents(target) == {}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changed", "value"), [(b"Fe000003", b"!"), (b"Fe000003x", b"!"), (b"N", b"!"), (b"Fe000003", None)]
)
def test_comparing_names_the_first_key_that_differs(changed: bytes, value: bytes | None) -> None:
    async def main() -> None:
        source, target = MemoryKv(), MemoryKv()
        await fill(source)
        await migrate.copy(source, target, source_name="x", report=quiet)
        for store in (source, target):
            before = (await contents(store)).get(changed)
            txn = store.transaction()
            if value is None:
                txn.clear(changed)
            else:
                txn.set(changed, value)
            await txn.commit()
            with pytest.raises(KvError, match=f"differ at key {changed.hex()}:"):
                await migrate.compare(source, target, report=quiet)
            undo = store.transaction()
            if before is None:
                undo.clear(changed)
            else:
                undo.set(changed, before)
            await undo.commit()
        await migrate.compare(source, target, report=quiet)

    asyncio.run(main())


def test_whether_a_directory_is_in_use_can_be_told(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "kv"
        assert not lmdb_wal.in_use(path)
        store = LmdbKv(path, durable=False)
        assert lmdb_wal.in_use(path)
        await store.close()
        assert not lmdb_wal.in_use(path)

    asyncio.run(main())
