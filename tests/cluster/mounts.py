"""Mounts of test clusters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fs3.fuse import mount, parse_options, umount
from fs3.testing.cluster import LocalCluster


@contextmanager
def mounted(cluster: LocalCluster, mountpoint: Path, options: str = "", *, engine: str = "native") -> Iterator[Path]:
    """Mount `cluster` for the time of the block."""
    mountpoint.mkdir(exist_ok=True)
    stem = str(cluster.directory / f"mount-{mountpoint.name}")
    parsed = parse_options(options, engine=engine, log_file=f"{stem}.log", pid_file=f"{stem}.pid")
    mount(cluster.url, str(mountpoint), token=cluster.token, options=parsed)
    try:
        yield mountpoint
    finally:
        umount(str(mountpoint), pid_file=f"{stem}.pid")


@contextmanager
def directory_of_all() -> Iterator[Path]:
    """A directory that every user can get to; pytest's own are for one user."""
    with tempfile.TemporaryDirectory(prefix="fs3-mounts-") as base:
        os.chmod(base, 0o755)
        yield Path(base)
