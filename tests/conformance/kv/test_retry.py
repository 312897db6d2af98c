"""The retry loop and opening by URL."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from fs3.kv.api import CommitUnknown, Conflict, KvError, Transaction, Unavailable
from fs3.kv.faults import KvFaults
from fs3.kv.lmdb import LmdbKv
from fs3.kv.memory import MemoryKv
from fs3.kv.open import open_store
from fs3.kv.retry import BACKOFF_MS_MAX, run


class Time:
    """A clock that only ``sleep`` moves."""

    def __init__(self) -> None:
        self.ms = 0.0
        self.pauses: list[float] = []

    def now_ms(self) -> float:
        return self.ms

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds * 1000)
        self.ms += seconds * 1000


def failing(**probabilities: float) -> MemoryKv:
    return MemoryKv(faults=KvFaults(random.Random(1), **probabilities))


async def put(txn: Transaction) -> str:
    txn.set(b"a", b"1")
    return "done"


def test_it_returns_the_result_of_the_attempt_that_committed() -> None:
    async def main() -> None:
        store, time = failing(commit_conflict=0.8), Time()
        result = await run(store, put, rng=random.Random(2), sleep=time.sleep, now_ms=time.now_ms, deadline_ms=1e9)
        assert result == "done"
        assert len(time.pauses) == store.faults.injected > 0  # type: ignore[union-attr]

    asyncio.run(main())


def test_pauses_double_up_to_a_limit_with_jitter_and_end_by_the_deadline() -> None:
    async def main() -> None:
        time = Time()
        with pytest.raises(Conflict):
            await run(
                failing(commit_conflict=1.0),
                put,
                rng=random.Random(2),
                sleep=time.sleep,
                now_ms=time.now_ms,
                deadline_ms=3_000,
            )
        assert 2_000 < time.ms <= 3_000
        for n, pause in enumerate(time.pauses):
            full = min(2.0**n, BACKOFF_MS_MAX)
            assert full / 2 <= pause <= full

    asyncio.run(main())


@pytest.mark.parametrize("idempotent", [True, False])
def test_an_unknown_commit_is_retried_only_when_declared_idempotent(idempotent: bool) -> None:
    async def main() -> None:
        store, time = failing(unknown_applied=0.5), Time()
        results = []
        for _ in range(30):
            try:
                results.append(await run(store, put, idempotent=idempotent, sleep=time.sleep, now_ms=time.now_ms))
            except CommitUnknown:
                results.append("unknown")
        assert ("unknown" in results) is not idempotent
        assert store.faults.injected > 0  # type: ignore[union-attr]
        assert bool(time.pauses) is idempotent

    asyncio.run(main())


def test_once_unknown_the_outcome_stays_unknown() -> None:
    async def main() -> None:
        store, time = failing(unknown_applied=1.0), Time()

        async def turn_away(seconds: float) -> None:
            store.faults = KvFaults(random.Random(1), read_unavailable=1.0)
            await time.sleep(seconds)

        async def read_and_put(txn: Transaction) -> None:
            await txn.get(b"a")
            txn.set(b"a", b"1")

        with pytest.raises(CommitUnknown) as caught:
            await run(store, read_and_put, idempotent=True, sleep=turn_away, now_ms=time.now_ms)
        assert isinstance(caught.value.__cause__, Unavailable)

    asyncio.run(main())


def test_errors_of_the_function_pass_through_and_write_nothing() -> None:
    async def main() -> None:
        store = MemoryKv()
        calls = 0

        async def broken(txn: Transaction) -> None:
            nonlocal calls
            calls += 1
            txn.set(b"a", b"1")
            raise FileExistsError("a")

        with pytest.raises(FileExistsError):
            await run(store, broken)
        assert calls == 1
        txn = store.transaction()
        assert await txn.get(b"a") is None

    asyncio.run(main())


def test_stores_open_by_url(tmp_path: Path) -> None:
    async def main() -> None:
        assert isinstance(open_store("memory:"), MemoryKv)
        for url, durable in ((f"lmdb:{tmp_path}/x", True), (f"lmdb:{tmp_path}/y?durable=0&map_bytes=2097152", False)):
            store = open_store(url)
            assert isinstance(store, LmdbKv)
            assert store._shared.durable is durable
            assert await run(store, put) == "done"
            await store.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("fdb:/does/not/exist", "cannot read the FoundationDB cluster file"),
        ("redis://x", "not a store URL"),
        ("lmdb:", "names no directory"),
        ("lmdb:/x?durable=perhaps", "durable must be"),
        ("lmdb:/x?map_bytes=big", "map_bytes must be"),
        ("lmdb:/x?durability=1", "unknown option 'durability'; known: durable, map_bytes"),
        ("memory:?x=1", "unknown option"),
    ],
)
def test_wrong_urls_are_refused_with_the_reason(url: str, reason: str) -> None:
    with pytest.raises(KvError, match=reason):
        open_store(url)
