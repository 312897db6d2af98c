"""User-space I/O of an fs3 mount under the name by which programs for 3FS import it. See docs/usrbio.md."""

from __future__ import annotations

import os

from fs3.native import deregister_fd, extract_mount_point, ioring, iovec, punch_hole, register_fd

__all__ = [
    "deregister_fd",
    "extract_mount_point",
    "force_fsync",
    "hardlink",
    "ioring",
    "iovec",
    "punch_hole",
    "register_fd",
]


def force_fsync(fd: int) -> int:
    """Publish the length of an open file, so that the next `stat` anywhere tells it. Returns 0; raises OSError."""
    os.fsync(fd)
    return 0


def hardlink(target: str, link_name: str) -> None:
    """Give a file another name. Raises OSError."""
    os.link(target, link_name)
