"""`fs3 mount` and `fs3 umount`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.target import cluster_options, default_target
from fs3.core.config import parse_rdma
from fs3.core.errors import error
from fs3.fuse import mount, parse_options, take_over, umount
from fs3.fuse.options import ENGINES
from fs3.fuse.table import mounted_at, real_path
from fs3.v1.frame_pb2 import Code


@click.command("mount")
@click.argument("mountpoint", type=click.Path())
@click.option(
    "-o", "options", default="", metavar="OPT[,OPT...]", help="For example ro,allow_other,max_memory_bytes=1GiB."
)
@click.option("--engine", type=click.Choice(ENGINES), help="Who serves it: native (the default), or fusepy, in Python.")
@click.option(
    "--foreground/--daemon",
    default=False,
    help="Serve in this process until it is unmounted or gets SIGTERM, or in the background (the default).",
)
@click.option("--takeover", is_flag=True, help="Go on with the mount that another daemon serves; see below.")
@click.option("--log-file", type=click.Path(dir_okay=False), help="Where the daemon writes its log.")
@click.option("--pid-file", type=click.Path(dir_okay=False), help="Where the daemon writes who it is.")
@click.option("--rdma", multiple=True, metavar="KEY=VALUE", help="How RDMA is used; may be repeated.")
@cluster_options
def mount_command(
    mountpoint: str,
    options: str,
    engine: str | None,
    foreground: bool,
    takeover: bool,
    log_file: str | None,
    pid_file: str | None,
    rdma: tuple[str, ...],
    **where: Any,
) -> int:
    """Mount a cluster on the directory MOUNTPOINT.

    The engine fusepy serves it in Python where the native one cannot run; it needs the package mfusepy
    (pip install 'fs3[fusepy]') and libfuse 3, and has fewer options.

    Returns when the mount answers; the daemon goes on in the background. A URL with a path, such as
    fs3://host:7000/data, mounts that directory.

    \b
    Options of -o:
      ro                       refuse every change
      allow_other              let other users use it
      subdir=PATH              mount this directory of the cluster
      cache=auto|strict|none   what others do is seen at the next open and within a second (auto), at once
                               (strict), or at once and without any cache (none)
      noatime                  reading never changes access times
      suid, dev, noexec        honour set-id bits, devices; run no programs
      uid=N, gid=N             show everything as this user's, do everything as this user
      uidmap=LOCAL:CLUSTER:N   which users are which in the cluster (gidmap: groups); several with /
      max_memory=SIZE          memory for data on its way (256MiB)
      op_timeout_s=N           after this many seconds an operation fails (30)
      metrics_port=PORT        counters for Prometheus on 127.0.0.1 (metrics=HOST:PORT: elsewhere)
      token_file=FILE          the cluster's token
      log_level, threads, attr_timeout_s, entry_timeout_s, readahead_bytes, local_locks, default_permissions,
      transport=auto|tcp|rdma, shared_memory=true|false, cluster_id

    Keys of --rdma: devices, gid_index, service_level, traffic_class, pkey_index, mtu, ack_timeout, retry_count,
    registered_bytes_max.

    With --takeover a new daemon takes the place of the one that serves MOUNTPOINT, for an upgrade or for other options:
    files stay open, locks stay held, rings go on. It gets cluster and options of the old one, changed by what is given.
    """  # noqa: D301
    files = {"log_file": log_file, "pid_file": pid_file}
    given: dict[str, Any] = {name: str(Path(path).absolute()) for name, path in files.items() if path}
    if takeover:
        if foreground or any(where.values()):
            raise click.UsageError("--takeover keeps the cluster and serves in the background")
        if engine is not None:
            raise click.UsageError("--takeover keeps the engine, which has to be the native one")
        changed = {**given, "rdma": parse_rdma(rdma)} if rdma else given
        take_over(mountpoint, options=lambda old: parse_options(options, base=old, **changed))
        return 0
    given["rdma"] = parse_rdma(rdma)
    if engine is not None:
        given["engine"] = engine
    target = default_target(where["url"], where["cluster"], where["token_file"])
    parsed = parse_options(options, **given)
    return mount(target.url, mountpoint, token=target.token, options=parsed, foreground=foreground)


@click.command("umount")
@click.argument("mountpoint", type=click.Path())
@click.option("--lazy", is_flag=True, help="Take it out of the tree now, even while files on it are open.")
def umount_command(mountpoint: str, lazy: bool) -> None:
    """Unmount MOUNTPOINT; returns when its daemon has written everything and ended."""
    umount(mountpoint, lazy=lazy)


@click.command("stats")
@click.argument("mountpoint", type=click.Path())
@json_option
def stats_command(mountpoint: str, as_json: bool) -> None:
    """What the mount at MOUNTPOINT did since it began: requests, bytes, memory, what went wrong on the way.

    The same is in MOUNTPOINT/3fs-virt/stats, and how it is mounted in MOUNTPOINT/3fs-virt/config.
    """
    there = mounted_at(real_path(mountpoint))
    if there is None or not there.is_fs3:
        raise error(Code.CODE_NOT_FOUND, f"{mountpoint} is no mount of fs3")
    try:
        stats = json.loads((Path(mountpoint) / "3fs-virt" / "stats").read_text())
    except FileNotFoundError:
        raise error(Code.CODE_NOT_SUPPORTED, f"{mountpoint} keeps no counts: only the native engine does") from None
    if as_json:
        print_json(stats)
        return
    for name, value in _summary(stats):
        click.echo(f"{name:<18}{value}")
    rows = sorted(stats["operations"].items(), key=lambda item: -item[1]["total_s"])
    if rows:
        click.echo("")
        print_table(["requests", "count", "mean ms", "max ms"], [_row(name, counts) for name, counts in rows])


def _row(name: str, counts: dict[str, Any]) -> list[object]:
    mean_ms = counts["total_s"] / counts["count"] * 1e3
    return [name, counts["count"], round(mean_ms, 3), round(counts["max_s"] * 1e3, 3)]


def _summary(stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Lines for people."""
    yield "mounted for", f"{stats['uptime_s']:.0f} s"
    yield "read", human_bytes(stats["bytes_read"])
    yield "written", human_bytes(stats["bytes_written"])
    yield "open", f"{stats['open_files']} files, {stats['open_directories']} directories"
    used = stats["read_buffer_bytes"] + stats["write_buffer_bytes"]
    yield "memory", f"{human_bytes(used)} in use of at most {human_bytes(stats['max_memory_bytes'])}"
    found = stats["cache_hits"] + stats["cache_misses"]
    if found:
        yield "read ahead", f"{100 * stats['cache_hits'] / found:.0f}% of {found} blocks were there or on their way"
    yield "other replica", f"{stats['read_failovers']} reads, {stats['read_hedges']} more because one was slow"
    yield "written again", f"{stats['write_retries']} pieces"
    damaged = stats["checksum_failures"], stats["payload_resends"]
    yield "damaged", f"{damaged[0]} pieces read, {damaged[1]} written; all put right or refused"
