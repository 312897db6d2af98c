"""The main job of fs3, end to end, on a real cluster of separate processes. `make demo` runs it.

Starts one cluster manager, one metadata service and three storage services with three-way replication, mounts the
cluster, copies a real tree in, writes a large file natively, reads everything back both ways, kills a storage service
in the middle of a write and of a read, brings it back, restarts everything, and ends with the figures against the
limits of this machine measured in the same run. Exits with status 1 at the first byte that is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import fs3
from fs3.client import FileSystem
from fs3.fuse import MountOptions, mount, umount
from fs3.kv import retry
from fs3.kv.api import Transaction
from fs3.kv.open import open_store
from fs3.testing import measure
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.measure import GIB, MIB, Measured, Meter
from fs3.testing.replicas import compare_settled_replicas

PIECE_BYTES = 32 * MIB
JOBS = 8
DEADLINE_S = 120.0


class Wrong(Exception):
    """The demo saw something that must not be."""


class Progress:
    """One line per step, redrawn while it runs on a terminal."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.tty = sys.stdout.isatty()
        self.text = ""

    @contextmanager
    def step(self, text: str) -> Iterator[Callable[[float, str], None]]:
        """Announce a step; the function it gives redraws the line with a fraction done and a note."""
        self.text, began, note = text, time.monotonic(), ""

        def update(fraction: float, what: str) -> None:
            nonlocal note
            note = what
            if self.tty:
                done = int(20 * min(1.0, fraction))
                print(f"\r\x1b[K  {text:<58} [{'#' * done}{'.' * (20 - done)}] {what}", end="", flush=True)

        if not self.tty:
            print(f"  {text} ...", flush=True)
        update(0.0, "")
        yield update
        seconds = time.monotonic() - began
        start = "\r\x1b[K" if self.tty else ""
        print(f"{start}  {text:<58} done in {seconds:6.1f} s  {note}", flush=True)


def tree_files(root: Path) -> list[Path]:
    """Regular files below `root`, relative, without what was installed beside the standard library."""
    return sorted(
        p.relative_to(root)
        for p in root.rglob("*")
        if p.is_file() and not p.is_symlink() and not {"site-packages", "dist-packages"} & set(p.parts)
    )


def sha256(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_tree(source: Path, files: list[Path], target: Path, update: Callable[[float, str], None]) -> None:
    """Copy `files` with several threads; contents, times and modes."""
    for directory in sorted({target / f.parent for f in files}):
        directory.mkdir(parents=True, exist_ok=True)
    done = 0
    lock = threading.Lock()

    def one(file: Path) -> None:
        nonlocal done
        shutil.copy2(source / file, target / file)
        with lock:
            done += 1
            if done % 50 == 0:
                update(done / len(files), f"{done} of {len(files)} files")

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(one, files))
    update(1.0, f"{len(files)} files")


def way(stats: dict[str, int]) -> str:
    """Name what data came by, unless it was TCP."""
    devices = [name.split(".")[1] for name, count in stats.items() if name.endswith(".peer_write_bytes") and count]
    if stats.get("shared_memory_received_bytes"):
        return " through shared memory"
    return f" by RDMA on {' and '.join(devices)}" if devices else ""


class Demo:
    """The steps, in order, on one cluster."""

    def __init__(self, directory: Path, size: int, kv: str, shared_memory: bool, progress: Progress) -> None:
        self.size = size
        self.progress = progress
        self.mountpoint = directory / "mnt"
        self.pid_file = directory / "mount.pid"
        spec = ClusterSpec(lease_ms=3000, heartbeat_ms=300, kv=kv, shared_memory=shared_memory)
        self.cluster = LocalCluster.create(directory / "cluster", spec)
        self.scratch = directory
        self.stdlib = Path(sysconfig.get_paths()["stdlib"])
        self.tree: dict[Path, str] = {}
        self.figures: dict[str, Measured] = {}
        self.digests: dict[str, str] = {}
        self.daemon_pid = 0

    def pids(self) -> list[int]:
        """Services and the mount daemon."""
        return [*self.cluster.pids(), *([self.daemon_pid] if self.daemon_pid else [])]

    def connect(self) -> FileSystem:
        """A native client."""
        return fs3.connect(self.cluster.url, token=self.cluster.token)

    def mount(self) -> None:
        """Mount the cluster."""
        self.mountpoint.mkdir(exist_ok=True)
        options = MountOptions(log_file=str(self.scratch / "mount.log"), pid_file=str(self.pid_file))
        mount(self.cluster.url, str(self.mountpoint), token=self.cluster.token, options=options)
        self.daemon_pid = json.loads(self.pid_file.read_text())["pid"]

    def unmount(self) -> None:
        """Take the mount away if it is there."""
        if self.daemon_pid:
            umount(str(self.mountpoint), pid_file=str(self.pid_file))
            self.daemon_pid = 0

    def close(self) -> None:
        """End everything."""
        try:
            self.unmount()
        finally:
            self.cluster.down()

    # ---- the steps

    def limits(self) -> dict[str, Measured]:
        """What this machine can do."""
        with self.progress.step("measure the limits of this machine") as update:
            seen = 0

            def report(name: str) -> None:
                nonlocal seen
                seen += 1
                update(seen / len(measure.LIMITS), name)

            found = measure.limits(self.scratch, scale=0.5, report=report)
            update(1.0, "")
            return found

    def start(self) -> None:
        """Start the cluster and mount it."""
        with self.progress.step("start 1 manager, 1 metadata and 3 storage services") as update:
            self.cluster.up(lambda line: update(0.5, line))
        with self.progress.step("mount it"):
            self.mount()

    def copy_in(self) -> None:
        """The standard library of this Python, through the mount."""
        files = tree_files(self.stdlib)
        self.tree = {f: sha256(self.stdlib / f) for f in files}
        total = sum((self.stdlib / f).stat().st_size for f in files)
        with self.progress.step(f"copy {len(files)} files ({total / MIB:.0f} MiB) in through the mount") as update:
            meter = Meter(self.pids())
            with meter:
                copy_tree(self.stdlib, files, self.mountpoint / "stdlib", update)
            self.figures["copy a tree in (mount)"] = meter.result(operations=len(files))

    def write_native(self, name: str, update: Callable[[float, str], None], half: Callable[[], None]) -> str:
        """Write `size` random bytes; call `half` in the middle. Returns their SHA-256."""
        data = memoryview(bytearray(os.urandom(PIECE_BYTES)))
        digest = hashlib.sha256()
        meter = Meter(self.pids())
        with self.connect() as fs, fs.open(name, "wb", buffering=0) as file:
            for offset in range(0, self.size, PIECE_BYTES):
                if offset == self.size // 2 // PIECE_BYTES * PIECE_BYTES:
                    half()
                piece = data[: min(PIECE_BYTES, self.size - offset)]
                piece[:8] = offset.to_bytes(8, "little")
                digest.update(piece)
                with meter:
                    file.pwrite(piece, offset)
                update(offset / self.size, f"{offset // MIB} MiB")
            with meter:
                file.sync()
        update(1.0, f"{self.size / 1e6 / meter.seconds:.0f} MB/s")
        self.figures.setdefault("write (native)", meter.result(bytes_=self.size))
        self.digests[name] = digest.hexdigest()
        return self.digests[name]

    def read_native(self, name: str, update: Callable[[float, str], None], half: Callable[[], None]) -> Measured:
        """Read a file natively and compare its SHA-256; call `half` in the middle."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        digest = hashlib.sha256()
        meter = Meter(self.pids())
        with self.connect() as fs, fs.open(name, "rb", buffering=0) as file:
            for offset in range(0, self.size, PIECE_BYTES):
                if offset == self.size // 2 // PIECE_BYTES * PIECE_BYTES:
                    half()
                piece = buffer[: min(PIECE_BYTES, self.size - offset)]
                with meter:
                    count = file.pread_into(piece, offset)
                if count != len(piece):
                    raise Wrong(f"{name} ends at {offset + count} instead of {self.size}")
                digest.update(piece)
                update(offset / self.size, f"{offset // MIB} MiB")
            by = way(fs.stats())
        if digest.hexdigest() != self.digests[name]:
            raise Wrong(f"{name} read natively differs from what was written")
        update(1.0, f"{self.size / 1e6 / meter.seconds:.0f} MB/s{by}, SHA-256 equal")
        return meter.result(bytes_=self.size)

    def verify_tree(self, label: str) -> None:
        """Read every file of the tree through the mount and compare."""
        with self.progress.step(f"read {len(self.tree)} files back through the mount{label}") as update:
            root = self.mountpoint / "stdlib"
            with ThreadPoolExecutor(JOBS) as pool:
                pairs = zip(self.tree.items(), pool.map(lambda f: sha256(root / f), self.tree), strict=True)
                for done, ((file, expected), actual) in enumerate(pairs):
                    if actual != expected:
                        raise Wrong(f"{file} read through the mount differs")
                    if done % 50 == 0:
                        update(done / len(self.tree), f"{done} of {len(self.tree)}")
            update(1.0, "SHA-256 equal")

    def verify_tree_native(self) -> None:
        """Read every file of the tree natively and compare."""
        with self.progress.step(f"read {len(self.tree)} files back natively") as update, self.connect() as fs:

            def digest(file: Path) -> str:
                with fs.open(f"/stdlib/{file}", "rb") as handle:
                    return hashlib.sha256(handle.read()).hexdigest()

            with ThreadPoolExecutor(JOBS) as pool:
                pairs = zip(self.tree.items(), pool.map(digest, self.tree), strict=True)
                for done, ((file, expected), actual) in enumerate(pairs):
                    if actual != expected:
                        raise Wrong(f"{file} read natively differs")
                    if done % 50 == 0:
                        update(done / len(self.tree), f"{done} of {len(self.tree)}")
            update(1.0, "SHA-256 equal")

    def verify_big_through_mount(self, name: str) -> None:
        """Read a large file through the mount and compare."""
        with self.progress.step(f"read {name} through the mount") as update:
            path = self.mountpoint / name.lstrip("/")
            figure = measure.mount_read(path, self.size, pids=self.pids())
            self.figures.setdefault("read (mount)", figure)
            update(0.5, "comparing")
            if sha256(path) != self.digests[name]:
                raise Wrong(f"{name} read through the mount differs from what was written")
            update(1.0, f"{figure.mb_per_s:.0f} MB/s, SHA-256 equal")

    def large_file(self) -> None:
        """Write a large file natively, read it back both ways; and write one through the mount."""
        size = f"{self.size / GIB:g} GiB"
        with self.progress.step(f"write {size} with the native client, three replicas") as update:
            self.write_native("/large", update, lambda: None)
        for label in ("first read", "read"):
            with self.progress.step(f"read {size} with the native client ({label})") as update:
                self.figures[f"{label} (native)"] = self.read_native("/large", update, lambda: None)
        self.verify_big_through_mount("/large")
        with self.progress.step(f"write {size} twice through the mount, fsync") as update:
            # The first pass touches memory and blocks for the first time; the second one counts.
            measure.mount_write(self.mountpoint / "mounted", self.size)
            update(0.5, "once more, warm")
            figure = measure.mount_write(self.mountpoint / "mounted", self.size, pids=self.pids())
            self.figures["write (mount)"] = figure
            (self.mountpoint / "mounted").unlink()
            update(1.0, f"{figure.mb_per_s:.0f} MB/s")

    def failures(self) -> None:
        """Kill a storage service in the middle of a write and of a read; bring it back; compare the replicas."""
        victim = "storage-2"
        with self.progress.step(f"write a file while {victim} is killed with -9 in the middle") as update:
            self.write_native("/written-during-kill", update, lambda: self.cluster.kill(victim))
        with self.progress.step("read it back") as update:
            self.read_native("/written-during-kill", update, lambda: None)
        with self.progress.step(f"restart {victim}, wait until every chain serves fully") as update:
            self.cluster.start(victim)
            self.cluster.wait_serving(timeout_s=DEADLINE_S, report=lambda line: update(1.0, line))
        with self.progress.step("read a file while storage-3 is killed with -9 in the middle") as update:
            self.read_native("/large", update, lambda: self.cluster.kill("storage-3"))
        with self.progress.step("restart storage-3, wait until every chain serves fully") as update:
            self.cluster.start("storage-3")
            self.cluster.wait_serving(timeout_s=DEADLINE_S, report=lambda line: update(1.0, line))
        self.replicas_equal()

    def replicas_equal(self) -> None:
        """Compare what every replica holds, chunk by chunk."""
        with self.progress.step("compare all replicas") as update, self.connect() as fs:
            report = compare_settled_replicas(fs)
            if report.differences:
                raise Wrong(f"replicas differ: {report.differences[0]} and {len(report.differences) - 1} more")
            update(1.0, f"{report.chunks} chunks, {report.replicas} replicas of each, all equal")

    def restart(self) -> None:
        """Stop everything, start it again, read again."""
        with self.progress.step("stop the whole cluster, start it again, mount it again") as update:
            self.unmount()
            self.cluster.down(lambda line: update(0.3, line))
            self.cluster.up(lambda line: update(0.8, line))
            self.mount()
            update(1.0, "")
        self.verify_tree(" again")
        for name in sorted(self.digests):
            with self.progress.step(f"read {name} natively again") as update:
                self.read_native(name, update, lambda: None)


def table(figures: dict[str, Measured], limits: dict[str, Measured]) -> list[str]:
    """The figures against the limits, as lines."""
    tcp, chain = limits["tcp_2_streams"], limits["bare_chain"]
    against = {
        "write (native)": (chain, "bare chain"),
        "write (mount)": (chain, "bare chain"),
        "first read (native)": (tcp, "TCP, 2 streams"),
        "read (native)": (tcp, "TCP, 2 streams"),
        "read (mount)": (tcp, "TCP, 2 streams"),
    }
    lines = [f"  {'':<26}{'rate':>14}{'CPU-s/GiB':>12}   against"]
    for name, figure in figures.items():
        if not figure.bytes:
            lines.append(f"  {name:<26}{figure.per_s:>8,.0f} files/s")
            continue
        limit, label = against[name]
        ratio = figure.mb_per_s / limit.mb_per_s
        lines.append(
            f"  {name:<26}{figure.mb_per_s:>9,.0f} MB/s{figure.cpu_s_per_gib:>12.2f}   "
            f"{ratio:.2f} x {label} ({limit.mb_per_s:,.0f} MB/s, {limit.cpu_s_per_gib:.2f} CPU-s/GiB)"
        )
    return lines


async def first_row(kv: str) -> list[tuple[bytes, bytes]]:
    """One record of a key-value store, or none. Raises KvError."""
    store = open_store(kv)
    try:
        return await retry.run(store, lambda txn: txn.get_range(b"", b"\xff", limit=1))
    finally:
        await store.close()


async def erase(kv: str) -> None:
    """Remove everything from a key-value store, which was empty when the demo began."""

    async def clear(txn: Transaction) -> None:
        txn.clear_range(b"", b"\xff")

    store = open_store(kv)
    try:
        await retry.run(store, clear, idempotent=True)
    finally:
        await store.close()


def main() -> int:
    """Run all steps in a temporary directory that is removed afterwards."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=1024, help="size of the large files")
    parser.add_argument("--dir", help="where to work; needs about 12 x the size")
    parser.add_argument("--kv", default="", metavar="URL", help="an empty key-value store, emptied again at the end")
    parser.add_argument(
        "--no-shared-memory", action="store_true", help="move data by TCP or RDMA within the machine too"
    )
    arguments = parser.parse_args()
    if arguments.kv and asyncio.run(first_row(arguments.kv)):
        print(f"the demo needs an empty key-value store, and {arguments.kv} holds data", file=sys.stderr)
        return 1
    progress = Progress()
    directory = Path(tempfile.mkdtemp(prefix="fs3-demo-", dir=arguments.dir))
    demo = Demo(directory, arguments.size_mib * MIB, arguments.kv, not arguments.no_shared_memory, progress)
    try:
        limits = demo.limits()
        demo.start()
        demo.copy_in()
        demo.verify_tree("")
        demo.verify_tree_native()
        demo.large_file()
        demo.failures()
        demo.restart()
    except (Wrong, OSError, TimeoutError) as e:
        print(f"\nfs3 demo failed: {e}", file=sys.stderr)
        demo.cluster.print_logs(sys.stderr)
        return 1
    finally:
        demo.close()
        if arguments.kv:
            asyncio.run(erase(arguments.kv))
        shutil.rmtree(directory, ignore_errors=True)
    print("\n".join(["", *table(demo.figures, limits), ""]))
    print(f"  every byte was right; nothing is left running or mounted ({time.monotonic() - progress.start:.0f} s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
