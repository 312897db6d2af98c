"""`python -m tests.rdma`: the tests of RDMA inside the guest, or with a COMMAND that command instead.

What the tests report is in .build/rdma afterwards: junit.xml, the numbers, the guest's kernel messages.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.rdma import rig

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "native"
CRATE = "fs3-net"
# The test programs of the transport run for the device that is named to them: soft-RoCE and soft-iWARP.
DEVICES = ("rxe0", "siw0")


def transport_tests() -> list[str]:
    """Build the integration tests of the transport and return the programs."""
    command = ["cargo", "test", "--locked", "-q", "-p", CRATE, "--test", "*", "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=NATIVE, stdout=subprocess.PIPE, check=True).stdout
    messages = [json.loads(line) for line in built.splitlines()]
    return sorted(m["executable"] for m in messages if m.get("executable") and m["target"]["kind"] == ["test"])


def script() -> str:
    """Give the shell script of the whole run: every part runs, any failure is its status, pytest has the last word."""
    crate = shlex.quote(str(NATIVE / "crates" / CRATE))
    lines = ["failed=0"]
    programs = transport_tests()
    lines += [
        f"(cd {crate} && FS3_TEST_RDMA={device} exec {shlex.quote(program)} --include-ignored) || failed=1"
        for device in DEVICES
        for program in programs
    ]
    pytest = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "rdma"), "--junitxml=/rig.out/junit.xml"]
    return "\n".join([*lines, f"{shlex.join(pytest)} || failed=1", "exit $failed"])


def main() -> int:
    """Parse the command line, prepare, boot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", help="shell command to run as root in the guest; $RIG_OUT is kept")
    parser.add_argument(
        "--out", type=Path, help="what becomes $RIG_OUT instead of .build/rdma, which is emptied before"
    )
    parser.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="the guest is ended after so long")
    options = parser.parse_args()
    # SIGTERM and a lost terminal end it as Ctrl-C does: everything it started is taken away.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    out: Path = options.out.resolve() if options.out else ROOT / ".build" / "rdma"
    try:
        rig.install(rig.GUEST)
        kernel = rig.kernel()
        environment = {"FS3_TEST_RDMA": DEVICES[0], "FS3_TEST_PYVERBS": str(rig.pyverbs())}
        command = options.command or script()
        if options.out is None:
            shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True, exist_ok=True)
        status = rig.run(kernel, command, out=out, timeout_s=options.timeout, environment=environment)
    except (rig.RigError, subprocess.CalledProcessError) as e:
        print(f"the RDMA tests cannot run here: {e}", file=sys.stderr)
        return 125
    except KeyboardInterrupt:
        return 130
    if status == 125:
        print(f"the guest did not come up or down; see {os.path.relpath(out)}/console.txt", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
