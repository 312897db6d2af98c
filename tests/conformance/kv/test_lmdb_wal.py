"""The LMDB engine's log: what was acknowledged survives the loss of everything that was not synced."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs3.kv import lmdb_records as records
from fs3.kv import lmdb_wal
from fs3.kv.api import CommitUnknown, KvError, StoreFull, Unavailable
from fs3.kv.lmdb import LmdbKv

from .suite import KvConformance
from .support import contents, write


class TestDurableLmdb(KvConformance):
    def open_kv(self, clock: Callable[[], int] | None = None) -> LmdbKv:
        path = self.tmp_path / "kv"
        return LmdbKv(path, durable=True) if clock is None else LmdbKv(path, durable=True, now_ms=clock)


@pytest.fixture
def boots(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to let the machine restart."""
    count = 0

    def restart() -> None:
        nonlocal count
        count += 1
        boot = f"boot-{count}"
        monkeypatch.setattr(lmdb_wal, "boot_id", lambda: boot)

    restart()
    return restart


def image(store: Path, to: Path, tree: str, rng: random.Random) -> Path:
    """What a power loss may leave of a store: everything synced, and of the tree whatever happened to be written."""
    while True:
        try:
            shutil.copytree(store, to, ignore=shutil.ignore_patterns("lock.mdb"))
            break
        except shutil.Error as exc:
            # A snapshot that was just finished has taken away a segment of the log: that was no moment in time.
            if not all("No such file" in why for _, _, why in exc.args[0]):
                raise
            shutil.rmtree(to)
    data = to / "data.mdb"
    if tree == "lost":
        data.unlink()
    elif tree == "torn":
        content = bytearray(data.read_bytes())
        for _ in range(len(content) // 8192):
            page = rng.randrange(len(content) // 4096)
            content[page * 4096 : page * 4096 + 4096] = bytes(4096)
        data.write_bytes(content)
    return to


async def churn(store: LmdbKv, model: dict[bytes, bytes], rng: random.Random, commits: int) -> None:
    for _ in range(commits):
        txn = store.transaction()
        changed = dict(model)
        for _ in range(rng.randint(1, 6)):
            key = b"%03d" % rng.randrange(200) + b"k" * rng.choice((0, 5, 600))
            match rng.randrange(8):
                case 0:
                    txn.clear(key)
                    changed.pop(key, None)
                case 1:
                    end = key + b"\x7f"
                    txn.clear_range(key, end)
                    changed = {k: v for k, v in changed.items() if not key <= k < end}
                case _:
                    value = rng.randbytes(rng.choice((0, 8, 300, 5000)))
                    txn.set(key, value)
                    changed[key] = value
        await txn.commit()
        model.clear()
        model.update(changed)


@pytest.mark.parametrize("tree", ["whole", "torn", "lost"])
@pytest.mark.parametrize("seed", range(8))
def test_what_was_acknowledged_survives_the_loss_of_the_tree(
    tmp_path: Path, tree: str, seed: int, boots: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmdb_wal, "SEGMENT_BYTES", 40_000)
    monkeypatch.setattr(lmdb_wal, "EXTEND_BYTES", 8_192)
    monkeypatch.setattr(lmdb_wal, "LOG_BYTES_MIN", 100_000)
    rng = random.Random(seed)

    async def scenario() -> None:
        path, model = tmp_path / "0", dict[bytes, bytes]()
        for life in range(1, 5):
            store = LmdbKv(path, durable=True)
            assert await contents(store) == model
            await churn(store, model, rng, rng.randint(0, 80))
            crashed = image(path, tmp_path / str(life), tree, rng)
            await store.close()
            segments = lmdb_wal.segments(crashed)
            if rng.random() < 0.5 and segments:
                # A commit that was under way: part of its record is there.
                tear(crashed / f"wal.{segments[-1]:016d}", rng)
            path = crashed
            boots()
        store = LmdbKv(path, durable=True)
        assert await contents(store) == model
        await store.close()

    asyncio.run(scenario())


def tear(segment: Path, rng: random.Random) -> None:
    with open(segment, "r+b") as log:
        end = log_end(log.read())
        log.seek(end)
        torn = lmdb_wal.encode(lmdb_wal.Record(1 << 40, [], {b"000": b"never acknowledged"}))
        log.write(torn[: rng.randrange(len(torn))])


def log_end(data: bytes) -> int:
    at = 0
    while (found := lmdb_wal.decode(data, at)) is not None:
        at = found[1]
    return at


def test_snapshots_bound_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_wal, "SEGMENT_BYTES", 50_000)
    monkeypatch.setattr(lmdb_wal, "LOG_BYTES_MIN", 100_000)

    async def scenario() -> None:
        store = LmdbKv(tmp_path / "kv", durable=True)
        for number in range(600):
            await write(store, {b"%d" % (number % 10): os.urandom(1000)})
            store._shared.snapshots.wait()
        assert (tmp_path / "kv" / "snapshot.mdb").exists()
        assert lmdb_wal.segments(tmp_path / "kv")[0] > 0
        assert len(lmdb_wal.segments(tmp_path / "kv")) < 10
        await store.close()

    asyncio.run(scenario())


def test_versions_and_stamps_go_on_after_a_power_loss(tmp_path: Path, boots: Callable[[], None]) -> None:
    async def stamp(store: LmdbKv) -> bytes:
        txn = store.transaction()
        txn.set_versionstamped_key(b"log/", b"", b"x")
        await txn.commit()
        return txn.versionstamp()

    async def scenario() -> None:
        stamps = []
        for _ in range(4):
            store = LmdbKv(tmp_path / "kv", durable=True)
            stamps += [await stamp(store) for _ in range(5)]
            read = store.transaction()
            assert await read.get_read_version() == int.from_bytes(stamps[-1][:8], "big")
            read.cancel()
            await store.close()
            boots()
        assert stamps == sorted(set(stamps))
        store = LmdbKv(tmp_path / "kv", durable=True)
        assert [key for key, _ in sorted((await contents(store)).items())] == [b"log/" + s for s in stamps]
        await store.close()

    asyncio.run(scenario())


def test_a_store_of_the_first_format_gets_a_log(tmp_path: Path, boots: Callable[[], None]) -> None:
    path = tmp_path / "kv"
    path.mkdir()
    env = lmdb.open(str(path))
    with env.begin(write=True) as txn:
        txn.put(records.FORMAT_KEY, records.encode_format(1))
        txn.put(b"old", b"value")
    env.close()

    async def scenario() -> None:
        store = LmdbKv(path, durable=True)
        await write(store, {b"new": b"value"})
        await store.close()
        (path / "data.mdb").write_bytes(b"\0" * 20_000)
        boots()
        store = LmdbKv(path, durable=True)
        assert await contents(store) == {b"old": b"value", b"new": b"value"}
        await store.close()

    asyncio.run(scenario())


def test_durability_can_be_taken_up_again(tmp_path: Path, boots: Callable[[], None]) -> None:
    path = tmp_path / "kv"

    async def put(durable: bool, key: bytes) -> None:
        store = LmdbKv(path, durable=durable)
        await write(store, {key: b"x"})
        await store.close()

    async def scenario() -> None:
        await put(True, b"a")
        await put(False, b"b")
        await put(True, b"c")
        (path / "data.mdb").unlink()
        boots()
        store = LmdbKv(path, durable=True)
        assert set(await contents(store)) == {b"a", b"b", b"c"}
        await store.close()

    asyncio.run(scenario())


def test_damage_before_sound_records_is_refused_and_named(tmp_path: Path, boots: Callable[[], None]) -> None:
    path = tmp_path / "kv"

    async def scenario() -> None:
        store = LmdbKv(path, durable=True)
        for number in range(20):
            await write(store, {b"%d" % number: b"x" * 100})
        await store.close()

    asyncio.run(scenario())
    with open(path / "wal.0000000000000000", "r+b") as log:
        log.seek(700)
        byte = log.read(1)[0]
        log.seek(700)
        log.write(bytes([byte ^ 1]))
    boots()
    with pytest.raises(KvError, match=r"wal\.0+ is damaged at byte"):
        LmdbKv(path, durable=True)


def failing_pwrite(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def pwrite(fd: int, data: Any, offset: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", pwrite)


def test_a_log_that_cannot_be_written_makes_the_outcome_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        store = LmdbKv(tmp_path / "kv", durable=True)
        await write(store, {b"a": b"1"})
        with monkeypatch.context() as patched:
            failing_pwrite(patched, errno.EIO)
            with pytest.raises(CommitUnknown):
                await write(store, {b"b": b"1"})
        with pytest.raises(Unavailable):
            await write(store, {b"c": b"1"})
        await store.close()

    asyncio.run(scenario())


def test_a_full_disk_refuses_the_commit_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        store = LmdbKv(tmp_path / "kv", durable=True)
        await write(store, {b"a": b"1"})
        with monkeypatch.context() as patched:
            failing_pwrite(patched, errno.ENOSPC)
            with pytest.raises(StoreFull):
                await write(store, {b"b": b"1"})
        await write(store, {b"c": b"1"})
        assert await contents(store) == {b"a": b"1", b"c": b"1"}
        await store.close()

    asyncio.run(scenario())


def test_a_commit_that_the_tree_refused_does_not_come_back(
    tmp_path: Path, boots: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kv"

    async def scenario() -> None:
        store = LmdbKv(path, durable=True)
        await write(store, {b"a": b"1"})
        committer = store._shared.committer
        begin = committer._begin

        class Refusing:
            def __init__(self, txn: Any) -> None:
                self._txn = txn

            def __getattr__(self, name: str) -> Any:
                return getattr(self._txn, name)

            def commit(self) -> None:
                self._txn.abort()
                raise lmdb.MapFullError("full")

        with monkeypatch.context() as patched:
            patched.setattr(committer, "_begin", lambda: Refusing(begin()))
            patched.setattr(records, "put", lambda txn, key, value: txn._txn.put(key, value))
            patched.setattr(records, "get", lambda txn, key: txn._txn.get(key))
            txn = store.transaction()
            txn.add(b"b", 1)
            with pytest.raises(StoreFull):
                await txn.commit()
        await store.close()
        boots()
        store = LmdbKv(path, durable=True)
        assert await contents(store) == {b"a": b"1"}
        await store.close()

    asyncio.run(scenario())


KEYS = st.binary(min_size=1, max_size=40)


@given(
    st.integers(0, 2**64 - 1),
    st.lists(st.tuples(KEYS, KEYS), max_size=4),
    st.dictionaries(KEYS, st.none() | st.binary(max_size=200), max_size=8),
    st.binary(max_size=30),
)
def test_records_decode_to_what_was_encoded_and_cut_ones_to_nothing(
    version: int, ranges: list[tuple[bytes, bytes]], changes: dict[bytes, bytes | None], before: bytes
) -> None:
    record = lmdb_wal.Record(version, ranges, changes)
    data = lmdb_wal.encode(record)
    assert lmdb_wal.decode(before + data + b"rest", len(before)) == (record, len(before) + len(data))
    assert lmdb_wal.decode(data[:-1], 0) is None
    broken = bytearray(data)
    broken[len(data) // 2] ^= 0x40
    assert lmdb_wal.decode(bytes(broken), 0) is None
