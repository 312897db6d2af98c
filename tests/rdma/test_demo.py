"""The demo with its data moving by RDMA."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
DEMO_S = 900.0


def test_the_demo_moves_its_data_by_rdma(device: str) -> None:
    command = [sys.executable, DEMO, "--size-mib", "64", "--no-shared-memory"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEMO_S, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f" by RDMA on {device}, SHA-256 equal" in result.stdout
    assert "every byte was right" in result.stdout
