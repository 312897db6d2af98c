"""Paths as callers give them, as the service takes them."""

from __future__ import annotations

import os
from pathlib import Path

StrPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

DEFAULT_UMASK = 0o022


def to_service(base: bytes, path: StrPath) -> bytes:
    """`path` from the root, where `base` (without slashes at its ends) is the directory that callers' paths start at.

    A leading slash makes no difference. Raises ValueError for a NUL byte, as the functions of :mod:`os` do.
    """
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ValueError("embedded null byte")
    relative = raw.strip(b"/")
    return b"/".join(part for part in (base, relative) if part)


def join(directory: StrPath, name: str) -> str:
    """`directory`/`name`."""
    return f"{os.fsdecode(directory).rstrip('/')}/{name}"


def current_umask() -> int:
    """The umask of this process."""
    # os.umask() would change it for a moment, for all threads.
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except (OSError, ValueError, IndexError):
        pass
    return DEFAULT_UMASK
