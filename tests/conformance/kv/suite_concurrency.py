"""Many tasks at once, and random transactions against a model."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from fs3.kv.api import Conflict, KvStore, Transaction
from fs3.kv.retry import run

from .support import KvSuite, contents, i64, write


class KvConcurrency(KvSuite):
    """Isolation under concurrency, checked by invariants, by replay and by a model."""

    def test_transfers_between_accounts_keep_the_sum(self) -> None:
        async def body(store: KvStore) -> None:
            accounts = [b"acct/%02d" % i for i in range(12)]
            await write(store, {key: i64(100) for key in accounts})
            rng = random.Random(11)

            async def transfer(txn: Transaction) -> None:
                source, target = rng.sample(accounts, 2)
                have = int.from_bytes(await txn.get(source) or b"", "little")
                await asyncio.sleep(0)
                there = int.from_bytes(await txn.get(target) or b"", "little")
                amount = rng.randint(0, have)
                txn.set(source, i64(have - amount))
                txn.set(target, i64(there + amount))

            async def audit(txn: Transaction) -> int:
                rows = await txn.get_range(b"acct/", b"acct0")
                return sum(int.from_bytes(value, "little") for _, value in rows)

            async def worker() -> None:
                for i in range(15):
                    await run(store, transfer, deadline_ms=20_000, rng=rng)
                    if i % 5 == 0:
                        assert await run(store, audit) == 1200

            await asyncio.gather(*(worker() for _ in range(20)))
            assert await run(store, audit) == 1200

        self.go(body)

    def test_histories_are_serializable_in_stamp_order(self) -> None:
        """Replay the committed transactions one by one in order of their stamps: every read must come out the same."""

        async def body(store: KvStore) -> None:
            keys = [b"k%d" % i for i in range(6)]
            history: list[tuple[bytes, list[tuple[bytes, bytes, Any]], list[tuple[str, bytes, Any]]]] = []
            rng = random.Random(7)

            async def step(worker: int, n: int) -> None:
                txn = store.transaction()
                reads: list[tuple[bytes, bytes, Any]] = []
                writes: list[tuple[str, bytes, Any]] = []
                for _ in range(rng.randint(1, 3)):
                    if rng.random() < 0.3:
                        begin, end = sorted(rng.sample(keys, 2))
                        reads.append((begin, end, await txn.get_range(begin, end)))
                    else:
                        key = rng.choice(keys)
                        value = await txn.get(key)
                        reads.append((key, key + b"\x00", [] if value is None else [(key, value)]))
                    await asyncio.sleep(0)
                for n_write in range(rng.randint(1, 2)):
                    kind, key = rng.choice(("set", "clear", "add")), rng.choice(keys)
                    value = i64(worker << 20 | n << 4 | n_write)
                    {
                        "set": lambda k=key, v=value: txn.set(k, v),
                        "clear": lambda k=key: txn.clear(k),
                        "add": lambda k=key: txn.add(k, 1),
                    }[kind]()
                    writes.append((kind, key, value))
                try:
                    await txn.commit()
                except Conflict:
                    return
                history.append((txn.versionstamp(), reads, writes))

            async def worker(index: int) -> None:
                for n in range(40):
                    await step(index, n)

            await asyncio.gather(*(worker(index) for index in range(12)))
            assert len(history) > 40
            state: dict[bytes, bytes] = {}
            for _, reads, writes in sorted(history, key=lambda item: item[0]):
                for begin, end, seen in reads:
                    assert [(k, state[k]) for k in sorted(state) if begin <= k < end] == seen
                for kind, key, value in writes:
                    if kind == "set":
                        state[key] = value
                    elif kind == "clear":
                        state.pop(key, None)
                    else:
                        state[key] = i64(int.from_bytes(state.get(key, b""), "little") + 1)
            assert await contents(store) == state

        self.go(body)

    def test_a_commit_whose_task_is_cancelled_does_not_disturb_others(self) -> None:
        async def body(store: KvStore) -> None:
            tasks = [asyncio.create_task(write(store, {b"k%d" % i: b"1"})) for i in range(20)]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(result is None for result in results[1::2])
            found = await contents(store)
            assert all(b"k%d" % i in found for i in range(1, 20, 2))

        self.go(body)

    # Against a model.

    @pytest.mark.parametrize("seed", range(6))
    def test_random_transactions_match_a_dictionary(self, seed: int) -> None:
        async def body(store: KvStore) -> None:
            rng = random.Random(seed)
            stems = (b"", b"x" * 509, b"y" * 600)
            universe = sorted(
                rng.choice(stems) + bytes(rng.choices(b"ab\x00\xfe", k=rng.randint(1, 3))) for _ in range(60)
            )
            universe = [key for key in universe if key < b"\xff"]
            model: dict[bytes, bytes] = {}
            for _ in range(40):
                txn = store.transaction()
                view = dict(model)
                for _ in range(rng.randint(1, 15)):
                    await _random_operation(rng, txn, view, universe)
                if rng.random() < 0.8:
                    await txn.commit()
                    model = view
                else:
                    txn.cancel()
                assert await contents(store) == model, f"seed {seed}"

        self.go(body)


async def _random_operation(
    rng: random.Random, txn: Transaction, view: dict[bytes, bytes], universe: list[bytes]
) -> None:
    key = rng.choice(universe)
    begin, end = sorted((rng.choice((b"", *universe)), rng.choice((*universe, b"\xff"))))
    match rng.randrange(7):
        case 0:
            value = rng.randbytes(rng.randint(0, 12))
            txn.set(key, value)
            view[key] = value
        case 1:
            txn.clear(key)
            view.pop(key, None)
        case 2:
            txn.clear_range(begin, end)
            for gone in [k for k in view if begin <= k < end]:
                del view[gone]
        case 3:
            delta = rng.randint(-(2**63), 2**63 - 1)
            txn.add(key, delta)
            view[key] = i64(int.from_bytes(view.get(key, b"")[:8], "little") + delta)
        case 4 | 5:
            reverse, limit = rng.random() < 0.5, rng.choice((0, 0, 1, 2, 5))
            want = sorted(((k, v) for k, v in view.items() if begin <= k < end), reverse=reverse)
            got = await txn.get_range(begin, end, limit=limit, reverse=reverse)
            assert got == (want[:limit] if limit else want)
        case _:
            assert await txn.get(key) == view.get(key)
