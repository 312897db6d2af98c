"""`python -m tests.fsx`: the long campaign. Exit status 1 when anything differs."""

from __future__ import annotations

import argparse
import sys
import time

from fs3.fuse.control import check_device
from tests.fsx.campaign import campaign


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", type=int, default=1_000_000, help="operations in all")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    check_device()
    agreed = campaign(options.ops, options.seed, lambda line: print(line, flush=True))
    if not agreed:
        print(f"repeat with: make fsx OPS={options.ops} SEED={options.seed}", file=sys.stderr)
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
