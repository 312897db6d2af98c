"""What the parts of the suite share: a store per test, a clock, and short-hands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from fs3.kv.api import Conflict, KvStore, Transaction

DEADLINE_S = 30.0
ALL = (b"", b"\xff")


def i64(value: int) -> bytes:
    return (value & (2**64 - 1)).to_bytes(8, "little")


class Clock:
    """A monotonic clock in milliseconds that only the test moves."""

    def __init__(self) -> None:
        self.ms = 1_000_000

    def __call__(self) -> int:
        return self.ms


async def write(store: KvStore, pairs: dict[bytes, bytes]) -> None:
    txn = store.transaction()
    for key, value in pairs.items():
        txn.set(key, value)
    await txn.commit()


async def contents(store: KvStore) -> dict[bytes, bytes]:
    txn = store.transaction()
    rows = await txn.get_range(*ALL)
    txn.cancel()
    return dict(rows)


async def expect_conflict(txn: Transaction) -> None:
    with pytest.raises(Conflict):
        await txn.commit()


class KvSuite:
    """Subclasses define ``open_kv``; every test opens its own empty store."""

    def open_kv(self, clock: Callable[[], int] | None = None) -> Any:
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def _keep_tmp_path(self, tmp_path: Any) -> None:
        self.tmp_path = tmp_path

    @asynccontextmanager
    async def store(self, clock: Callable[[], int] | None = None) -> AsyncIterator[KvStore]:
        store = self.open_kv(clock)
        try:
            yield store
        finally:
            await store.close()

    def go(self, body: Callable[[KvStore], Awaitable[None]], clock: Callable[[], int] | None = None) -> None:
        async def main() -> None:
            opened: AbstractAsyncContextManager[KvStore] = self.store(clock)
            async with opened as store:
                await asyncio.wait_for(body(store), DEADLINE_S)

        asyncio.run(main())
