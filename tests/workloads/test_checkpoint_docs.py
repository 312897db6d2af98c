"""Every example of docs/checkpoint.md runs, in its order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fs3.testing.cluster import LocalCluster

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoint.md"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_examples_run(shared_cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) > 4
    # The page's cluster is the one that `fs3 up` makes.
    (tmp_path / "fs3-cluster").symlink_to(shared_cluster.directory)
    monkeypatch.chdir(tmp_path)
    address = shared_cluster.url.removeprefix("fs3://").rstrip("/")
    scope: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block.replace("127.0.0.1:7000", address), str(PAGE), "exec"), scope)
    finally:
        if "fs" in scope:
            scope["fs"].close()
