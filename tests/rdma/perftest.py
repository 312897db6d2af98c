"""The perftest programs between two processes of the guest: what raw verbs reach, to compare with."""

from __future__ import annotations

import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

WAIT_S = 20.0
RUN_S = 120.0
# It gives zeros when its estimate of the clock's rate is poor, as on a busy machine.
TRIES = 10
# Routable GID of the device, and whether its connections are made by rdma_cm.
DEVICES = {"rxe0": ("10.9.0.1", ["-x", "1"]), "siw0": ("10.9.1.1", ["-R"])}


@dataclass(frozen=True)
class Bandwidth:
    """One line of results."""

    bytes_per_message: int
    messages: int
    peak_bytes_per_s: float
    bytes_per_s: float


def parse(output: str) -> list[Bandwidth]:
    """Read the table that `ib_read_bw --report_gbits` and its like print."""
    rows = []
    for line in output.splitlines():
        fields = line.split()
        # bytes, iterations, peak and average in Gbit/s, messages in millions per second
        if len(fields) >= 5 and fields[0].isdigit() and fields[1].isdigit():
            peak, average = (float(f) * 1e9 / 8 for f in fields[2:4])
            rows.append(Bandwidth(int(fields[0]), int(fields[1]), peak, average))
    return rows


def listens(port: int) -> bool:
    """Whether some process of this machine accepts connections at a TCP port."""
    wanted = f":{port:04X}"
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if local.endswith(wanted) and state == "0A":
                return True
    return False


def bandwidth(tool: str, device: str, message_bytes: int, *, messages: int, runs: int = 3, port: int = 18515) -> float:
    """Run `tool` (ib_read_bw, ib_write_bw) between two processes over `device` and return the median, in bytes/s.

    Runs differ by a tenth over soft-RoCE and by much more over soft-iWARP. Raises RuntimeError with the tool's output.
    """
    address, options = DEVICES[device]
    command = [tool, "-d", device, *options, "-F", "--report_gbits"]
    command += ["-s", str(message_bytes), "-n", str(messages), "-p", str(port)]
    if tool == "ib_read_bw":
        # By events: whoever polls takes turns with the kernel on the guest's one CPU. Writes know no events.
        command.append("-e")
    measured: list[float] = []
    for _ in range(TRIES):
        if (rate := _measure(command, address, port).bytes_per_s) > 0:
            measured.append(rate)
        if len(measured) == runs:
            return statistics.median(measured)
    raise RuntimeError(f"{' '.join(command)} gave {len(measured)} numbers in {TRIES} runs")


def _measure(command: list[str], address: str, port: int) -> Bandwidth:
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + WAIT_S
        while not listens(port) and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        client = subprocess.run([*command, address], capture_output=True, text=True, timeout=RUN_S)
        rows = parse(client.stdout)
        if client.returncode != 0 or len(rows) != 1:
            server.kill()
            told = server.communicate()[0]
            raise RuntimeError(f"{' '.join(command)} failed: {client.stdout}{client.stderr}; the server: {told}")
        server.wait(WAIT_S)
        return rows[0]
    finally:
        server.kill()
        server.communicate()
