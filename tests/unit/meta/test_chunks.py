from hypothesis import given
from hypothesis import strategies as st

from fs3.core.layout import place_of, width
from fs3.meta.chunks import positions
from fs3.v1.meta_pb2 import Layout


@given(
    st.integers(1, 6),
    st.integers(6, 40),
    st.integers(0, 600),
    st.integers(0, 600),
)
def test_the_chains_that_a_removal_asks_are_all_that_may_hold_chunks(
    first: int, limit: int, start: int, n: int
) -> None:
    layout = Layout(chunk_bytes=65536, stripe_first=first, stripe_max=limit)
    holding = {place_of(layout, index) for index in range(start, start + n)}
    asked = positions(layout, start, (start + n) * 65536)
    assert holding <= set(asked)
    assert set(asked) <= set(range(width(layout, start + n - 1) if n else 0))
