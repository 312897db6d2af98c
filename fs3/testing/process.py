"""Processes that are found again by pid after their starter has gone, without mistaking a reused pid."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fs3.core.process import start_ticks

POLL_S = 0.02


def wait_until(condition: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Return when `condition` holds. Raises TimeoutError naming `what` after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")
        time.sleep(POLL_S)


@dataclass(frozen=True)
class ProcessRef:
    """A process, named by pid and start time."""

    pid: int
    ticks: int

    @classmethod
    def load(cls, path: Path) -> ProcessRef | None:
        """The process a pid file names, if that very process still runs."""
        try:
            data = json.loads(path.read_text())
            ref = cls(int(data["pid"]), int(data["ticks"]))
        except (OSError, ValueError, KeyError):
            return None
        return ref if ref.alive() else None

    def save(self, path: Path) -> None:
        """Write the pid file atomically."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pid": self.pid, "ticks": self.ticks}))
        temporary.replace(path)

    def alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        return start_ticks(self.pid) == self.ticks

    def signal(self, number: int) -> None:
        """Send a signal if it still runs."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def stop(self, *, timeout_s: float) -> bool:
        """SIGTERM, then SIGKILL after `timeout_s`. Returns whether it ended by itself."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            self.wait(timeout_s=timeout_s)
            return True
        except TimeoutError:
            self.kill()
            return False

    def kill(self) -> None:
        """SIGKILL and wait until it is gone."""
        self.signal(signal.SIGKILL)
        self.wait(timeout_s=30)

    def wait(self, *, timeout_s: float) -> None:
        """Wait for the end. Raises TimeoutError."""

        def gone() -> bool:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)
            return not self.alive()

        wait_until(gone, timeout_s=timeout_s, what=f"the end of process {self.pid}")


def spawn(argv: list[str], *, log: Path, env: dict[str, str] | None = None) -> ProcessRef:
    """Start a detached process whose output is appended to `log`."""
    with log.open("ab") as out:
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )
    ticks = start_ticks(child.pid)
    child.returncode = 0  # it is watched by pid from here on; Popen must not warn that it still runs
    return ProcessRef(child.pid, ticks if ticks is not None else -1)


def process_cpu_seconds(pid: int) -> float:
    """User and system time of a process, seconds; 0 when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    values = stat[stat.rindex(")") + 2 :].split()
    return (int(values[11]) + int(values[12])) / os.sysconf("SC_CLK_TCK")


def process_written_bytes(pid: int) -> int:
    """Bytes a process gave the disks to write; 0 when it is gone or belongs to another user."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), 0)
