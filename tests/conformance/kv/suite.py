"""What every engine must do. An engine's test module subclasses :class:`KvConformance` and gives it a store."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from fs3.kv import api, conflicts
from fs3.kv.api import KvError, KvStore, LimitExceeded, TooOld, UsedAfterCommit, strinc

from .suite_concurrency import KvConcurrency
from .support import ALL, Clock, contents, expect_conflict, i64, write


class KvConformance(KvConcurrency):
    """The whole suite. Subclasses define ``open_kv``; every test opens its own empty store."""

    # Snapshots and own writes.

    def test_a_transaction_reads_from_the_snapshot_of_its_first_read(self) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {b"a": b"1", b"b": b"1"})
            txn = store.transaction()
            assert await txn.get(b"a") == b"1"
            await write(store, {b"a": b"2", b"b": b"2", b"c": b"2"})
            assert await txn.get(b"a") == b"1"
            assert await txn.get(b"b") == b"1"
            assert await txn.get(b"c") is None
            assert await txn.get_range(*ALL) == [(b"a", b"1"), (b"b", b"1")]
            txn.cancel()
            assert await contents(store) == {b"a": b"2", b"b": b"2", b"c": b"2"}

        self.go(body)

    def test_a_new_transaction_sees_every_commit_that_returned(self) -> None:
        async def body(store: KvStore) -> None:
            for i in range(50):
                await write(store, {b"k": i64(i)})
                txn = store.transaction()
                assert await txn.get(b"k") == i64(i)
                txn.cancel()

        self.go(body)

    def test_a_transaction_sees_its_own_writes(self) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {b"a": b"1", b"b": b"1", b"c": b"1", b"d": i64(5)})
            txn = store.transaction()
            txn.set(b"a", b"2")
            txn.clear(b"b")
            txn.set(b"bb", b"new")
            txn.add(b"d", 3)
            txn.add(b"e", -1)
            assert await txn.get(b"a") == b"2"
            assert await txn.get(b"b") is None
            assert await txn.get(b"d") == i64(8)
            assert await txn.get(b"e") == i64(-1)
            rows = [(b"a", b"2"), (b"bb", b"new"), (b"c", b"1"), (b"d", i64(8)), (b"e", i64(-1))]
            assert await txn.get_range(*ALL) == rows
            assert await txn.get_range(*ALL, reverse=True) == rows[::-1]
            assert await txn.get_range(*ALL, limit=2) == rows[:2]
            assert await txn.get_range(*ALL, limit=2, reverse=True) == rows[:-3:-1]
            txn.clear_range(b"b", b"d")
            txn.set(b"c", b"3")
            txn.add(b"bb", 4)
            assert await txn.get(b"bb") == i64(4)
            rows = [(b"a", b"2"), (b"bb", i64(4)), (b"c", b"3"), (b"d", i64(8)), (b"e", i64(-1))]
            assert await txn.get_range(*ALL) == rows
            await txn.commit()
            assert await contents(store) == dict(rows)

        self.go(body)

    def test_nothing_is_visible_before_the_commit_nor_after_a_cancel(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            txn.set(b"a", b"1")
            assert await contents(store) == {}
            txn.cancel()
            txn.cancel()
            assert await contents(store) == {}

        self.go(body)

    def test_clear_range_removes_exactly_the_half_open_range(self) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {bytes([c]): b"v" for c in b"abcdef"})
            txn = store.transaction()
            txn.clear_range(b"b", b"d")
            txn.clear_range(b"c", b"e")
            txn.clear_range(b"x", b"b")
            await txn.commit()
            assert sorted(await contents(store)) == [b"a", b"e", b"f"]

        self.go(body)

    # Ranges.

    def test_ranges_obey_bounds_limit_and_direction(self) -> None:
        async def body(store: KvStore) -> None:
            keys = [b"k%03d" % i for i in range(100)]
            await write(store, {key: key for key in keys})
            txn = store.transaction()

            async def read(begin: bytes, end: bytes, **options: Any) -> list[bytes]:
                return [key for key, _ in await txn.get_range(begin, end, **options)]

            assert await read(b"k", b"l") == keys
            assert await read(keys[10], keys[20]) == keys[10:20]
            assert await read(keys[10], keys[20], reverse=True) == keys[10:20][::-1]
            assert await read(keys[10] + b"\x00", keys[20] + b"\x00") == keys[11:21]
            assert await read(keys[10], keys[20], limit=3) == keys[10:13]
            assert await read(keys[10], keys[20], limit=3, reverse=True) == keys[17:20][::-1]
            assert await read(*ALL, limit=1, reverse=True) == keys[-1:]
            assert await read(keys[10], keys[10]) == []
            assert await read(keys[20], keys[10]) == []
            assert await read(b"", keys[0]) == []
            assert await read(b"l", b"\xff") == []
            assert await read(b"l", b"\xff", reverse=True) == []
            txn.cancel()

        self.go(body)

    def test_keys_of_every_permitted_length_keep_byte_order(self) -> None:
        async def body(store: KvStore) -> None:
            rng = random.Random(5)
            stem = bytes(rng.randrange(255) for _ in range(api.KEY_BYTES_MAX))
            keys = {stem[:n] for n in (1, 2, 509, 510, 511, 512, 513, 1021, 4000, 9999, 10_000)}
            keys |= {stem[:n] + tail for n in (508, 509, 510, 511, 600) for tail in (b"\x00", b"\x01", b"\xfe\xff")}
            model = {key: i64(i) for i, key in enumerate(sorted(keys))}
            await write(store, model)
            assert await contents(store) == model
            ordered = sorted(keys)
            txn = store.transaction()
            for key in ordered:
                assert await txn.get(key) == model[key]
            assert await txn.get(stem[:700]) is None
            for _ in range(200):
                begin, end = sorted((rng.choice(ordered), rng.choice(ordered)))
                want = [key for key in ordered if begin <= key < end]
                assert [key for key, _ in await txn.get_range(begin, end)] == want
                assert [key for key, _ in await txn.get_range(begin, end, reverse=True)] == want[::-1]
                assert [key for key, _ in await txn.get_range(begin, end, limit=2)] == want[:2]
            txn.cancel()
            txn = store.transaction()
            txn.clear_range(ordered[3], ordered[-4])
            txn.clear(ordered[-1])
            txn.add(ordered[0], 1000)
            await txn.commit()
            assert sorted(await contents(store)) == ordered[:3] + ordered[-4:-1]

        self.go(body)

    # Conflicts.

    def test_a_read_key_that_changed_conflicts(self) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {b"a": b"1"})
            txn = store.transaction()
            await txn.get(b"a")
            txn.set(b"other", b"x")
            await write(store, {b"a": b"2"})
            await expect_conflict(txn)
            assert b"other" not in await contents(store)

        self.go(body)

    def test_an_absent_key_that_was_read_and_then_made_conflicts(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            assert await txn.get(b"a") is None
            txn.set(b"a", b"mine")
            await write(store, {b"a": b"theirs"})
            await expect_conflict(txn)
            assert await contents(store) == {b"a": b"theirs"}

        self.go(body)

    @pytest.mark.parametrize("how", ["set", "clear", "clear_range", "add", "stamped_value", "write_conflict"])
    def test_every_kind_of_write_conflicts_with_readers(self, how: str) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {b"a": i64(1)})
            by_key, by_range = store.transaction(), store.transaction()
            await by_key.get(b"a")
            await by_range.get_range(b"a", b"b")
            other = store.transaction()
            if how == "set":
                other.set(b"a", b"2")
            elif how == "clear":
                other.clear(b"a")
            elif how == "clear_range":
                other.clear_range(b"Z", b"aa")
            elif how == "add":
                other.add(b"a", 1)
            elif how == "stamped_value":
                other.set_versionstamped_value(b"a", b"p")
            else:
                other.add_write_conflict_key(b"a")
            await other.commit()
            for txn in (by_key, by_range):
                txn.set(b"out", b"x")
                await expect_conflict(txn)

        self.go(body)

    def test_phantoms_conflict(self) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {b"d/a": b"1"})
            txn = store.transaction()
            await txn.get_range(b"d/", strinc(b"d/"))
            txn.set(b"count", b"1")
            await write(store, {b"d/b": b"1"})
            await expect_conflict(txn)

        self.go(body)

    def test_a_range_conflict_ends_at_its_bounds(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            await txn.get_range(b"b", b"c")
            txn.set(b"x", b"1")
            await write(store, {b"a": b"1", b"c": b"1"})
            await txn.commit()

        self.go(body)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_with_a_limit_the_conflict_range_ends_at_the_last_key_returned(self, reverse: bool) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {bytes([c]): b"v" for c in b"bdfh"})
            beyond, inside = (b"c", b"g") if reverse else (b"g", b"c")
            for changed, collides in ((beyond, False), (inside, True)):
                txn = store.transaction()
                rows = await txn.get_range(b"a", b"z", limit=2, reverse=reverse)
                assert [key for key, _ in rows] == ([b"h", b"f"] if reverse else [b"b", b"d"])
                txn.set(b"~", b"1")
                await write(store, {changed: b"1"})
                if collides:
                    await expect_conflict(txn)
                else:
                    await txn.commit()
                cleanup = store.transaction()
                cleanup.clear(changed)
                await cleanup.commit()

        self.go(body)

    def test_snapshot_reads_do_not_conflict(self) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {b"a": b"1"})
            txn = store.transaction()
            assert await txn.get(b"a", snapshot=True) == b"1"
            assert await txn.get_range(*ALL, snapshot=True) == [(b"a", b"1")]
            txn.set(b"out", b"x")
            await write(store, {b"a": b"2"})
            await txn.commit()

        self.go(body)

    def test_blind_writes_and_adds_do_not_conflict(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            await txn.get_read_version()
            txn.set(b"a", b"mine")
            txn.add(b"n", 2)
            txn.clear(b"c")
            other = store.transaction()
            other.set(b"a", b"theirs")
            other.add(b"n", 40)
            other.set(b"c", b"x")
            await other.commit()
            await txn.commit()
            assert await contents(store) == {b"a": b"mine", b"n": i64(42)}

        self.go(body)

    def test_reading_an_own_write_does_not_conflict(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            await txn.get_read_version()
            txn.set(b"a", b"mine")
            assert await txn.get(b"a") == b"mine"
            await write(store, {b"a": b"theirs"})
            await txn.commit()

        self.go(body)

    def test_declared_read_conflicts_count(self) -> None:
        async def body(store: KvStore) -> None:
            for declare, collides in (
                (lambda txn: txn.add_read_conflict_key(b"m"), True),
                (lambda txn: txn.add_read_conflict_key(b"mm"), False),
                (lambda txn: txn.add_read_conflict_range(b"l", b"n"), True),
                (lambda txn: txn.add_read_conflict_range(b"n", b"z"), False),
            ):
                txn = store.transaction()
                await txn.get_read_version()
                declare(txn)
                txn.set(b"out", b"x")
                await write(store, {b"m": b"1"})
                if collides:
                    await expect_conflict(txn)
                else:
                    await txn.commit()

        self.go(body)

    def test_declared_write_conflicts_count(self) -> None:
        async def body(store: KvStore) -> None:
            for key, collides in ((b"c", True), (b"e", False)):
                txn = store.transaction()
                await txn.get(key)
                txn.set(b"out", b"x")
                other = store.transaction()
                other.add_write_conflict_range(b"b", b"d")
                await other.commit()
                if collides:
                    await expect_conflict(txn)
                else:
                    await txn.commit()
            assert sorted(await contents(store)) == [b"out"]

        self.go(body)

    def test_a_read_only_transaction_never_conflicts(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            await txn.get(b"a")
            await write(store, {b"a": b"1"})
            await txn.commit()

        self.go(body)

    # Adds, versions and stamps.

    def test_adds_wrap_and_take_other_lengths_as_zero_extended(self) -> None:
        async def body(store: KvStore) -> None:
            await write(store, {b"max": i64(2**63 - 1), b"short": b"\x05", b"long": i64(7) + b"rest", b"empty": b""})
            txn = store.transaction()
            for key in (b"max", b"short", b"long", b"empty", b"none"):
                txn.add(key, 1)
            txn.add(b"down", -(2**63))
            txn.add(b"down", -1)
            await txn.commit()
            assert await contents(store) == {
                b"max": i64(-(2**63)),
                b"short": i64(6),
                b"long": i64(8),
                b"empty": i64(1),
                b"none": i64(1),
                b"down": i64(2**63 - 1),
            }

        self.go(body)

    def test_concurrent_adds_all_count(self) -> None:
        async def body(store: KvStore) -> None:
            async def worker(n: int) -> None:
                for _ in range(20):
                    txn = store.transaction()
                    txn.add(b"n", n)
                    await txn.commit()

            await asyncio.gather(*(worker(n) for n in range(20)))
            assert await contents(store) == {b"n": i64(20 * sum(range(20)))}

        self.go(body)

    def test_read_versions_grow_with_commits(self) -> None:
        async def body(store: KvStore) -> None:
            async def version() -> int:
                txn = store.transaction()
                found = await txn.get_read_version()
                txn.cancel()
                return found

            first = await version()
            await write(store, {b"a": b"1"})
            second = await version()
            await write(store, {b"a": b"1"})
            assert first < second < await version()

        self.go(body)

    def test_versionstamps_are_unique_and_in_commit_order(self) -> None:
        async def body(store: KvStore) -> None:
            stamps: list[bytes] = []

            async def one(i: int) -> bytes:
                txn = store.transaction()
                txn.set_versionstamped_key(b"q/", b"/%d" % i, b"%d" % i)
                txn.set_versionstamped_value(b"v/%d" % i, b"<", b">")
                await txn.commit()
                return txn.versionstamp()

            for _ in range(5):
                group = await asyncio.gather(*(one(i) for i in range(10)))
                assert all(len(stamp) == api.VERSIONSTAMP_BYTES for stamp in group)
                assert len(set(group)) == 10
                if stamps:
                    assert min(group) > max(stamps)
                stamps += group
            found = await contents(store)
            queue = [key for key in found if key.startswith(b"q/")]
            assert sorted(key[2:12] for key in queue) == sorted(stamps)
            assert found[b"v/9"] == b"<" + stamps[-1] + b">"

        self.go(body)

    def test_a_stamp_orders_with_the_versions_that_readers_see(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            before = await txn.get_read_version()
            txn.set(b"a", b"1")
            await txn.commit()
            after = store.transaction()
            stamp_version = int.from_bytes(txn.versionstamp()[:8], "big")
            assert before < stamp_version <= await after.get_read_version()
            after.cancel()

        self.go(body)

    def test_a_stamped_value_cannot_be_read_before_the_commit(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            txn.set_versionstamped_value(b"a", b"")
            with pytest.raises(KvError):
                await txn.get(b"a")
            with pytest.raises(KvError):
                txn.versionstamp()
            txn.cancel()
            empty = store.transaction()
            await empty.commit()
            with pytest.raises(KvError):
                empty.versionstamp()

        self.go(body)

    # Limits and misuse.

    def test_keys_and_values_over_the_limit_are_refused_at_once(self) -> None:
        async def body(store: KvStore) -> None:
            txn = store.transaction()
            for bad in (b"", b"\xff", b"\xff\x00", b"k" * (api.KEY_BYTES_MAX + 1)):
                with pytest.raises(LimitExceeded):
                    txn.set(bad, b"")
                with pytest.raises(LimitExceeded):
                    txn.clear(bad)
                with pytest.raises(LimitExceeded):
                    txn.add(bad, 1)
                with pytest.raises(LimitExceeded):
                    await txn.get(bad)
            with pytest.raises(LimitExceeded):
                txn.set(b"k", b"v" * (api.VALUE_BYTES_MAX + 1))
            with pytest.raises(LimitExceeded):
                txn.set_versionstamped_key(b"k" * api.KEY_BYTES_MAX, b"", b"")
            with pytest.raises(LimitExceeded):
                await txn.get_range(b"", b"\xff\x00")
            with pytest.raises(LimitExceeded):
                txn.clear_range(b"", b"\xff\xff")
            with pytest.raises(TypeError):
                txn.set(b"k", bytearray(b"v"))
            largest = b"\xfe" * api.KEY_BYTES_MAX
            txn.set(largest, b"v" * api.VALUE_BYTES_MAX)
            await txn.commit()
            assert await contents(store) == {largest: b"v" * api.VALUE_BYTES_MAX}

        self.go(body)

    def test_a_transaction_over_the_limit_is_refused_whole(self) -> None:
        async def body(store: KvStore) -> None:
            value = b"v" * api.VALUE_BYTES_MAX
            for count, fits in ((99, True), (101, False)):
                txn = store.transaction()
                for i in range(count):
                    txn.set(b"%s%d" % (b"yes" if fits else b"no", i), value)
                if fits:
                    await txn.commit()
                else:
                    with pytest.raises(LimitExceeded):
                        await txn.commit()
            assert {key[:2] for key in await contents(store)} == {b"ye"}

        self.go(body)

    def test_a_finished_transaction_refuses_everything(self) -> None:
        async def body(store: KvStore) -> None:
            committed, failed, cancelled = store.transaction(), store.transaction(), store.transaction()
            await failed.get(b"a")
            failed.set(b"b", b"1")
            committed.set(b"a", b"1")
            await committed.commit()
            await expect_conflict(failed)
            cancelled.cancel()
            for txn in (committed, failed, cancelled):
                for act in (
                    lambda txn=txn: txn.set(b"a", b"1"),
                    lambda txn=txn: txn.clear(b"a"),
                    lambda txn=txn: txn.clear_range(b"a", b"b"),
                    lambda txn=txn: txn.add(b"a", 1),
                    lambda txn=txn: txn.add_read_conflict_key(b"a"),
                    lambda txn=txn: txn.add_write_conflict_key(b"a"),
                ):
                    with pytest.raises(UsedAfterCommit):
                        act()
                for later in (txn.get(b"a"), txn.get_range(*ALL), txn.get_read_version(), txn.commit()):
                    with pytest.raises(UsedAfterCommit):
                        await later
                txn.cancel()

        self.go(body)

    def test_a_snapshot_over_five_seconds_is_too_old(self) -> None:
        clock = Clock()

        async def body(store: KvStore) -> None:
            reader, writer, blind = store.transaction(), store.transaction(), store.transaction()
            await reader.get(b"a")
            await writer.get(b"a")
            writer.set(b"b", b"1")
            blind.set(b"c", b"1")
            clock.ms += api.TRANSACTION_MS_MAX
            await reader.get(b"a")
            clock.ms += 1
            with pytest.raises(TooOld):
                await reader.get(b"a")
            with pytest.raises(TooOld):
                await reader.get_range(*ALL)
            with pytest.raises(TooOld):
                await writer.commit()
            await blind.commit()
            assert await contents(store) == {b"c": b"1"}
            reader.cancel()

        self.go(body, clock)

    def test_versions_survive_the_forgetting_of_old_ones(self) -> None:
        clock = Clock()

        async def body(store: KvStore) -> None:
            for i in range(40):
                clock.ms += 700
                await write(store, {b"k": i64(i), b"once%d" % i: b"v"})
                txn = store.transaction()
                txn.clear_range(b"once%d" % (i - 1), b"once%d\x00" % (i - 1))
                await txn.commit()
                old = store.transaction()
                await old.get_read_version()
                clock.ms += 700
                await write(store, {b"k": b"new"})
                clock.ms += 700
                await write(store, {b"k": b"newer"})
                assert await old.get(b"k") == i64(i)
                old.cancel()
            assert await contents(store) == {b"k": b"newer", b"once39": b"v"}

        self.go(body, clock)

    def test_a_snapshot_older_than_the_remembered_commits_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(conflicts, "ENTRIES_MAX", 10)

        async def body(store: KvStore) -> None:
            txn = store.transaction()
            await txn.get(b"k")
            txn.set(b"out", b"x")
            for i in range(20):
                await write(store, {b"k" if i == 0 else b"other": b"v"})
            with pytest.raises(TooOld):
                await txn.commit()

        self.go(body)

    def test_a_closed_store_refuses(self) -> None:
        async def main() -> None:
            store = self.open_kv(None)
            txn = store.transaction()
            await txn.get(b"a")
            await store.close()
            await store.close()
            with pytest.raises(KvError):
                await txn.get(b"a")
            txn.set(b"a", b"1")
            with pytest.raises(KvError):
                await txn.commit()

        asyncio.run(main())
