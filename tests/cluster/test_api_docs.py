"""Every example of docs/api.md runs, in its order."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs3.client.fsspec import Fs3FileSystem
from fs3.testing.cluster import LocalCluster
from tests.pages import run_examples


def test_the_examples_run(
    shared_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        assert run_examples("api", shared_cluster, tmp_path, monkeypatch) > 9
    finally:
        Fs3FileSystem.clear_instance_cache()
    assert capfd.readouterr().out == "[Errno 2] 'none' does not exist: '/data/none'\n"
    assert (tmp_path / "weights.local").stat().st_size == 4 << 20
