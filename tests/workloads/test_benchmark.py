"""The benchmark of files, small: limits, rows and their ratios."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "run.py"
RUN_S = 300


def test_the_benchmark_of_files_runs_and_records_ratios(tmp_path: Path) -> None:
    work, result = tmp_path / "work", tmp_path / "result.json"
    work.mkdir()
    small = ["--size-mib", "8", "--files", "16", "--times", "1", "--scale", "0.02"]
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--only", "files", *small, "--dir", work, "--json", result],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    # How fast it is says nothing here: 1 is a floor that was missed.
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(result.read_text())
    limits, rows = found["limits"], found["fs3"]
    assert limits["tcp_2_streams"]["mb_per_s"] > 0
    reads = rows["large reads, native"]
    assert reads["ratio"] == pytest.approx(reads["mb_per_s"] / limits["tcp_2_streams"]["mb_per_s"], abs=0.01)
    # The peer's program is fetched and compiled at the first use; without a network its rows have no ratio.
    for row, peer in (("large reads, mount", "read"), ("create + write 4 KiB + close, mount, 8 jobs", "create_8")):
        assert (f"passthrough_{peer}" in limits) == (rows[row]["ratio"] is not None)
    assert rows["1 MiB reads, 8 in flight, ring"]["ratio"] > 0
    assert rows["checkpoint load, DCP"]["ratio"] > 0
    assert rows["random 100 KiB samples, batches of 256, dataset"]["ratio"] > 0
    assert list(work.iterdir()) == []
