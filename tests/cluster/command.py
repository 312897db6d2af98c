"""Running the `fs3` command as a user does."""

from __future__ import annotations

import subprocess
import sys

COMMAND_S = 120


def fs3_command(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `fs3`; a traceback is a failure whatever the exit status."""
    result = subprocess.run(
        [sys.executable, "-m", "fs3", *arguments], capture_output=True, text=True, timeout=COMMAND_S, check=False
    )
    assert "Traceback" not in result.stderr, result.stderr
    if check:
        assert result.returncode == 0, result.stderr
    return result
