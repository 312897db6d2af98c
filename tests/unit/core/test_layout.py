"""Where chunks live, against the vectors that the Rust client is held to as well.

`python tests/unit/core/test_layout.py` writes the vectors again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs3.core.errors import Fs3Error
from fs3.core.layout import GROWTH_ROUNDS, chain_of, chains_of, check_layout, pieces, place_of, width
from fs3.v1.meta_pb2 import Layout

GOLDEN = Path(__file__).parents[2] / "golden" / "layout.json"
INDEXES = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 47, 48, 63, 64, 65, 1000, 0xFFFFFFFE]
RANGES = [(0, 1), (0, 1 << 20), (65_535, 2), (65_536, 65_536), (100_000, 300_001), ((1 << 40) - 5, 70_000), (5, 0)]


def vectors() -> list[dict[str, Any]]:
    """Compute the vectors from the present code."""
    cases = [
        ([11], 65536, (1, 0, 0), 0),
        ([1, 2, 3], 65536, (1, 0, 0), 2),
        ([1, 2, 3], 1 << 20, (3, 0, 0), 1),
        ([5, 9, 2, 40, 7], 131072, (3, 0, 0), 4),
        (list(range(100, 116)), 64 << 20, (16, 0, 0), 15),
        (list(range(1, 8)), 65536, (5, 0, 0), 6),
        (list(range(1, 101)), 1 << 20, (0, 4, 100), 98),
        (list(range(1, 21)), 1 << 20, (0, 1, 6), 3),
    ]
    out = []
    for table, chunk_bytes, (stripe, stripe_first, stripe_max), first in cases:
        layout = Layout(
            table_id=1, table_version=1, chunk_bytes=chunk_bytes, stripe=stripe, first=first,
            stripe_first=stripe_first, stripe_max=stripe_max,
        )  # fmt: skip
        out.append(
            {
                "table": table,
                "chunk_bytes": chunk_bytes,
                "stripe": stripe,
                "stripe_first": stripe_first,
                "stripe_max": stripe_max,
                "first": first,
                "chains": chains_of(layout, table),
                "chain_of": [[i, chain_of(layout, table, i)] for i in INDEXES],
                "pieces": [{"offset": o, "length": n, "pieces": [list(p) for p in pieces(layout, o, n)]}
                           for o, n in RANGES if n // chunk_bytes < 64],
            }
        )  # fmt: skip
    return out


@pytest.mark.parametrize("number", range(8))
def test_golden_layouts(number: int) -> None:
    assert json.loads(GOLDEN.read_text())[number] == vectors()[number]


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 39),
    st.integers(0, 2**32 - 2),
)
def test_every_chunk_is_on_one_of_the_stripes_chains(chains: int, stripe: int, first: int, index: int) -> None:
    table = list(range(1, chains + 1))
    layout = Layout(chunk_bytes=65536, stripe=min(stripe, chains), first=first % chains)
    check_layout(layout, chains)
    spread = chains_of(layout, table)
    assert len(set(spread)) == layout.stripe
    assert chain_of(layout, table, index) == spread[index % layout.stripe]


@given(st.integers(1, 20), st.integers(1, 90), st.integers(0, 5000))
def test_a_stripe_that_grows_takes_further_chains_and_keeps_those_it_has(first: int, limit: int, index: int) -> None:
    layout = Layout(chunk_bytes=65536, stripe_first=min(first, limit), stripe_max=limit)
    check_layout(layout, limit)
    assert width(layout, 0) == layout.stripe_first
    assert width(layout, index) <= width(layout, index + 1) <= 2 * width(layout, index)
    assert place_of(layout, index) < width(layout, index) <= limit
    # No chain has more than one round of chunks more than the growth waits for, until all are in use.
    if width(layout, index) < limit:
        assert index < GROWTH_ROUNDS * width(layout, index)


@given(st.integers(0, 1 << 45), st.integers(0, 10 << 20))
def test_pieces_cover_the_range_without_gap_or_overlap(offset: int, length: int) -> None:
    layout = Layout(chunk_bytes=65536, stripe=1, first=0)
    at = offset
    for piece in pieces(layout, offset, length):
        assert piece.file_offset == at
        assert piece.chunk * 65536 + piece.chunk_offset == at
        assert 0 < piece.length <= 65536 - piece.chunk_offset
        at += piece.length
    assert at == offset + length


@pytest.mark.parametrize(
    "layout",
    [
        Layout(chunk_bytes=65537, stripe=1),
        Layout(chunk_bytes=32768, stripe=1),
        Layout(chunk_bytes=128 << 20, stripe=1),
        Layout(chunk_bytes=65536, stripe=0),
        Layout(chunk_bytes=65536, stripe=4),
        Layout(chunk_bytes=65536, stripe=1, first=3),
    ],
)
def test_layouts_that_do_not_fit_the_table_are_refused(layout: Layout) -> None:
    with pytest.raises(Fs3Error):
        check_layout(layout, 3)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(vectors(), indent=1) + "\n")
