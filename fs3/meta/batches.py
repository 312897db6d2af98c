"""Batches: changes of one inode that come while one is on its way wait, and then go together in one transaction.

Else they would conflict in the store, and each be tried again and again. Clients send them to one service, by
rendezvous hash of the inode, so that they meet. That is for speed alone: what arrives at different services is put in
order by the store, like everything else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from fs3.core.clock import Clock
from fs3.core.errors import error
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction, TransactionFn
from fs3.meta.clock import monotonic_s
from fs3.v1.frame_pb2 import Code

CHANGES_MAX: Final = 64


class _Change:
    """One that waits for its batch."""

    def __init__(self, attempt: TransactionFn[Any], ends_s: float) -> None:
        self.attempt = attempt
        self.ends_s = ends_s
        self.outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def succeed(self, result: Any) -> None:
        if not self.outcome.done():
            self.outcome.set_result(result)

    def fail(self, exc: BaseException) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(exc)


class _Spoilt(Exception):
    """One change of a batch cannot be made: the others go without it."""

    def __init__(self, change: _Change, cause: Exception) -> None:
        super().__init__(change, cause)
        self.change = change
        self.cause = cause


class Batches:
    """Belongs to one event loop. An inode that one client at a time changes is not kept waiting."""

    def __init__(self, store: KvStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        # By inode that a change is on its way of: those that wait.
        self._waiting: dict[int, deque[_Change]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, inode: int, attempt: TransactionFn[Any], *, ends_s: float) -> Any:
        """Run `attempt` in a transaction of its own or of several changes; returns its result once that is durable.

        Raises what `attempt` raises, and nothing of it was written then; KvError as `retry.run`; BUSY at `ends_s` on
        the monotonic clock. `attempt` may run several times: taking effect twice must be the same as once.
        """
        waiting = self._waiting.get(inode)
        if waiting is None:
            self._waiting[inode] = deque()
            try:
                return await retry.run(self._store, attempt, idempotent=True, deadline_ms=self._left_ms(ends_s))
            finally:
                self._go_on(inode)
        change = _Change(attempt, ends_s)
        waiting.append(change)
        try:
            async with asyncio.timeout(self._left_ms(ends_s) / 1000):
                return await change.outcome
        except TimeoutError:
            message = "too many clients change the file at once; try later"
            raise error(Code.CODE_BUSY, message, maybe_applied=True) from None

    def _left_ms(self, ends_s: float) -> float:
        return (ends_s - monotonic_s(self._clock)) * 1000

    def _go_on(self, inode: int) -> None:
        """A change or a batch has ended: begin with what has come meanwhile."""
        waiting = self._waiting[inode]
        batch: list[_Change] = []
        while waiting and len(batch) < CHANGES_MAX:
            change = waiting.popleft()
            if not change.outcome.done():
                batch.append(change)
        if not batch:
            del self._waiting[inode]
            return
        task = asyncio.create_task(self._together(inode, batch), name="fs3-meta-batch")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _together(self, inode: int, batch: list[_Change]) -> None:
        try:
            while batch:
                try:
                    await self._commit(batch)
                    return
                except _Spoilt as spoilt:
                    batch.remove(spoilt.change)
                    spoilt.change.fail(spoilt.cause)
        except KvError as exc:
            for change in batch:
                change.fail(exc)
        finally:
            self._go_on(inode)

    async def _commit(self, batch: list[_Change]) -> None:
        left_ms = self._left_ms(max(change.ends_s for change in batch))
        results = await retry.run(self._store, lambda tr: _all(tr, batch), idempotent=True, deadline_ms=left_ms)
        for change, result in zip(batch, results, strict=True):
            change.succeed(result)


async def _all(tr: Transaction, batch: Sequence[_Change]) -> list[Any]:
    results = []
    for change in batch:
        try:
            results.append(await change.attempt(tr))
        except KvError:
            raise
        except Exception as exc:
            raise _Spoilt(change, exc) from exc
    return results
