"""The one retry loop around transactions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fs3.kv.api import CommitUnknown, KvError, KvStore, TransactionFn

T = TypeVar("T")

DEADLINE_MS = 5_000
BACKOFF_MS_MIN = 1.0
BACKOFF_MS_MAX = 200.0


async def run(
    store: KvStore,
    fn: TransactionFn[T],
    *,
    deadline_ms: float = DEADLINE_MS,
    idempotent: bool = False,
    rng: random.Random | None = None,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    now_ms: Callable[[], float] = lambda: asyncio.get_running_loop().time() * 1000,
) -> T:
    """Run `fn` in a transaction and commit it; returns what `fn` returned once the commit is durable.

    Conflict, TooOld and Unavailable run `fn` again in a new transaction, after a jittered, doubling pause
    (`sleep` takes seconds), until `deadline_ms` milliseconds after the call; then the last error is raised.
    CommitUnknown is retried only if ``idempotent``: the caller says that taking effect twice is the same
    as once (for example because `fn` reads and writes a record of the operation). Once an outcome is
    unknown, an error of the store that ends the loop is CommitUnknown as well. Errors of `fn` itself are not retried
    and pass through; nothing was written by the attempt that raised them.

    `fn` must not commit, and must not keep the transaction. Runs in the caller's task; safe to cancel.
    """
    started_ms = now_ms()
    backoff_ms = BACKOFF_MS_MIN
    draw = random.random if rng is None else rng.random
    unknown: CommitUnknown | None = None
    while True:
        transaction = store.transaction()
        try:
            result = await fn(transaction)
            await transaction.commit()
            return result
        except KvError as error:
            last = error
        finally:
            transaction.cancel()
        if isinstance(last, CommitUnknown):
            unknown = last
        pause_ms = backoff_ms * (0.5 + draw() / 2)
        backoff_ms = min(backoff_ms * 2, BACKOFF_MS_MAX)
        out_of_time = now_ms() - started_ms + pause_ms > deadline_ms
        if not last.retryable or out_of_time or (last.maybe_committed and not idempotent):
            if unknown is not None and last is not unknown:
                raise unknown from last
            raise last
        await sleep(pause_ms / 1000)
