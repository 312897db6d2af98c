"""`python -m tests.torture`: the long campaign. Exit status 1 when anything was lost or wrong."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.torture.campaign import run
from tests.torture.disks import missing_device
from tests.torture.network import missing_tools, sweep


def main() -> int:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--seed",
        type=int,
        default=int(time.time()),
        help="draws everything; even: all members on one host, divided by 3: durable writes (now: the time)",
    )
    parser.add_argument("--json", type=Path, help="also write the report here")
    parser.add_argument("--keep", action="store_true", help="keep the directory also when nothing was lost")
    options = parser.parse_args()
    if reason := missing_tools() or missing_device():
        print(f"make torture cannot run here: {reason}", file=sys.stderr)
        return 2
    sweep()
    # SIGTERM ends it as Ctrl-C does: everything it made is taken away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="fs3-torture-"))
    print(f"seed {options.seed}; everything is in {directory}", flush=True)
    began = time.monotonic()
    report = run(
        directory,
        seed=options.seed,
        cycles=options.cycles,
        minutes=options.minutes,
        say=lambda line: print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True),
    )
    print(report.table())
    if options.json:
        options.json.write_text(json.dumps(report.record(), indent=1) + "\n")
    if report.lost:
        print(f"kept for inspection: {directory}; repeat with SEED={options.seed}", file=sys.stderr)
    elif not options.keep:
        shutil.rmtree(directory)
    return 1 if report.lost else 0


if __name__ == "__main__":
    sys.exit(main())
