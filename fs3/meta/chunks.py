"""What the metadata service does with chunks, through the chains of a file's stripe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final, Protocol

from fs3.core import kv_namespaces
from fs3.core.layout import place_of, widest, width
from fs3.v1.meta_pb2 import Layout

LAST_INDEX: Final = 0xFFFF_FFFF
# The space of chunk ids that files have.
SPACE_FILES: Final = 0


class ChunkStore(Protocol):
    """Control operations on chunks. Every method retries until `ends_s` on the clock of the running loop.

    Raises UNAVAILABLE or TIMEOUT when the chain does not answer by then. Each operation takes effect on every
    serving replica before it returns. Safe for concurrent tasks of one loop.
    """

    def stripe(self, layout: Layout) -> list[int]:
        """Chain ids by position: chunk i is on ``stripe[place_of(layout, i)]``. Raises UNAVAILABLE, unknown table."""

    async def remove(
        self, chain_id: int, inode: int, first_index: int, *, ends_s: float, space: int = SPACE_FILES
    ) -> int:
        """Remove the chunks of `inode` from `first_index` on; returns how many there were."""

    async def truncate_chunk(
        self, chain_id: int, inode: int, index: int, *, chunk_bytes: int, length: int, ends_s: float
    ) -> None:
        """Cut one chunk to `length` bytes; a shorter or missing one stays as it is."""

    async def query_last(self, chain_id: int, inode: int, *, ends_s: float) -> tuple[int, int] | None:
        """(index, length) of the last chunk of `inode` on this chain, None when there is none."""


def positions(layout: Layout, first_index: int, extent_bytes: int | None) -> list[int]:
    """Places of the stripe that may hold a chunk at `first_index` or after. Pure.

    `extent_bytes`: no chunk byte is at or beyond it; None when that is not known.
    """
    if extent_bytes is None:
        return list(range(widest(layout)))
    end = -(-extent_bytes // layout.chunk_bytes)
    if end <= first_index:
        return []
    chains = width(layout, end - 1)
    if end - first_index >= chains:
        return list(range(chains))
    return sorted({place_of(layout, index) for index in range(first_index, end)})


async def _all(calls: list[Awaitable[Any]]) -> list[Any]:
    """Run together, wait for every one, raise the first error."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


async def cut(
    store: ChunkStore, inode: int, layout: Layout, length: int, extent_bytes: int | None, *, ends_s: float
) -> None:
    """Leave nothing at or beyond `length` bytes on any chain of the stripe. Idempotent."""
    chains = store.stripe(layout)
    keep = -(-length // layout.chunk_bytes)
    tail = length % layout.chunk_bytes
    calls: list[Awaitable[Any]] = [
        store.remove(chains[place], inode, keep, ends_s=ends_s) for place in positions(layout, keep, extent_bytes)
    ]
    if tail and (extent_bytes is None or extent_bytes > length):
        last = keep - 1
        chain_id = chains[place_of(layout, last)]
        calls.append(
            store.truncate_chunk(chain_id, inode, last, chunk_bytes=layout.chunk_bytes, length=tail, ends_s=ends_s)
        )
    await _all(calls)


async def cut_entries(store: ChunkStore, inode: int, layout: Layout, *, ends_s: float) -> None:
    """Leave no entry of a namespace of the KV cache. Idempotent."""
    chains = sorted(set(store.stripe(layout)))
    await _all([store.remove(chain_id, inode, 0, ends_s=ends_s, space=kv_namespaces.SPACE) for chain_id in chains])


async def end(store: ChunkStore, inode: int, layout: Layout, *, ends_s: float) -> int:
    """The end of the last chunk in bytes: the length of a file whose writers are gone."""
    found = await _all([store.query_last(chain_id, inode, ends_s=ends_s) for chain_id in store.stripe(layout)])
    return max((last[0] * layout.chunk_bytes + last[1] for last in found if last is not None), default=0)
