"""Every example of docs/kvcache.md runs, in its order."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from tests.pages import run_examples


def test_the_examples_run(shared_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_examples("kvcache", shared_cluster, tmp_path, monkeypatch) >= 4
