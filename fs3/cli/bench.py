"""`fs3 bench limits|storage|read|write|meta`: what this machine can do, and what fs3 does on it."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import fs3
from fs3.cli.output import json_option, print_json, print_table
from fs3.cli.target import DEFAULT_DIRECTORY, cluster_options, default_target
from fs3.client import FileSystem
from fs3.core.errors import error
from fs3.core.units import parse_bytes
from fs3.fuse.table import Daemon, default_file, mounted_at, real_path
from fs3.testing import measure
from fs3.testing.cluster import LocalCluster
from fs3.testing.measure import Measured
from fs3.v1.frame_pb2 import Code
from fs3.v1.routing_pb2 import Routing


@click.group("bench")
def bench_command() -> None:
    """Measure the limits of this machine, and fs3 against them.

    CPU seconds are those of this process and, for a local cluster, of its services.
    """


def _show(found: dict[str, Measured], as_json: bool) -> None:
    if as_json:
        print_json({name: m.record() for name, m in found.items()})
        return
    print_table(["MEASUREMENT", "RATE", "COST", "P50"], [_cells(name, m) for name, m in found.items()])


def _cells(name: str, m: Measured) -> list[str]:
    rate = f"{m.mb_per_s:,.0f} MB/s" if m.bytes else f"{m.per_s:,.0f}/s"
    cost = f"{m.cpu_s_per_gib:.2f} CPU-s/GiB" if m.bytes else f"{1e6 * m.cpu_seconds / m.operations:.0f} CPU-µs each"
    return [name, rate, cost, f"{m.p50_us:.0f} µs" if m.p50_us else ""]


@contextmanager
def _scratch(where: dict[str, Any]) -> Iterator[tuple[FileSystem, str, LocalCluster | None]]:
    """A connection, a directory on the cluster that is removed afterwards, and the cluster if it is a local one."""
    target = default_target(where["url"], where["cluster"], where["token_file"])
    local = where["cluster"] or os.environ.get("FS3_CLUSTER") or DEFAULT_DIRECTORY
    cluster = LocalCluster(Path(local)) if (Path(local) / "cluster.toml").exists() else None
    if cluster and cluster.url != target.url:
        cluster = None
    with fs3.connect(target.url, token=target.token) as fs:
        directory = f"/.fs3-bench-{uuid.uuid4().hex[:12]}"
        fs.mkdir(directory)
        try:
            yield fs, directory, cluster
        finally:
            fs.rmtree(directory)


def _pids(cluster: LocalCluster | None, kind: str = "") -> list[int]:
    return cluster.pids(kind) if cluster else []


def _size(text: str) -> int:
    size = parse_bytes(text)
    if size < measure.MIB:
        raise error(Code.CODE_INVALID_ARGUMENT, f"--size {text} is less than 1MiB")
    return size


@contextmanager
def _scratch_on_mount(mountpoint: str) -> Iterator[tuple[Path, list[int]]]:
    """A directory on a mount that is removed afterwards, and the pids of daemon and local services."""
    path = real_path(mountpoint)
    if mounted_at(path) is None:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{mountpoint} is not a mountpoint; mount a cluster there first")
    daemon = Daemon.load(default_file(path, ".pid"))
    local = Path(os.environ.get("FS3_CLUSTER") or DEFAULT_DIRECTORY)
    pids = LocalCluster(local).pids() if (local / "cluster.toml").exists() else []
    directory = Path(tempfile.mkdtemp(prefix=".fs3-bench-", dir=path))
    try:
        yield directory, pids + ([daemon.pid] if daemon else [])
    finally:
        shutil.rmtree(directory)


mount_option = click.option("--mount", "mountpoint", metavar="DIR", help="Through this mount instead of natively.")
size_option = click.option("--size", default="1GiB", show_default=True, help="How much to move.")


@bench_command.command("limits")
@click.option("--dir", "directory", default=None, help="Where files are made.  [default: the temporary directory]")
@click.option("--scale", default=1.0, show_default=True, help="Below 1: shorter and less exact.")
@json_option
def limits_command(directory: str | None, scale: float, as_json: bool) -> None:
    """Memory, loopback TCP, disk, and a bare replication chain of three nodes."""
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        found = measure.limits(
            Path(scratch), scale=scale, report=lambda name: click.echo(f"measuring {name} ...", err=True)
        )
    _show(found, as_json)


@bench_command.command("write")
@size_option
@mount_option
@cluster_options
@json_option
def write_command(size: str, mountpoint: str | None, as_json: bool, **where: Any) -> None:
    """Write one large file, natively or through a mount (then with fsync); the second of two runs counts."""
    total = _size(size)
    if mountpoint:
        with _scratch_on_mount(mountpoint) as (home, daemons):
            measure.mount_write(home / "file", total)
            _show({"write (mount)": measure.mount_write(home / "file", total, pids=daemons)}, as_json)
        return
    with _scratch(where) as (fs, directory, cluster):
        pids = _pids(cluster)
        measure.native_write(fs, f"{directory}/warm", total, pids=pids)
        fs.remove(f"{directory}/warm")
        found = measure.native_write(fs, f"{directory}/file", total, pids=pids)
    _show({"write": found}, as_json)


@bench_command.command("read")
@size_option
@mount_option
@cluster_options
@json_option
def read_command(size: str, mountpoint: str | None, as_json: bool, **where: Any) -> None:
    """Read one large file, and natively also random 4 KiB blocks of it; servers are warm."""
    total = _size(size)
    if mountpoint:
        with _scratch_on_mount(mountpoint) as (home, daemons):
            measure.mount_write(home / "file", total)
            first = measure.mount_read(home / "file", total, pids=daemons)
            measure.mount_read(home / "file", total)
            again = measure.mount_read(home / "file", total, pids=daemons)
            _show({"first read (mount)": first, "read (mount)": again}, as_json)
        return
    with _scratch(where) as (fs, directory, cluster):
        pids = _pids(cluster)
        path = f"{directory}/file"
        measure.native_write(fs, path, total, pids=pids)
        found = {"first read": measure.native_read(fs, path, total, pids=pids)}
        measure.native_read(fs, path, total, pids=pids)
        found["read"] = measure.native_read(fs, path, total, pids=pids)
        for batch, operations in ((1, 5_000), (256, 100_000)):
            name = f"random 4 KiB, {batch} at a time"
            found[name] = measure.native_random_read(
                fs, path, file_bytes=total, batch=batch, operations=operations, pids=pids
            )
    _show(found, as_json)


@bench_command.command("storage")
@size_option
@click.option("--operations", default=100_000, show_default=True, help="Batched small reads; the others are fewer.")
@click.option("--scale", default=1.0, show_default=True, help="Below 1: limits are measured shorter and less exactly.")
@cluster_options
@json_option
def storage_command(size: str, operations: int, scale: float, as_json: bool, **where: Any) -> None:
    """Large and small reads and writes against the limits of this machine, measured first.

    The limits are loopback TCP, a ping-pong and a bare replication chain; write amplification is bytes written to disks
    per byte and replica, of a local cluster.
    """
    total = _size(size)
    if operations < 256 or not 0 < scale <= 10:
        raise error(Code.CODE_INVALID_ARGUMENT, "--operations must be at least 256, --scale above 0 and at most 10")

    def report(name: str) -> None:
        click.echo(f"measuring {name} ...", err=True)

    names = dict.fromkeys(["tcp_1_stream", *measure.STORAGE_LIMITS.values()])
    with _scratch(where) as (fs, directory, cluster), tempfile.TemporaryDirectory(dir=_disk_of(cluster)) as scratch:
        limits = measure.limits(Path(scratch), names=names, scale=scale, report=report)
        found = measure.storage(
            fs,
            f"{directory}/file",
            total_bytes=total,
            operations=operations,
            replicas=max(table.replicas for table in Routing.FromString(fs.client.routing()).tables),
            pids=_pids(cluster),
            storage_pids=_pids(cluster, "storage"),
            report=report,
        )
    _show_storage(limits, found, as_json)


def _disk_of(cluster: LocalCluster | None) -> Path | None:
    """Where the bare chain writes: to the disk of a local cluster."""
    return cluster.directory if cluster else None


def _show_storage(limits: dict[str, Measured], found: dict[str, Measured], as_json: bool) -> None:
    records = {name: m.record() for name, m in found.items()}
    rows = [[*_cells(name, m), ""] for name, m in limits.items()]
    for name, m in found.items():
        against = measure.STORAGE_LIMITS.get(name)
        compared = ""
        if against:
            records[name]["ratio"] = round(m.rate_of(limits[against]), 3)
            compared = f"{m.rate_of(limits[against]):.2f} × {against}"
            if name == measure.LATENCY:
                records[name]["p50_ratio"] = round(m.p50_us / limits[against].p50_us, 3)
                compared = f"p50 {m.p50_us / limits[against].p50_us:.2f} × that of {against}"
        if m.write_amplification:
            compared = f"{m.write_amplification:.1f} bytes to disk per byte and replica"
        rows.append([*_cells(name, m), compared])
    if as_json:
        print_json({"limits": {name: m.record() for name, m in limits.items()}, "fs3": records})
    else:
        print_table(["MEASUREMENT", "RATE", "COST", "P50", "COMPARED"], rows)


@bench_command.command("meta")
@click.option("--files", default=5_000, show_default=True, help="How many files to make.")
@click.option("--in-flight", default=32, show_default=True, help="Calls at a time.")
@click.option("--jobs", default=8, show_default=True, help="With --mount: processes, each in its own directory.")
@mount_option
@cluster_options
@json_option
def meta_command(files: int, in_flight: int, jobs: int, mountpoint: str | None, as_json: bool, **where: Any) -> None:
    """Creations, stats and removals of files: empty ones natively, of 4 KiB through a mount."""
    if files < 1 or in_flight < 1 or not 1 <= jobs <= files:
        raise error(
            Code.CODE_INVALID_ARGUMENT, "--files, --in-flight and --jobs must be at least 1, jobs at most files"
        )
    if mountpoint:
        with _scratch_on_mount(mountpoint) as (home, daemons):
            _show(measure.mount_small_files(home / "d", jobs=jobs, operations=files, pids=daemons), as_json)
        return
    with _scratch(where) as (fs, directory, cluster):
        pids = _pids(cluster)
        found = measure.native_metadata(fs, f"{directory}/d", operations=files, in_flight=in_flight, pids=pids)
    _show(found, as_json)
