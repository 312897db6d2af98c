"""Every example of docs/kvcache.md runs, in its order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fs3.testing.cluster import LocalCluster

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kvcache.md"


def test_the_examples_run(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.setenv("FS3_URL", f"{shared_cluster.url}?token_file={shared_cluster.token_file}")
    scope: dict[str, Any] = {}
    try:
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), scope)
    finally:
        if "fs" in scope:
            scope["fs"].close()
