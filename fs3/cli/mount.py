"""`fs3 mount` and `fs3 umount`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fs3.cli.target import cluster_options, default_target
from fs3.core.config import parse_rdma
from fs3.fuse import mount, parse_options, umount
from fs3.fuse.options import ENGINES


@click.command("mount")
@click.argument("mountpoint", type=click.Path())
@click.option(
    "-o", "options", default="", metavar="OPT[,OPT...]", help="For example ro,allow_other,max_memory_bytes=1GiB."
)
@click.option("--engine", type=click.Choice(ENGINES), help="Who serves it: native (the default), or fusepy, in Python.")
@click.option("--foreground", is_flag=True, help="Serve in this process until it is unmounted or gets SIGTERM.")
@click.option("--log-file", type=click.Path(dir_okay=False), help="Where the daemon writes its log.")
@click.option("--pid-file", type=click.Path(dir_okay=False), help="Where the daemon writes who it is.")
@click.option("--rdma", multiple=True, metavar="KEY=VALUE", help="How RDMA is used; may be repeated.")
@cluster_options
def mount_command(
    mountpoint: str,
    options: str,
    engine: str | None,
    foreground: bool,
    log_file: str | None,
    pid_file: str | None,
    rdma: tuple[str, ...],
    **where: Any,
) -> int:
    """Mount a cluster on the directory MOUNTPOINT.

    The engine fusepy serves it in Python where the native one cannot run; it needs the package mfusepy
    (pip install 'fs3[fusepy]') and libfuse 3.

    Returns when the mount answers; the daemon goes on in the background. Options: ro, allow_other, threads,
    max_memory_bytes, attr_timeout_s, entry_timeout_s, readahead_bytes, noatime, local_locks, op_timeout_s,
    transport. Keys of --rdma: devices, gid_index, service_level, traffic_class, pkey_index, mtu, ack_timeout,
    retry_count, registered_bytes_max.
    """
    target = default_target(where["url"], where["cluster"], where["token_file"])
    files = {"log_file": log_file, "pid_file": pid_file}
    given: dict[str, Any] = {name: str(Path(path).absolute()) for name, path in files.items() if path}
    given["rdma"] = parse_rdma(rdma)
    if engine is not None:
        given["engine"] = engine
    parsed = parse_options(options, **given)
    return mount(target.url, mountpoint, token=target.token, options=parsed, foreground=foreground)


@click.command("umount")
@click.argument("mountpoint", type=click.Path())
@click.option("--lazy", is_flag=True, help="Take it out of the tree now, even while files on it are open.")
def umount_command(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; returns when its daemon has written everything and ended."""
    umount(mountpoint, lazy=lazy)
