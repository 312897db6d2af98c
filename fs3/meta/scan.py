"""Walks over a table in short transactions."""

from __future__ import annotations

from collections.abc import AsyncIterator

from fs3.kv import retry
from fs3.kv.api import KvStore, Transaction

Rows = list[tuple[bytes, bytes]]


async def pages(store: KvStore, span: tuple[bytes, bytes], *, limit: int) -> AsyncIterator[Rows]:
    """The pairs of a key range, at most `limit` in a list, each list from a snapshot of its own."""
    begin, end = span
    while True:
        rows = await _page(store, begin, end, limit)
        yield rows
        if len(rows) < limit:
            return
        begin = rows[-1][0] + b"\x00"


async def _page(store: KvStore, begin: bytes, end: bytes, limit: int) -> Rows:
    async def read(tr: Transaction) -> Rows:
        return await tr.get_range(begin, end, limit=limit, snapshot=True)

    return await retry.run(store, read, idempotent=True)
