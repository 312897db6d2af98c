"""What the other processes of the LMDB tests run: ``python lmdb_child.py COMMAND PATH ...``."""

from __future__ import annotations

import asyncio
import sys

import lmdb

from fs3.kv.api import Transaction
from fs3.kv.lmdb import LmdbKv
from fs3.kv.retry import run


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def count(path: str, name: str, times: int, durable: bool) -> None:
    """Add one to a shared counter `times` times, 4 at once; say each number once it is acknowledged."""
    store = LmdbKv(path, durable=durable)
    numbers = iter(range(times))

    async def worker() -> None:
        for n in numbers:

            async def increment(txn: Transaction, n: int = n) -> None:
                value = int.from_bytes(await txn.get(b"counter") or b"", "little")
                txn.set(b"counter", (value + 1).to_bytes(8, "little"))
                txn.set(f"done/{name}/{n:06}".encode(), b"")
                txn.add(b"added", 1)

            await run(store, increment, deadline_ms=20_000)
            say(str(n))

    await asyncio.gather(*(worker() for _ in range(4)))
    await store.close()


async def write(path: str, key: str, ahead_ms: int) -> None:
    """Write one key, by a clock that is ahead."""
    import time

    store = LmdbKv(path, durable=False, now_ms=lambda: time.monotonic_ns() // 1_000_000 + ahead_ms)
    for value in (b"1", b"2"):
        txn = store.transaction()
        txn.set(key.encode(), value)
        await txn.commit()
    await store.close()


def hold(path: str, writing: bool) -> None:
    """Hold the writer's lock or a reader's slot until killed."""
    env = lmdb.open(path, map_size=1 << 30, max_readers=8192)
    txn = env.begin(write=writing)
    if writing:
        txn.put(b"torn", b"must never be seen")
    say("holding")
    sys.stdin.read()
    txn.abort()


def main() -> None:
    command, path, *rest = sys.argv[1:]
    if command == "count":
        asyncio.run(count(path, rest[0], int(rest[1]), rest[2] == "durable"))
    elif command == "write":
        asyncio.run(write(path, rest[0], int(rest[1])))
    elif command == "hold":
        hold(path, rest[0] == "writer")


main()
