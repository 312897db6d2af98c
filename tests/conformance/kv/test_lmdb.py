"""The LMDB engine: the common suite, and what only several processes and a disk can show."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest

from fs3.kv import lmdb_commit
from fs3.kv import lmdb_records as records
from fs3.kv.api import CommitUnknown, Conflict, KvError, StoreFull, TooOld, Unavailable
from fs3.kv.lmdb import LmdbKv

from .suite import KvConformance
from .support import Clock, contents, i64, write

CHILD = Path(__file__).with_name("lmdb_child.py")
ROOT = Path(__file__).parents[3]
DEADLINE_S = 30.0


@contextmanager
def child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, str(CHILD), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=DEADLINE_S)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


class TestLmdb(KvConformance):
    def open_kv(self, clock: Callable[[], int] | None = None) -> LmdbKv:
        path = self.tmp_path / "kv"
        return LmdbKv(path, durable=False) if clock is None else LmdbKv(path, durable=False, now_ms=clock)


@pytest.mark.parametrize("durable", [True, False])
def test_processes_count_together_and_a_killed_one_loses_nothing_acknowledged(tmp_path: Path, durable: bool) -> None:
    path = str(tmp_path / "kv")
    mode = "durable" if durable else "fast"
    times = 60 if durable else 300
    acknowledged: dict[str, list[str]] = {}
    with child("count", path, "a", str(times), mode) as a, child("count", path, "b", str(times), mode) as b:
        with child("count", path, "victim", "1000000", mode) as victim:
            seen = [line_of(victim) for _ in range(40)]
            victim.send_signal(signal.SIGKILL)
            rest, _ = victim.communicate(timeout=DEADLINE_S)
            # The last line may have been cut by the kill.
            acknowledged["victim"] = seen + [
                line[:-1] for line in rest.splitlines(keepends=True) if line.endswith("\n")
            ]
        for name, process in (("a", a), ("b", b)):
            out, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0
            acknowledged[name] = out.split()
            assert len(acknowledged[name]) == times

    async def check() -> None:
        store = LmdbKv(path, durable=durable)
        found = await contents(store)
        await store.close()
        for name, numbers in acknowledged.items():
            for number in numbers:
                assert f"done/{name}/{int(number):06}".encode() in found
        done = sum(key.startswith(b"done/") for key in found)
        assert found[b"counter"] == i64(done)
        assert found[b"added"] == i64(done)

    asyncio.run(check())


def test_a_process_killed_with_the_writer_lock_blocks_neither_reads_nor_later_commits(tmp_path: Path) -> None:
    path = tmp_path / "kv"

    async def main() -> None:
        store = LmdbKv(path, durable=False)
        await write(store, {b"a": b"1"})
        with child("hold", str(path), "writer") as holder:
            assert line_of(holder) == "holding"
            commit = asyncio.create_task(write(store, {b"b": b"2"}))
            for _ in range(20):
                assert await contents(store) == {b"a": b"1"}
            assert not commit.done()
            holder.send_signal(signal.SIGKILL)
            await asyncio.wait_for(commit, DEADLINE_S)
        assert await contents(store) == {b"a": b"1", b"b": b"2"}
        await store.close()

    asyncio.run(main())


@pytest.mark.parametrize("when", ["on open", "while open"])
def test_the_slot_of_a_reader_that_died_is_freed(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kv"
    monkeypatch.setattr(lmdb_commit, "READER_CHECK_INTERVAL_S", 0.02 if when == "while open" else 3600.0)

    async def main() -> None:
        store = LmdbKv(path, durable=False)
        # Two, because LMDB starts the table afresh when nobody else has the directory open.
        with child("hold", str(path), "reader") as other, child("hold", str(path), "reader") as holder:
            assert line_of(holder) == line_of(other) == "holding"
            if when == "on open":
                await store.close()
            holder.kill()
            holder.wait(DEADLINE_S)
            if when == "on open":
                store = LmdbKv(path, durable=False)
            deadline = time.monotonic() + DEADLINE_S
            while str(holder.pid) in store._env.readers() and time.monotonic() < deadline:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert str(holder.pid) not in store._env.readers()
            assert str(other.pid) in store._env.readers()
        await store.close()

    asyncio.run(main())


def test_a_commit_of_another_process_conflicts(tmp_path: Path) -> None:
    path = tmp_path / "kv"

    async def main() -> None:
        store = LmdbKv(path, durable=False)
        await write(store, {b"m": b"0", b"n": b"0"})
        touched, untouched = store.transaction(), store.transaction()
        await touched.get_range(b"m", b"n")
        await untouched.get(b"n")
        with child("write", str(path), "m", "0") as other:
            assert other.wait(DEADLINE_S) == 0
        touched.set(b"x", b"1")
        untouched.set(b"y", b"1")
        with pytest.raises(Conflict):
            await touched.commit()
        await untouched.commit()
        assert await contents(store) == {b"m": b"2", b"n": b"0", b"y": b"1"}
        await store.close()

    asyncio.run(main())


def test_a_snapshot_older_than_the_stored_log_is_refused_rather_than_misjudged(tmp_path: Path) -> None:
    path = tmp_path / "kv"

    async def main() -> None:
        store = LmdbKv(path, durable=False)
        await write(store, {b"m": b"0"})
        txn = store.transaction()
        await txn.get(b"n")
        # One process writes what was read here; another, whose clock is ahead, forgets that.
        for key, ahead_ms in (("n", 0), ("elsewhere", 1_000_000)):
            with child("write", str(path), key, str(ahead_ms)) as other:
                assert other.wait(DEADLINE_S) == 0
        txn.set(b"x", b"1")
        with pytest.raises(TooOld):
            await txn.commit()
        await store.close()

    asyncio.run(main())


def test_concurrent_commits_share_lmdb_transactions(tmp_path: Path) -> None:
    async def main() -> None:
        store = LmdbKv(tmp_path / "kv")
        await write(store, {b"a": b"1"})
        before = store.batches
        await asyncio.gather(*(write(store, {b"k%d" % i: b"v"}) for i in range(400)))
        assert store.batches - before <= 4
        assert len(await contents(store)) == 401
        await store.close()

    asyncio.run(main())


async def unhurried(store: LmdbKv, key: bytes) -> None:
    txn = store.transaction()
    txn.set(key, b"x")
    txn.unhurried()
    await txn.commit()


def test_an_unhurried_commit_shares_the_write_of_one_that_comes_soon_after(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = LmdbKv(tmp_path / "kv", durable=True)
        before = store.batches
        waiting = asyncio.create_task(unhurried(store, b"a"))
        await asyncio.sleep(0)
        await write(store, {b"b": b"y"})
        await waiting
        assert store.batches == before + 1
        assert await contents(store) == {b"a": b"x", b"b": b"y"}
        await store.close()

    asyncio.run(scenario())


def test_unhurried_commits_that_never_meet_another_one_stop_waiting(tmp_path: Path) -> None:
    async def scenario() -> None:
        store = LmdbKv(tmp_path / "kv", durable=True)
        waits = 0
        for number in range(300):
            commit = asyncio.create_task(unhurried(store, b"%d" % number))
            await asyncio.sleep(0)
            waits += len(store._unhurried)
            await asyncio.wait_for(commit, DEADLINE_S)
        assert 1 <= waits <= 10
        assert len(await contents(store)) == 300
        await store.close()

    asyncio.run(scenario())


def test_after_a_slow_commit_a_thread_commits_while_the_loop_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        store = LmdbKv(tmp_path / "kv", durable=False)
        committer = store._shared.committer
        threads: list[str] = []
        commit = committer._commit

        def recorded(batch: Any) -> Any:
            threads.append(threading.current_thread().name)
            return commit(batch)

        monkeypatch.setattr(committer, "_commit", recorded)
        await write(store, {b"a": b"1"})
        monkeypatch.setattr(lmdb_commit, "INLINE_COMMIT_S_MAX", -1.0)
        await write(store, {b"b": b"1"})
        await write(store, {b"c": b"1"})
        assert threads == ["MainThread", "MainThread", "fs3-kv-committer"]
        assert await contents(store) == {b"a": b"1", b"b": b"1", b"c": b"1"}
        await store.close()

    asyncio.run(scenario())


def test_commits_queued_before_a_close_are_done_and_survive_it(tmp_path: Path) -> None:
    async def main() -> None:
        store = LmdbKv(tmp_path / "kv")
        tasks = [asyncio.create_task(write(store, {b"k%d" % i: b"v"})) for i in range(10)]
        await asyncio.sleep(0)
        await store.close()
        await asyncio.gather(*tasks)
        again = LmdbKv(tmp_path / "kv")
        assert len(await contents(again)) == 10
        await again.close()

    asyncio.run(main())


def test_versions_and_stamps_go_on_after_reopen_and_after_a_compacting_copy(tmp_path: Path) -> None:
    async def stamp(path: Path) -> bytes:
        store = LmdbKv(path, durable=False)
        txn = store.transaction()
        txn.set_versionstamped_key(b"q/", b"", b"v")
        await txn.commit()
        await store.close()
        return txn.versionstamp()

    async def main() -> None:
        stamps = [await stamp(tmp_path / "kv") for _ in range(20)]
        (tmp_path / "copy").mkdir()
        with lmdb.open(str(tmp_path / "kv"), map_size=1 << 30) as env:
            env.copy(str(tmp_path / "copy"), compact=True)
        stamps += [await stamp(tmp_path / "copy") for _ in range(3)]
        assert stamps == sorted(set(stamps))

    asyncio.run(main())


def test_two_handles_in_one_process_share_the_directory(tmp_path: Path) -> None:
    async def main() -> None:
        one, two = LmdbKv(tmp_path / "kv", durable=False), LmdbKv(tmp_path / "kv", durable=False)
        txn = one.transaction()
        await txn.get(b"a")
        txn.set(b"b", b"1")
        await write(two, {b"a": b"1"})
        with pytest.raises(Conflict):
            await txn.commit()
        with pytest.raises(KvError, match="already open"):
            LmdbKv(tmp_path / "kv", durable=True)
        await one.close()
        assert await contents(two) == {b"a": b"1"}
        await two.close()

    asyncio.run(main())


def test_a_full_map_is_reported_and_small_commits_and_removals_still_work(tmp_path: Path) -> None:
    async def main() -> None:
        store = LmdbKv(tmp_path / "kv", durable=False, map_bytes=4 << 20)

        async def fill() -> None:
            for i in range(1000):
                await write(store, {b"big/%d" % i: b"v" * 90_000})

        with pytest.raises(StoreFull, match="map_bytes"):
            await fill()
        assert len(await contents(store)) > 10
        large = {b"big/x%d" % i: b"v" * 90_000 for i in range(20)}
        refused, fitting = await asyncio.gather(
            write(store, large), write(store, {b"small": b"1"}), return_exceptions=True
        )
        assert isinstance(refused, StoreFull)
        assert fitting is None
        txn = store.transaction()
        txn.clear_range(b"big/", b"big0")
        await txn.commit()
        for _ in range(3):  # LMDB reuses the pages that a transaction freed two transactions later
            await write(store, {b"small": b"2"})
        await write(store, {b"again": b"v" * 90_000})
        assert sorted(await contents(store)) == [b"again", b"small"]
        await store.close()

    asyncio.run(main())


def test_one_transaction_that_cannot_be_written_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    async def main() -> None:
        store = LmdbKv(tmp_path / "kv", durable=False)
        bad = store.transaction()
        bad.set(b"bad", b"1")
        bad._writes[b""] = b"LMDB refuses empty keys"
        results = await asyncio.gather(bad.commit(), write(store, {b"good": b"1"}), return_exceptions=True)
        assert isinstance(results[0], KvError)
        assert results[1] is None
        assert await contents(store) == {b"good": b"1"}
        await store.close()

    asyncio.run(main())


class _FailingCommit:
    """An LMDB write transaction whose commit fails as on a disk error."""

    def __init__(self, txn: Any) -> None:
        self._txn = txn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._txn, name)

    def commit(self) -> None:
        self._txn.abort()
        raise lmdb.DiskError("mdb_txn_commit: Input/output error")


def test_after_a_failed_sync_the_outcome_is_unknown_and_the_store_refuses(tmp_path: Path) -> None:
    async def main() -> None:
        store = LmdbKv(tmp_path / "kv", durable=False)
        committer = store._shared.committer
        begin = committer._begin
        committer._begin = lambda: _FailingCommit(begin())  # type: ignore[method-assign]
        with pytest.raises(CommitUnknown):
            await write(store, {b"a": b"1"})
        committer._begin = begin  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="reopened"):
            await write(store, {b"a": b"1"})
        await store.close()
        store = LmdbKv(tmp_path / "kv", durable=False)
        await write(store, {b"a": b"1"})
        await store.close()

    asyncio.run(main())


def test_a_forgotten_snapshot_is_taken_away_after_its_time(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        store = LmdbKv(tmp_path / "kv", durable=False, now_ms=clock)
        forgotten, fresh = store.transaction(), store.transaction()
        await forgotten.get(b"a")
        clock.ms += 5_001
        await fresh.get(b"a")
        deadline = time.monotonic() + DEADLINE_S
        while forgotten._reader is not None and time.monotonic() < deadline:  # noqa: ASYNC110 - a timer, no event
            await asyncio.sleep(0.05)
        assert forgotten._reader is None
        assert await fresh.get(b"a") is None
        with pytest.raises(TooOld):
            await forgotten.get(b"a")
        fresh.cancel()
        await store.close()

    asyncio.run(main())


def test_the_stored_conflict_log_is_pruned(tmp_path: Path) -> None:
    clock = Clock()

    async def main() -> None:
        store = LmdbKv(tmp_path / "kv", durable=False, now_ms=clock)
        for i in range(100):
            clock.ms += 1_000
            await write(store, {b"k%d" % i: b"v"})
        with store._env.begin() as txn:
            logged = [key for key, _ in txn.cursor() if key.startswith(records.LOG_PREFIX)]
        assert 1 <= len(logged) <= 10
        await store.close()

    asyncio.run(main())


def test_unusable_directories_are_refused_with_the_reason(tmp_path: Path) -> None:
    def tamper(name: str, key: bytes, value: bytes) -> Path:
        path = tmp_path / name
        path.mkdir()
        with lmdb.open(str(path), map_size=1 << 20) as env, env.begin(write=True) as txn:
            txn.put(key, value)
        return path

    newer = tamper("newer", records.FORMAT_KEY, records.encode_format(records.FORMAT + 1))
    with pytest.raises(KvError, match="upgrade fs3"):
        LmdbKv(newer)
    with pytest.raises(KvError, match="another program"):
        LmdbKv(tamper("foreign", b"k", b"v"))
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "data.mdb").write_bytes(b"x" * 65536)
    with pytest.raises(KvError, match="garbage"):
        LmdbKv(garbage)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KvError, match="file"):
        LmdbKv(tmp_path / "file")


def test_log_records_decode_to_what_was_encoded() -> None:
    keys = [b"a", b"", b"k" * 10_000, b"\x00\xff"]
    ranges = [(b"", b"z"), (b"k" * 10_001, b"\xff")]
    entry = records.decode_log(7, records.encode_log(123, keys, ranges))
    assert (entry.version, entry.at_ms, list(entry.keys), list(entry.ranges)) == (7, 123, keys, ranges)
    assert records.decode_log(7, records.encode_log(1, [], [])).keys == []
