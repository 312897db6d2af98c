"""Inode ids in blocks per directory, so that a directory's inode records are neighbours in the key space."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from fs3.kv import retry
from fs3.kv.api import KvStore, Transaction
from fs3.meta import keys, model

# Directories whose rest of ids is remembered; the rest of a forgotten one is lost, which is fine.
DIRECTORIES_MAX: Final = 65_536
PIECES_RESERVED: Final = 64
BLOCKS_RESERVED: Final = 16
_PIECES: Final = b"p"
_BLOCKS: Final = b"b"


class IdAllocator:
    """Hands out inode ids that nobody else has. A directory's first 64 lie together, the others in runs of 4096.

    Belongs to one event loop. Ids survive nothing: those reserved and not used are lost at exit.
    """

    def __init__(self, store: KvStore) -> None:
        self._store = store
        self._runs: OrderedDict[int, Iterator[int]] = OrderedDict()
        self._reserved: dict[bytes, Iterator[int]] = {_PIECES: iter(()), _BLOCKS: iter(())}
        self._lock = asyncio.Lock()

    async def take(self, directory: int) -> int:
        """A new inode id for an entry of `directory`. Raises KvError when the store does not answer."""
        run = self._runs.get(directory)
        if run is not None:
            ino = next(run, None)
            if ino is not None:
                return ino
        return await self._refill(directory)

    async def _refill(self, directory: int) -> int:
        async with self._lock:
            run = self._runs.get(directory)
            if run is None:
                run = iter(keys.piece_ids(await self._number(_PIECES, PIECES_RESERVED)))
            else:
                ino = next(run, None)
                if ino is not None:
                    return ino
                run = iter(keys.block_ids(await self._number(_BLOCKS, BLOCKS_RESERVED)))
            self._runs[directory] = run
            self._runs.move_to_end(directory)
            if len(self._runs) > DIRECTORIES_MAX:
                self._runs.popitem(last=False)
            return next(run)

    async def _number(self, kind: bytes, count: int) -> int:
        number = next(self._reserved[kind], None)
        if number is not None:
            return number

        async def reserve(tr: Transaction) -> int:
            key = keys.allocator(kind)
            first = model.decode_count(await tr.get(key))
            tr.set(key, model.encode_count(first + count))
            return first

        # Reserving twice after an unknown outcome loses numbers and is otherwise harmless.
        first = await retry.run(self._store, reserve, idempotent=True)
        self._reserved[kind] = iter(range(first + 1, first + count))
        return first
