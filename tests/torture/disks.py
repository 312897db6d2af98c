"""Faulty disks: one `fs3-faultdisk` process and FUSE mount per disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fs3.testing.process import ProcessRef, spawn, wait_until

BINARY = Path(sys.executable).parent / "fs3-faultdisk"
ORDER_S = 60.0


@dataclass(frozen=True)
class Losses:
    """What a power cut did to the unsynced changes of a disk."""

    kept: int
    lost: int
    torn: int
    names_lost: int


class FaultDisk:
    """A disk mounted at `mountpoint`, whose files are kept below `backing`."""

    def __init__(self, mountpoint: Path, backing: Path) -> None:
        self.mountpoint = mountpoint
        self._backing = backing
        self._socket = backing / "orders"
        self._process: ProcessRef | None = None

    def start(self, seed: int) -> None:
        """Mount it."""
        self.mountpoint.mkdir(parents=True, exist_ok=True)
        self._backing.mkdir(parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)
        argv = [str(BINARY), str(self._backing), str(self.mountpoint), str(self._socket), str(seed)]
        log = self._backing / "log"
        process = self._process = spawn(argv, log=log)

        def ready() -> bool:
            if not process.alive():
                raise RuntimeError(f"the faulty disk did not start: {log.read_text(errors='replace').strip()}")
            with contextlib.suppress(OSError):
                self.order({"do": "counts"})
                return True
            return False

        wait_until(ready, timeout_s=ORDER_S, what=f"the faulty disk at {self.mountpoint}")

    def order(self, order: dict[str, object]) -> dict[str, int]:
        """Have it obey, and return what it answers."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ORDER_S)
            connection.connect(str(self._socket))
            connection.sendall(json.dumps(order).encode() + b"\n")
            with connection.makefile() as answer:
                found: dict[str, int] = json.loads(answer.readline())
        if "error" in found:
            raise RuntimeError(f"the faulty disk at {self.mountpoint} refused {order}: {found['error']}")
        return found

    def set_faults(self, **faults: object) -> None:
        """Put these faults in force, and no others."""
        self.order({"do": "set", "faults": faults})

    def power_cycle(self, seed: int) -> Losses:
        """Cut the power and mount what survived. Nobody may be using it."""
        losses = Losses(**self.order({"do": "cut", "seed": seed}))
        self.stop()
        self.start(seed)
        return losses

    def stop(self) -> None:
        """Take the mount away. Harmless when there is none."""
        if self._process is not None:
            self._process.kill()
            self._process = None
        if f" {self.mountpoint} " in Path("/proc/mounts").read_text():
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=False, capture_output=True)


def missing_device() -> str:
    """Why faulty disks cannot be made here; "" when they can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be opened"
    if not BINARY.exists():
        return f"{BINARY} is missing: run `make build`"
    if shutil.which("umount") is None:
        return "the program umount is missing"
    return ""
