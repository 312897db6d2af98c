"""Mounts of test clusters."""

from __future__ import annotations

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
