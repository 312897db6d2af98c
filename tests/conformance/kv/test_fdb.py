"""The FoundationDB engine on a real server: the common suite. `make test-fdb` runs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from fs3.kv import api
from fs3.kv.api import KvStore, TooOld
from fs3.kv.fdb import FdbKv

from .fdb_server import erase, skip_without_server
from .suite import KvConformance
from .support import DEADLINE_S, write

skip_without_server()


class TestFdb(KvConformance):
    @pytest.fixture(autouse=True)
    def _leave_nothing(self) -> Iterator[None]:
        erase()
        yield
        erase()

    def open_kv(self, clock: Callable[[], int] | None = None) -> FdbKv:
        if clock is not None:
            pytest.skip("a server has its own clock")
        return FdbKv()

    @pytest.mark.skip(reason="how much a server remembers is not ours to set")
    def test_a_snapshot_older_than_the_remembered_commits_is_too_old(self) -> None:  # type: ignore[override]
        pass

    def test_a_snapshot_becomes_too_old(self) -> None:
        async def body(_: KvStore) -> None:
            # With a timeout longer than snapshots live, so that it is not what ends the transaction.
            store = FdbKv(timeout_ms=int(DEADLINE_S * 1000))
            txn, blind = store.transaction(), store.transaction()
            await txn.get(b"a")
            txn.set(b"b", b"1")
            blind.set(b"c", b"1")
            started_s = time.monotonic()
            with pytest.raises(TooOld):
                while True:
                    await txn.get(b"a", snapshot=True)
                    # A server ages snapshots by versions, which commits advance.
                    await write(store, {b"clock": b""})
            assert time.monotonic() - started_s > api.TRANSACTION_MS_MAX / 1000 / 2
            with pytest.raises(TooOld):
                await txn.commit()
            await blind.commit()
            await store.close()

        self.go(body)
