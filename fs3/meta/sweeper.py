"""Removes stored answers that no retry will ask for any more."""

from __future__ import annotations

from typing import Final

from fs3.core.clock import Clock
from fs3.kv import retry
from fs3.kv.api import KvStore, Transaction, strinc
from fs3.meta import keys, model

SCAN_ROWS: Final = 128
KEEP_MS_MIN: Final = 30 * 60 * 1000
_CLIENT_END: Final = len(keys.IDEMPOTENCY) + 16


class Sweeper:
    """Removes expired records. `keep_ms` is at least half an hour. Belongs to one event loop.

    A client's records lie in the order of its sequence numbers, the oldest first: a pass reads the expired ones
    and one page per client, not the table.
    """

    def __init__(self, store: KvStore, clock: Clock, *, keep_ms: int) -> None:
        self._store = store
        self._clock = clock
        self._keep_ns = max(keep_ms, KEEP_MS_MIN) * 1_000_000

    async def step(self) -> int:
        """One pass over all clients; returns how many records went."""
        return await self._pass(self._clock.wall_ns() - self._keep_ns, remove=True)

    async def overdue(self, slack_s: float) -> int:
        """How many records are there that should have gone `slack_s` seconds ago."""
        return await self._pass(self._clock.wall_ns() - self._keep_ns - int(slack_s * 1e9), remove=False)

    async def _pass(self, before_ns: int, *, remove: bool) -> int:
        found = 0
        position, end = keys.table(keys.IDEMPOTENCY)
        while position < end:
            count, position = await self._page(position, end, before_ns, remove)
            found += count
        return found

    async def _page(self, position: bytes, end: bytes, before_ns: int, remove: bool) -> tuple[int, bytes]:
        """Count, or remove, expired records of the first client at or after `position`; returns where to go on."""

        async def sweep(tr: Transaction) -> tuple[int, bytes]:
            rows = await tr.get_range(position, end, limit=SCAN_ROWS, snapshot=True)
            if not rows:
                return 0, end
            client = rows[0][0][:_CLIENT_END]
            count = 0
            for key, value in rows:
                if key[:_CLIENT_END] != client:
                    break
                if model.decode_idempotency(value).time_ns >= before_ns:
                    break
                # One by one: a range could cover a record that was written since the snapshot.
                if remove:
                    tr.clear(key)
                count += 1
            if count == len(rows) == SCAN_ROWS:
                return count, rows[-1][0] + b"\x00"
            return count, strinc(client)

        return await retry.run(self._store, sweep, idempotent=True)
