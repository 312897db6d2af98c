"""Every test begins with an empty store, and leaves one that outlives it empty."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import engines


@pytest.fixture(autouse=True)
def _empty_store() -> Iterator[None]:
    engines.empty()
    yield
    engines.empty()
