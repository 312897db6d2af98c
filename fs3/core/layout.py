"""Where the chunks of a file live. Pure; the same as the Rust client's, by tests/golden/layout.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Layout

CHUNK_BYTES_MIN = 64 << 10
CHUNK_BYTES_MAX = 64 << 20
CHUNK_INDEX_MAX = 0xFFFF_FFFE
"""0xffffffff means "to the end" in a remove."""


class Piece(NamedTuple):
    """A part of a byte range that lies within one chunk. Offsets and lengths in bytes."""

    chunk: int
    chunk_offset: int
    length: int
    file_offset: int


def check_layout(layout: Layout, table_chains: int) -> None:
    """Raise INVALID_ARGUMENT unless `layout` fits a table of `table_chains` chains."""
    size = layout.chunk_bytes
    if size & (size - 1) or not CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"chunk size {size} is not a power of two from 64 KiB to 64 MiB")
    if not 1 <= layout.stripe <= table_chains:
        raise error(Code.CODE_INVALID_ARGUMENT, f"stripe {layout.stripe} is not in 1..{table_chains}")
    if layout.first >= table_chains:
        raise error(Code.CODE_INVALID_ARGUMENT, f"first {layout.first} is not in 0..{table_chains - 1}")


def chain_of(layout: Layout, table: Sequence[int], index: int) -> int:
    """Name the chain of chunk `index`; `table` is the chain ids of the layout's table version."""
    return table[(layout.first + index % layout.stripe) % len(table)]


def chains_of(layout: Layout, table: Sequence[int]) -> list[int]:
    """Name every chain that may hold chunks of the file, in stripe order."""
    return [table[(layout.first + i) % len(table)] for i in range(layout.stripe)]


def pieces(layout: Layout, offset: int, length: int) -> Iterator[Piece]:
    """Cut ``[offset, offset + length)`` at chunk borders, in order."""
    size = layout.chunk_bytes
    end = offset + length
    while offset < end:
        index, within = divmod(offset, size)
        count = min(size - within, end - offset)
        yield Piece(index, within, count, offset)
        offset += count
