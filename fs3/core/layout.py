"""Where the chunks of a file live. Pure; the same as the Rust client's, by tests/golden/layout.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Layout

CHUNK_BYTES_MIN = 64 << 10
CHUNK_BYTES_MAX = 64 << 20
# A stripe that grows doubles when each of its chains has so many chunks of the file.
GROWTH_ROUNDS = 8
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
    if not 1 <= narrowest(layout) <= widest(layout) <= table_chains:
        raise error(Code.CODE_INVALID_ARGUMENT, f"a stripe of {format_stripe(layout)} does not fit 1..{table_chains}")
    if layout.first >= table_chains:
        raise error(Code.CODE_INVALID_ARGUMENT, f"first {layout.first} is not in 0..{table_chains - 1}")


class Stripe(Protocol):
    """The numbers of chains in a layout, whatever class that is of."""

    @property
    def stripe(self) -> int:
        """How many, 0: it grows."""

    @property
    def stripe_first(self) -> int:
        """Of a stripe that grows: how many to begin with."""

    @property
    def stripe_max(self) -> int:
        """Of a stripe that grows: how many at most."""


def narrowest(layout: Stripe) -> int:
    """Over how many chains the first chunks are spread."""
    return layout.stripe or layout.stripe_first


def widest(layout: Stripe) -> int:
    """Over how many chains a file is spread at most."""
    return layout.stripe or layout.stripe_max


def format_stripe(layout: Stripe) -> str:
    """Write the number of chains, "16-128" for a stripe that grows."""
    return str(layout.stripe) if layout.stripe else f"{layout.stripe_first}-{layout.stripe_max}"


def width(layout: Layout, index: int) -> int:
    """Over how many chains chunk `index` and those before it are spread."""
    chains, limit = narrowest(layout), widest(layout)
    while chains < limit and index >= GROWTH_ROUNDS * chains:
        chains *= 2
    return min(chains, limit)


def place_of(layout: Layout, index: int) -> int:
    """Which of the stripe's chains chunk `index` is on, counted from 0."""
    return index % width(layout, index)


def chain_of(layout: Layout, table: Sequence[int], index: int) -> int:
    """Name the chain of chunk `index`; `table` is the chain ids of the layout's table version."""
    return table[(layout.first + place_of(layout, index)) % len(table)]


def chains_of(layout: Layout, table: Sequence[int]) -> list[int]:
    """Name every chain that may hold chunks of the file, in stripe order."""
    return [table[(layout.first + i) % len(table)] for i in range(widest(layout))]


def pieces(layout: Layout, offset: int, length: int) -> Iterator[Piece]:
    """Cut ``[offset, offset + length)`` at chunk borders, in order."""
    size = layout.chunk_bytes
    end = offset + length
    while offset < end:
        index, within = divmod(offset, size)
        count = min(size - within, end - offset)
        yield Piece(index, within, count, offset)
        offset += count
