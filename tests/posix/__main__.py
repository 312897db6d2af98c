"""`python -m tests.posix`: the long campaign. Exit status 1 when the file systems differ."""

from __future__ import annotations

import argparse
import os
import sys
import time

from tests.posix.campaign import campaign, reason_not_to_run


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    if reason := "root is needed, for two users" if os.geteuid() else reason_not_to_run():
        print(f"make posix-diff cannot run here: {reason}", file=sys.stderr)
        return 2
    began_s = time.monotonic()
    done, found = campaign(seed=options.seed, seeds=options.seeds, say=lambda line: print(line, flush=True))
    if found is not None:
        print(f"{found}\nrepeat with: make posix-diff SEED={done.seed} SEEDS=1", file=sys.stderr)
        return 1
    print(f"{done.operations} operations of {done.seeds} seeds agree, {time.monotonic() - began_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
