"""The mount table, and where a mount's daemon is noted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fs3.core.process import start_ticks

FSTYPE = "fuse.fs3"


@dataclass(frozen=True)
class Mounted:
    """One line of the mount table."""

    mountpoint: str
    fstype: str
    source: str

    @property
    def is_fs3(self) -> bool:
        """Whether it is a mount of ours."""
        return self.fstype == FSTYPE or (self.fstype == "fuse" and self.source == "fs3")


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), text)


def parse_mountinfo(text: str) -> list[Mounted]:
    """Parse /proc/self/mountinfo; later mounts come later."""
    mounts = []
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        fields, kinds = left.split(" "), right.split(" ")
        if separator and len(fields) >= 5 and len(kinds) >= 2:
            mounts.append(Mounted(_unescape(fields[4]), kinds[0], _unescape(kinds[1])))
    return mounts


def mounted_at(mountpoint: str) -> Mounted | None:
    """What is mounted on exactly this path (the topmost mount), or None."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as handle:
        mounts = parse_mountinfo(handle.read())
    found = [m for m in mounts if m.mountpoint == mountpoint]
    return found[-1] if found else None


def real_path(mountpoint: str) -> str:
    """The path as the mount table has it, without touching what is mounted there.

    Only the parent directory is resolved: the mount itself may be dead.
    """
    path = os.path.abspath(mountpoint)
    parent, name = os.path.split(path)
    resolved = os.path.join(os.path.realpath(parent), name)
    if mounted_at(resolved) is not None:
        return resolved
    return os.path.realpath(resolved)


def run_directory() -> Path:
    """Where pid files and logs go: $FS3_RUN_DIR, or the usual place for this user."""
    if chosen := os.environ.get("FS3_RUN_DIR"):
        return Path(chosen)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "fs3"
    if os.geteuid() == 0:
        return Path("/run/fs3")
    return Path(tempfile.gettempdir()) / f"fs3-{os.geteuid()}"


def default_file(mountpoint: str, suffix: str) -> Path:
    """The pid file or log of a mountpoint (as :func:`real_path` gives it)."""
    digest = hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:12]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", mountpoint).strip("-")[-80:] or "root"
    return run_directory() / f"mount-{name}-{digest}{suffix}"


@dataclass(frozen=True)
class Daemon:
    """A mount's process, named so that a reused pid is not mistaken for it."""

    pid: int
    ticks: int
    log: str

    def alive(self) -> bool:
        """Whether that very process still runs."""
        return start_ticks(self.pid) == self.ticks

    def save(self, path: Path) -> None:
        """Write the pid file atomically. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"pid": self.pid, "ticks": self.ticks, "log": self.log}) + "\n")
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Daemon | None:
        """The process a pid file names, if it still runs."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            data = json.loads(path.read_text())
            daemon = cls(int(data["pid"]), int(data["ticks"]), str(data["log"]))
            if daemon.alive():
                return daemon
        return None
