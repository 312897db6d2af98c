"""Every test begins with an empty store."""

from __future__ import annotations

import pytest

from . import engines


@pytest.fixture(autouse=True)
def _empty_store() -> None:
    engines.prepare()
