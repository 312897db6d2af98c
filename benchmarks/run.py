"""Limits of this machine, then fs3 on it, as ratios measured in one run. `make bench` runs it.

Starts a cluster of its own (three replicas, durable metadata, checksums verified) in a temporary directory, warms it,
measures, stops it. `--only kv`: the KV cache beside its peers alone. `--json FILE` keeps the figures, `--markdown`
prints the tables of `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import dataloader
import kvcache
import passthrough

import fs3
from fs3.cli.health import engine_statuses
from fs3.fuse import MountOptions, mount, umount
from fs3.testing import measure
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.measure import MIB, STORAGE_LIMITS, Measured
from fs3.testing.process import process_cpu_seconds
from fs3.v1.storage_pb2 import EngineStatus

# Of the rows of measure.storage, in their order: ratios, and overwrites per second.
STORAGE_FLOORS = (0.6, 0.4, 0.25, 0.3, 2000.0)
# What `--only` can choose: everything about files, and the KV cache.
PARTS = ("files", "kv")
# Passes before that, so that memory and blocks were used before.
WARMING = 2
# Small reads through the ring, for each small file elsewhere: they are that much quicker.
RING_READS_PER_FILE = 25
# How long the removal of what was unlinked is waited for, and how often is looked.
COLLECT_S_MAX = 120.0
COLLECT_LOOK_S = 2.0


@dataclass(frozen=True)
class Work:
    """How much is measured: bytes of large files, number of small ones, how often each thing (the median counts)."""

    size: int
    files: int
    times: int
    scale: float
    """Of the limits: below 1 they are measured for a shorter time."""


@dataclass(frozen=True)
class Row:
    """A figure and what it must reach.

    Either so much of the limit `against`, or of `peer`, measured in turn with it, or so much in its own unit.
    """

    name: str
    figure: Measured
    against: str
    floor: float
    peer: Measured | None = None
    peer_name: str = "native"
    daemon_cpu_s_per_gib: float = 0.0
    """Of the cost, what the mount daemon used."""

    @property
    def rate(self) -> str:
        """MB/s or operations per second."""
        return f"{self.figure.mb_per_s:,.0f} MB/s" if self.figure.bytes else f"{self.figure.per_s:,.0f}/s"

    def reached(self, limits: dict[str, Measured]) -> float | None:
        """What is compared with the floor; None where the peer could not be measured."""
        if self.peer is not None:
            return self.figure.rate_of(self.peer)
        if not self.against:
            return self.figure.mb_per_s if self.figure.bytes else self.figure.per_s
        limit = limits.get(self.against)
        return self.figure.rate_of(limit) if limit else None

    def missed(self, limits: dict[str, Measured]) -> bool:
        """Whether it is below its floor."""
        reached = self.reached(limits)
        return reached is not None and reached < self.floor

    def cells(self, limits: dict[str, Measured]) -> list[str]:
        """For the table."""
        cost = (
            f"{self.figure.cpu_s_per_gib:.2f} CPU-s/GiB"
            if self.figure.bytes
            else f"{1e6 * self.figure.cpu_seconds / self.figure.operations:.0f} CPU-µs"
        )
        if self.daemon_cpu_s_per_gib:
            cost += f", mount {self.daemon_cpu_s_per_gib:.2f}"
        reached = self.reached(limits)
        compared = "-" if not self.against else f"{reached:.2f} × {self.against}" if reached else "not measured"
        if self.figure.write_amplification:
            compared = f"{self.figure.write_amplification:.1f} bytes to disk per byte"
        if self.peer is not None:
            compared = f"{reached:.2f} × {self.peer_name}, in turn with it"
        relative = self.against or self.peer is not None
        floor = f"{self.floor:g}" + ("" if relative else " MB/s" if self.figure.bytes else "/s")
        return [self.name, self.rate, cost, compared, floor, "NO" if self.missed(limits) else "yes" if reached else "-"]


HEADER = ["work", "rate", "cost", "ratio", "floor", "met"]


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def measure_native(cluster: LocalCluster, work: Work) -> list[Row]:
    """The native client's rows: storage, then metadata."""
    pids = cluster.pids()
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        storage = measure.storage(
            fs,
            "/large",
            total_bytes=work.size,
            replicas=cluster.spec.replicas,
            times=work.times,
            pids=pids,
            storage_pids=cluster.pids("storage"),
            report=say,
        )
        say("native metadata")
        names = measure.native_metadata(fs, "/names", operations=work.files, in_flight=32, pids=pids)
    rows = [
        Row(f"{name}, native", figure, STORAGE_LIMITS.get(name, ""), floor)
        for (name, figure), floor in zip(storage.items(), STORAGE_FLOORS, strict=True)
    ]
    return [
        *rows,
        Row("create, native, 32 in flight", names["create"], "", 0.0),
        Row("stat, native, 32 in flight", names["stat"], "", 5000.0),
        Row("unlink, native, 32 in flight", names["unlink"], "", 0.0),
    ]


def measure_data(cluster: LocalCluster, work: Work) -> list[Row]:
    """The dataloader's row. Samples and large file have half of the size each: the servers' caches hold both."""
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        samples, large = dataloader.figures(
            fs, work.size // 2, turns=work.times, warming=2 * WARMING, pids=cluster.pids(), say=say
        )
    name = f"random 100 KiB samples, batches of {dataloader.BATCH}, dataset"
    return [Row(name, samples, "", 0.5, large, "large reads")]


def wait_collected(cluster: LocalCluster) -> None:
    """Wait until nothing is being removed any more: what one measurement removed is not to burden the next."""
    ends_s, before = time.monotonic() + COLLECT_S_MAX, -1
    while time.monotonic() < ends_s:
        statuses = engine_statuses(cluster, cluster.routing())
        chunks = sum(t.chunks for s in statuses.values() if isinstance(s, EngineStatus) for t in s.targets)
        if chunks == before:
            return
        before = chunks
        time.sleep(COLLECT_LOOK_S)
    say(f"chunks are still being removed after {COLLECT_S_MAX:.0f} s")


def measure_mount(cluster: LocalCluster, mountpoint: Path, daemon: int, work: Work) -> list[Row]:
    """The mount's rows."""
    pids, size, times = [*cluster.pids(), daemon], work.size, work.times

    def moved(move: Callable[..., Measured]) -> tuple[Measured, float]:
        """The median of some passes over a large file, and the daemon's CPU seconds per GiB in them."""
        for _ in range(WARMING):
            move(mountpoint / "file", size, pids=pids)
        before = process_cpu_seconds(daemon)
        found = [move(mountpoint / "file", size, pids=pids) for _ in range(times)]
        return measure.middle(found), (process_cpu_seconds(daemon) - before) / (times * size / measure.GIB)

    say("writes through the mount")
    written, writing = moved(measure.mount_write)
    say("reads through the mount")
    read, reading = moved(measure.mount_read)
    say("random reads through the mount")
    scattered = [
        measure.mount_random_read(mountpoint / "file", file_bytes=size, operations=2 * work.files, pids=pids)
        for _ in range(times)
    ]
    rows = [
        Row("large reads, mount", read, "passthrough_read", 0.6, daemon_cpu_s_per_gib=reading),
        Row("large writes + fsync, mount", written, "bare_chain", 0.4, daemon_cpu_s_per_gib=writing),
        Row("random 4 KiB reads, direct, mount", measure.middle(scattered), "passthrough_random_read", 0.3),
    ]
    # Jobs with directories of their own beside the same at the peer; in one directory, the rate alone.
    for jobs, shared, floor in ((1, False, 0.05), (8, False, 0.11), (8, True, 700.0)):
        word = "1 job" if jobs == 1 else f"{jobs} jobs in one directory" if shared else f"{jobs} jobs"
        say(f"small files through the mount, {word}")
        home = mountpoint / "small"
        found = []
        for _ in range(times):
            wait_collected(cluster)
            found.append(measure.mount_small_files(home, jobs=jobs, operations=work.files, shared=shared, pids=pids))
        for name, label, peer, least in (
            ("create + write 4 KiB + close", "create_write_close", "create", floor),
            ("stat", "stat", "stat", 0.0),
            ("unlink", "unlink", "unlink", 0.0),
        ):
            against = "" if shared else f"passthrough_{peer}_{jobs}"
            rows.append(Row(f"{name}, mount, {word}", measure.middle(f[label] for f in found), against, least))
    return rows


def measure_ring(cluster: LocalCluster, mountpoint: Path, daemon: int, work: Work) -> list[Row]:
    """Reads through the mount's ring, in turn with the same by the native client."""
    pids = [*cluster.pids(), daemon]
    path, batch, size, operations = mountpoint / "large", 256, work.size, RING_READS_PER_FILE * work.files
    figures: dict[str, list[tuple[Measured, Measured]]] = {"large": [], "small": []}
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        ring_small = functools.partial(
            measure.ring_random_read, path, file_bytes=size, batch=batch, operations=operations, pids=pids
        )
        native_small = functools.partial(
            measure.native_random_read, fs, "/large", file_bytes=size, batch=batch, operations=operations, pids=pids
        )
        pairs = {
            "large": (
                functools.partial(measure.ring_read, path, size, pids=pids),
                functools.partial(measure.native_batch_read, fs, "/large", size, pids=pids),
            ),
            "small": (ring_small, native_small),
        }
        for turn in range(work.times):
            say(f"reads through the ring and by the native client, turn {turn + 1}")
            for kind, (ring, native) in pairs.items():
                # Both find in the servers' caches what a run before them left there.
                native()
                if turn % 2:
                    through_ring, directly = ring(), native()
                else:
                    directly, through_ring = native(), ring()
                figures[kind].append((through_ring, directly))
    middles = {kind: [measure.middle(side) for side in zip(*found, strict=True)] for kind, found in figures.items()}
    return [
        Row("1 MiB reads, 8 in flight, ring", middles["large"][0], "", 0.8, middles["large"][1]),
        Row(f"random 4 KiB reads, batches of {batch}, ring", middles["small"][0], "", 0.6, middles["small"][1]),
    ]


def measure_checkpoints(cluster: LocalCluster, directory: Path, work: Work) -> list[Row]:
    """PyTorch's DCP on fs3, in turn with large I/O and with DCP's own files on the disk; nothing without PyTorch."""
    try:
        import checkpoints
    except ImportError as e:
        say(f"checkpoints are not measured: {e}")
        return []
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        pids = cluster.pids()
        found = checkpoints.figures(fs, directory, work.size, turns=work.times, warming=1, pids=pids, say=say)
    local = "DCP on the local disk"
    return [
        Row("checkpoint save, DCP", found["save"], "", 0.6, found["write"], "large writes"),
        Row("checkpoint load, DCP", found["load"], "", 0.6, found["read"], "large reads"),
        Row("checkpoint save, replicated, beside local", found["save"], "", 0.0, found["local save"], local),
        Row("checkpoint load, replicated, beside local", found["load"], "", 0.0, found["local load"], local),
    ]


def run(directory: Path, work: Work) -> tuple[dict[str, Measured], list[Row]]:
    """All measurements, on a cluster in `directory`; the limits before, between and after."""
    limits: list[dict[str, Measured]] = []

    def measure_limits() -> None:
        say("limits of this machine")
        limits.append(measure.limits(directory, scale=work.scale))

    measure_limits()
    cluster = LocalCluster.create(directory / "cluster", ClusterSpec())
    mountpoint, pid_file = directory / "mnt", directory / "mount.pid"
    mountpoint.mkdir()
    mounted = False
    try:
        cluster.up()
        rows = measure_native(cluster, work)
        rows += measure_data(cluster, work)
        rows += measure_checkpoints(cluster, directory, work)
        measure_limits()
        options = MountOptions(pid_file=str(pid_file), log_file=str(directory / "mount.log"))
        mount(cluster.url, str(mountpoint), token=cluster.token, options=options)
        mounted = True
        daemon = json.loads(pid_file.read_text())["pid"]
        rows += measure_mount(cluster, mountpoint, daemon, work)
        rows += measure_ring(cluster, mountpoint, daemon, work)
    finally:
        if mounted:
            umount(str(mountpoint), pid_file=str(pid_file))
        cluster.down()
    measure_limits()
    found = {name: measure.middle(found[name] for found in limits) for name in limits[0]}
    say("the mount's peer, passthrough_hp of libfuse")
    try:
        found |= passthrough.figures(directory, size_bytes=work.size, files=work.files, times=work.times)
    except passthrough.Unavailable as e:
        say(f"it is not measured: {e}")
    return found, rows


def show(tables: Iterable[list[list[str]]], markdown: bool) -> None:
    """Print tables, each with its header first."""
    for table in tables:
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in table]
        if markdown:
            lines.insert(1, ["-" * w for w in widths])
        for line in lines:
            print("| " + " | ".join(line) + " |" if markdown else "  ".join(line).rstrip())
        print()


def tables_of(limits: dict[str, Measured], rows: list[Row]) -> list[list[list[str]]]:
    """The limits, and fs3 against them."""
    measured = [["limit", "rate", "cost"]]
    for name, m in limits.items():
        cost = f"{m.cpu_s_per_gib:.2f} CPU-s/GiB" if m.bytes else f"p50 {m.p50_us:.0f} µs" if m.p50_us else "-"
        measured.append([name, f"{m.mb_per_s:,.0f} MB/s" if m.bytes else f"{m.per_s:,.0f}/s", cost])
    return [measured, [HEADER, *(r.cells(limits) for r in rows)]]


def _rounded(ratio: float | None) -> float | None:
    return None if ratio is None else round(ratio, 3)


def main() -> int:
    """Exit status 1 when a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the large files")
    parser.add_argument("--files", type=int, default=4000, help="number of small files")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: shorter measurements of the limits")
    parser.add_argument(
        "--times", type=int, default=3, help="how often each thing is measured, of which the median counts"
    )
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--dir", help="where to work")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="fs3-bench-", dir=arguments.dir))
    work = Work(arguments.size_mib * MIB, arguments.files, arguments.times, arguments.scale)
    parts = [arguments.only] if arguments.only else PARTS
    tables: list[list[list[str]]] = []
    record: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {measure.cores()} cores, Linux {platform.release()}",
    }
    missed = False
    try:
        if "files" in parts:
            limits, rows = run(directory, work)
            tables += tables_of(limits, rows)
            record["limits"] = {name: m.record() for name, m in limits.items()}
            record["fs3"] = {r.name: {**r.figure.record(), "ratio": _rounded(r.reached(limits))} for r in rows}
            missed |= any(row.missed(limits) for row in rows)
        if "kv" in parts:
            kv_rows = kvcache.run(directory, work.size // 4, work.times)
            tables.append(kvcache.table(kv_rows))
            record["kv"] = kvcache.record(kv_rows)
            missed |= any(row.missed() for row in kv_rows)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    show(tables, arguments.markdown)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(record, indent=2) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
