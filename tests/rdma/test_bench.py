"""`fs3 rdma bench` between two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

ADDRESS = "10.9.0.1"
BENCH = [sys.executable, "-m", "fs3", "rdma", "bench", "--json", "--rdma", "devices=rxe0"]


@pytest.fixture
def port() -> Iterator[int]:
    """Of a listener."""
    command = [*BENCH, "--listen", "--host", ADDRESS, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listener:
        assert listener.stdout is not None
        yield json.loads(listener.stdout.readline())["port"]
        listener.kill()


def test_both_ends_run_and_fs3_is_compared_with_raw_verbs(port: int) -> None:
    command = [*BENCH, f"{ADDRESS}:{port}", "--seconds", "0.5", "--size", "256KiB"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    print(json.dumps(report, indent=1))
    assert (report["device"], report["size_bytes"]) == ("rxe0", 256 << 10)
    assert [m["what"] for m in report["measurements"]] == ["read", "write", "ping"]
    for m in report["measurements"]:
        assert m["ratio"] > 0
        for side in (m["raw"], m["fs3"]):
            assert side["operations_per_s"] > 0
            assert 0 < side["median_us"] <= side["p99_us"]
            assert (side["bytes_per_s"] > 0) == (m["what"] != "ping")


def test_where_nobody_listens_the_error_names_the_address() -> None:
    told = subprocess.run([*BENCH, f"{ADDRESS}:1"], capture_output=True, text=True, timeout=60)
    assert told.returncode != 0
    assert f"cannot connect to {ADDRESS}:1" in told.stderr
