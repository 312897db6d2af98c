"""The in-memory engine, and what faults do to it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from fs3.kv.api import CommitUnknown, Transaction
from fs3.kv.faults import KvFaults
from fs3.kv.memory import MemoryKv
from fs3.kv.retry import run

from .suite import KvConformance
from .support import contents, i64, write


class TestMemory(KvConformance):
    def open_kv(self, clock: Callable[[], int] | None = None) -> MemoryKv:
        return MemoryKv() if clock is None else MemoryKv(now_ms=clock)


class TestMemoryInterleaved(KvConformance):
    """Reads give way to other tasks, as on a remote store."""

    def open_kv(self, clock: Callable[[], int] | None = None) -> MemoryKv:
        faults = KvFaults(random.Random(1))
        return MemoryKv(faults=faults) if clock is None else MemoryKv(now_ms=clock, faults=faults)


def test_an_unknown_commit_may_or_may_not_have_been_applied() -> None:
    async def main() -> None:
        for applied in (True, False):
            faults = KvFaults(random.Random(3), unknown_applied=float(applied), unknown_not_applied=float(not applied))
            store = MemoryKv(faults=faults)
            with pytest.raises(CommitUnknown):
                await write(store, {b"a": b"1"})
            assert await contents(store) == ({b"a": b"1"} if applied else {})
            assert faults.injected == 1

    asyncio.run(main())


def test_with_faults_an_operation_with_a_record_takes_effect_exactly_once() -> None:
    async def main() -> None:
        faults = KvFaults(
            random.Random(9),
            commit_conflict=0.1,
            commit_too_old=0.1,
            unknown_applied=0.15,
            unknown_not_applied=0.15,
            read_too_old=0.05,
            read_unavailable=0.05,
        )
        store = MemoryKv(faults=faults)

        async def no_sleep(_: float) -> None:
            await asyncio.sleep(0)

        async def worker(index: int) -> None:
            for n in range(20):
                record = b"op/%d/%d" % (index, n)

                async def operation(txn: Transaction, record: bytes = record) -> None:
                    if await txn.get(record) is None:
                        txn.set(record, b"done")
                        txn.set(b"sum", i64(int.from_bytes(await txn.get(b"sum") or b"", "little") + 1))

                await run(store, operation, idempotent=True, deadline_ms=20_000, rng=faults.rng, sleep=no_sleep)

        await asyncio.gather(*(worker(index) for index in range(10)))
        assert faults.injected > 100
        store.faults = None
        assert (await contents(store))[b"sum"] == i64(200)

    asyncio.run(main())


def test_faults_repeat_with_their_seed() -> None:
    async def history(seed: int) -> list[str]:
        faults = KvFaults(random.Random(seed), commit_conflict=0.3, unknown_applied=0.3, read_too_old=0.2)
        store = MemoryKv(faults=faults)
        seen: list[str] = []
        for i in range(100):
            txn = store.transaction()
            try:
                await txn.get(b"a")
                txn.set(b"a", b"%d" % i)
                await txn.commit()
                seen.append("ok")
            except Exception as error:
                seen.append(type(error).__name__)
        return seen

    first = asyncio.run(history(4))
    assert first == asyncio.run(history(4))
    assert first != asyncio.run(history(5))
    assert {"ok", "Conflict", "CommitUnknown", "TooOld"} == set(first)
