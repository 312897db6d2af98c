"""The LMDB engine on a slow disk: a thread writes to the log, and the loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fs3.kv.api import CommitUnknown, StoreFull, Unavailable
from fs3.kv.lmdb import LmdbKv
from fs3.kv.lmdb_wal import Entry

from .suite import KvConformance
from .support import DEADLINE_S, contents, expect_conflict, slow_log, write


class TestLmdbWithSlowLog(KvConformance):
    def open_kv(self, clock: Callable[[], int] | None = None) -> LmdbKv:
        path = self.tmp_path / "kv"
        store = LmdbKv(path, durable=True) if clock is None else LmdbKv(path, durable=True, now_ms=clock)
        return slow_log(store)


class Disk:
    """Stands before the log of a store: writes wait for `go`, and fail with `failure`."""

    def __init__(self, store: LmdbKv) -> None:
        self.store = slow_log(store)
        self.go = threading.Event()
        self.failure: OSError | None = None
        self.threads: list[str] = []
        self._begun = threading.Semaphore(0)
        wal = store._shared.wal
        assert wal is not None
        self._write = wal.write
        wal.write = self._held  # type: ignore[method-assign]

    def _held(self, entry: Entry) -> None:
        self.threads.append(threading.current_thread().name)
        self._begun.release()
        assert self.go.wait(DEADLINE_S)
        if self.failure is not None:
            raise self.failure
        self._write(entry)

    async def begun(self) -> None:
        """Return when a write has begun, which the loop may not wait for itself."""
        assert await asyncio.to_thread(self._begun.acquire, timeout=DEADLINE_S)

    def begin(self, key: bytes, *, unhurried: bool = False) -> asyncio.Task[None]:
        txn = self.store.transaction()
        txn.set(key, b"1")
        if unhurried:
            txn.unhurried()
        return asyncio.create_task(txn.commit())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[], Disk]]:
    made: list[Disk] = []

    def make() -> Disk:
        made.append(Disk(LmdbKv(tmp_path / "kv", durable=True)))
        return made[-1]

    yield make
    for each in made:
        each.go.set()


async def reopened(disk: Disk) -> dict[bytes, bytes]:
    await disk.store.close()
    store = LmdbKv(disk.store.path, durable=True)
    found = await contents(store)
    await store.close()
    return found


def test_nothing_is_visible_before_it_is_in_the_log_and_what_came_meanwhile_goes_together(
    disk: Callable[[], Disk],
) -> None:
    async def scenario() -> None:
        held = disk()
        store = held.store
        first = held.begin(b"first")
        await held.begun()
        assert held.threads == ["fs3-kv-log"]
        batches = store.batches
        others = [held.begin(b"%d" % i, unhurried=i % 2 == 0) for i in range(6)]
        for _ in range(10):
            assert await contents(store) == {}
        assert not any(task.done() for task in (first, *others))
        held.go.set()
        await asyncio.gather(first, *others)
        assert store.batches == batches + 2
        assert len(await reopened(held)) == 7

    asyncio.run(scenario())


def test_what_reads_while_a_commit_is_under_way_conflicts_with_it(disk: Callable[[], Disk]) -> None:
    async def scenario() -> None:
        held = disk()
        first = held.begin(b"a")
        await held.begun()
        txn = held.store.transaction()
        assert await txn.get(b"a") is None
        txn.set(b"b", b"1")
        second = asyncio.create_task(expect_conflict(txn))
        held.go.set()
        await asyncio.gather(first, second)
        assert await reopened(held) == {b"a": b"1"}

    asyncio.run(scenario())


def test_a_full_disk_refuses_each_commit_by_itself_and_others_succeed_later(disk: Callable[[], Disk]) -> None:
    async def scenario() -> None:
        held = disk()
        held.failure = OSError(errno.ENOSPC, "No space left on device")
        commits = [held.begin(b"%d" % i) for i in range(3)]
        await held.begun()
        held.go.set()
        for outcome in await asyncio.gather(*commits, return_exceptions=True):
            assert isinstance(outcome, StoreFull)
        held.failure = None
        await write(held.store, {b"later": b"1"})
        assert await reopened(held) == {b"later": b"1"}

    asyncio.run(scenario())


def test_after_a_failed_write_the_outcome_is_unknown_and_the_store_refuses(disk: Callable[[], Disk]) -> None:
    async def scenario() -> None:
        held = disk()
        held.failure = OSError(errno.EIO, "Input/output error")
        commits = [held.begin(b"%d" % i) for i in range(2)]
        await held.begun()
        waiting = held.begin(b"waiting")
        held.go.set()
        outcomes = await asyncio.gather(*commits, waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [CommitUnknown, CommitUnknown, Unavailable]
        await held.store.close()

    asyncio.run(scenario())


def test_a_close_waits_for_the_log_and_for_what_came_meanwhile(disk: Callable[[], Disk]) -> None:
    async def scenario() -> None:
        held = disk()
        first = held.begin(b"first")
        await held.begun()
        second = held.begin(b"second", unhurried=True)
        await asyncio.sleep(0)
        closing = asyncio.create_task(reopened(held))
        await asyncio.sleep(0)
        assert not closing.done()
        held.go.set()
        await asyncio.gather(first, second)
        assert await closing == {b"first": b"1", b"second": b"1"}
        names = {thread.name for thread in threading.enumerate()}
        assert not names & {"fs3-kv-log", "fs3-kv-committer"}

    asyncio.run(scenario())


def test_a_commit_that_is_cancelled_while_its_record_is_written_takes_effect(disk: Callable[[], Disk]) -> None:
    async def scenario() -> None:
        held = disk()
        cancelled = held.begin(b"a")
        await held.begun()
        cancelled.cancel()
        second = held.begin(b"b")
        held.go.set()
        await second
        assert cancelled.cancelled()
        assert await reopened(held) == {b"a": b"1", b"b": b"1"}

    asyncio.run(scenario())
