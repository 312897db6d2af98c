"""Every example of docs/tracing.md runs, in its order."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fs3.testing.cluster import LocalCluster

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tracing.md"


def test_the_examples_run(shared_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    blocks = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    # The page's cluster is the one that `fs3 up` makes.
    (tmp_path / "fs3-cluster").symlink_to(shared_cluster.directory)
    monkeypatch.chdir(tmp_path)
    address = shared_cluster.url.removeprefix("fs3://").rstrip("/")
    scope: dict[str, Any] = {}
    try:
        for language, block in blocks:
            if language == "sh":
                subprocess.run([sys.executable, "-m", *block.split()], check=True)
            else:
                exec(compile(block.replace("127.0.0.1:7000", address), str(PAGE), "exec"), scope)
    finally:
        if "fs" in scope:
            scope["fs"].close()
    for worker in range(2):
        events = json.loads(Path(f"worker-{worker}.json").read_text())["traceEvents"]
        assert sum(event["name"] == "fs3.read" for event in events) == 32
    assert Path("all.json.gz").stat().st_size > 0
