"""The example whose attention KV goes through the cache."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster

EXAMPLE = Path(__file__).parents[2] / "examples" / "kv_attention"
TINY = [
    *("--requests", "2", "--prompt-tokens", "64", "--question-tokens", "5", "--page-tokens", "16"),
    *("--layers", "2", "--heads", "2", "--head-dim", "16"),
]
RUN_S = 120


def run(*arguments: str) -> list[int]:
    """Tokens that each request got from the cache; the example itself compares the logits."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *arguments], capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(count) for count in re.findall(r"(\d+) restored, \d+ pages saved.* logits are equal", done.stdout)]


def test_pages_are_saved_by_one_run_and_restored_by_the_next(
    shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_URL", shared_cluster.url)
    monkeypatch.setenv("FS3_TOKEN", shared_cluster.token)
    # The prompt's four pages are in the cache once the first request was prefilled.
    assert run(*TINY) == [0, 64]
    assert run(*TINY) == [64, 64]
