"""The mount table, and where a mount's daemon is noted."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fs3.core.errors import error
from fs3.core.process import start_ticks
from fs3.v1.frame_pb2 import Code

FSTYPE = "fuse.fs3"
_UMOUNT_NOFOLLOW = 8
_MNT_DETACH = 2


@dataclass(frozen=True)
class Mounted:
    """One line of the mount table."""

    mountpoint: str
    fstype: str
    source: str
    options: tuple[str, ...] = ()
    """Those of the mount itself, such as ro and nosuid."""

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
            options = tuple(fields[5].split(",")) if len(fields) >= 6 else ()
            mounts.append(Mounted(_unescape(fields[4]), kinds[0], _unescape(kinds[1]), options))
    return mounts


def mounted_at(mountpoint: str) -> Mounted | None:
    """What is mounted on exactly this path (the topmost mount), or None."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as handle:
        mounts = parse_mountinfo(handle.read())
    found = [m for m in mounts if m.mountpoint == mountpoint]
    return found[-1] if found else None


def detach(mountpoint: str, *, lazy: bool) -> None:
    """Take the mount away, by system call or, for ordinary users, through fusermount3. Raises Fs3Error."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazy else 0)
    if libc.umount2(os.fsencode(mountpoint), flags) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOENT):
        return  # nothing is mounted there any more
    if number == errno.EPERM:
        helper = shutil.which("fusermount3") or shutil.which("fusermount")
        if helper is None:
            raise error(
                Code.CODE_NOT_SUPPORTED, "fusermount3 is missing: install the package fuse3, or unmount as root"
            )
        command = [helper, "-u", *(["-z"] if lazy else []), "--", mountpoint]
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return
        if "busy" not in done.stderr.lower():
            raise error(Code.CODE_ACCESS, f"{mountpoint} cannot be unmounted: {' '.join(done.stderr.split())}")
        number = errno.EBUSY
    if number == errno.EBUSY:
        raise error(
            Code.CODE_BUSY,
            f"{mountpoint} is in use: end what uses it (fuser -vm {mountpoint} shows it) or unmount with --lazy",
        )
    raise error(Code.CODE_UNAVAILABLE, f"{mountpoint} cannot be unmounted: {os.strerror(number)}")


def mount_device(mountpoint: str) -> str:
    """`major:minor` of the topmost mount on this path. Raises OSError."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as handle:
        lines = [line.split(" ") for line in handle]
    found = [fields[2] for fields in lines if len(fields) > 4 and _unescape(fields[4]) == mountpoint]
    if not found:
        raise OSError(errno.ENOENT, f"{mountpoint} is not mounted")
    return found[-1]


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


def digest(mountpoint: str) -> str:
    """A short name of a mountpoint that no other one has."""
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:12]


def default_file(mountpoint: str, suffix: str) -> Path:
    """The pid file or log of a mountpoint (as :func:`real_path` gives it)."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", mountpoint).strip("-")[-80:] or "root"
    return run_directory() / f"mount-{name}-{digest(mountpoint)}{suffix}"


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
