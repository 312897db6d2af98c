"""Every example of docs/tracing.md runs, in its order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from tests.pages import run_examples


def test_the_examples_run(shared_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_examples("tracing", shared_cluster, tmp_path, monkeypatch, shell=True) == 5
    for worker in range(2):
        events = json.loads(Path(f"worker-{worker}.json").read_text())["traceEvents"]
        assert sum(event["name"] == "fs3.read" for event in events) == 32
    assert Path("all.json.gz").stat().st_size > 0
