"""`python -m tests.soak`: the long run. Exit status 1 when something leaks or is wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.campaign import soak


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.hours:g} hours", flush=True)
    with tempfile.TemporaryDirectory(prefix="fs3-soak-", ignore_cleanup_errors=True) as base:
        report = soak(
            Path(base), seconds=options.hours * 3600, seed=options.seed, say=lambda line: print(line, flush=True)
        )
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
