"""The examples of the README do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from fs3.testing.cluster import LocalCluster

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_python_example_runs(shared_cluster: LocalCluster) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    url = f"{shared_cluster.url}?token_file={shared_cluster.token_file}"
    runnable, replaced = re.subn(r"fs3://[^\"]*", url, example)
    assert replaced == 1
    scope: dict[str, Any] = {}
    exec(runnable, scope)
    assert np.array_equal(scope["part"], scope["weights"][1024:2048])
