"""Measurements of fs3 and of the limits it is compared with: what `fs3 bench`, `make bench` and the demo print.

Every figure comes with the CPU seconds it cost, of this process, the services and the mount daemon together. Memory
and files are warmed first, for fs3 and for the limits alike.
"""

from __future__ import annotations

import functools
import mmap
import os
import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import hf3fs_fuse.io as h3
from fs3 import native
from fs3.client import FileSystem
from fs3.testing.process import process_cpu_seconds, process_written_bytes

MIB = 1 << 20
GIB = 1 << 30
SMALL_FILE_BYTES = 4096


@dataclass(frozen=True)
class Measured:
    """What a measurement did in `seconds`, and what it cost. `p50_us` and `p99_us` are 0 where they were not measured.

    `write_amplification`: bytes written to disks per byte and replica, 0 where it was not measured.
    """

    bytes: int
    operations: int
    seconds: float
    cpu_seconds: float
    p50_us: float = 0.0
    write_amplification: float = 0.0
    p99_us: float = 0.0

    @property
    def mb_per_s(self) -> float:
        """Decimal megabytes per second."""
        return self.bytes / 1e6 / self.seconds

    @property
    def per_s(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    @property
    def cpu_s_per_gib(self) -> float:
        """CPU seconds per GiB moved; 0 where no bytes are counted."""
        return self.cpu_seconds / (self.bytes / GIB) if self.bytes else 0.0

    def rate_of(self, limit: Measured) -> float:
        """Part of the rate of `limit`: bytes where both count bytes, else operations."""
        return self.mb_per_s / limit.mb_per_s if self.bytes and limit.bytes else self.per_s / limit.per_s

    def record(self) -> dict[str, float]:
        """For JSON."""
        result = {"seconds": round(self.seconds, 4), "cpu_seconds": round(self.cpu_seconds, 4)}
        if self.bytes:
            result |= {"mb_per_s": round(self.mb_per_s, 1), "cpu_s_per_gib": round(self.cpu_s_per_gib, 3)}
        else:
            result |= {"per_s": round(self.per_s, 1)}
        if self.p50_us:
            result["p50_us"] = round(self.p50_us, 1)
        if self.p99_us:
            result["p99_us"] = round(self.p99_us, 1)
        if self.write_amplification:
            result["write_amplification"] = round(self.write_amplification, 2)
        return result


class Meter:
    """Adds up wall and CPU time of the parts of a task that count: ``with meter: ...``. Not thread-safe."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self.pids = list(pids)
        self.seconds = 0.0
        self.cpu_seconds = 0.0

    def _cpu(self) -> float:
        own = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        total = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
        return total + sum(map(process_cpu_seconds, self.pids))

    def __enter__(self) -> Meter:
        self._start = (time.perf_counter(), self._cpu())
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += self._cpu() - self._start[1]

    def result(self, *, bytes_: int = 0, operations: int = 0, p50_us: float = 0.0, p99_us: float = 0.0) -> Measured:
        """The measurement, with what was done in the counted parts."""
        return Measured(bytes_, operations, self.seconds, self.cpu_seconds, p50_us, p99_us=p99_us)


def middle(found: Iterable[Measured]) -> Measured:
    """The median by rate: a shared machine is slow for seconds now and then."""
    ordered = sorted(found, key=lambda m: m.mb_per_s if m.bytes else m.per_s)
    return ordered[len(ordered) // 2]


# ---- limits of the machine

LIMITS = (
    "memory_copy",
    "checksum",
    "tcp_1_stream",
    "tcp_2_streams",
    "ping_pong",
    "ping_pong_32",
    "disk_write",
    "disk_read",
    "bare_chain",
)


def limits(
    directory: Path,
    *,
    names: Iterable[str] = LIMITS,
    scale: float = 1.0,
    report: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """Measure limits, those of LIMITS unless told; files are made below `directory`. `scale` shortens everything."""
    size = max(64 * MIB, int(scale * GIB))
    calls = max(1000, int(scale * 50_000))
    work: dict[str, Callable[[], tuple[int, int, float, float, float]]] = {
        "memory_copy": lambda: native.bench_memory_copy(4 * size),
        "checksum": lambda: native.bench_checksum(4 * size),
        "tcp_1_stream": lambda: native.bench_tcp_stream(1, 4 * size),
        "tcp_2_streams": lambda: native.bench_tcp_stream(2, 4 * size),
        "ping_pong": lambda: native.bench_tcp_ping_pong(1, calls),
        "ping_pong_32": lambda: native.bench_tcp_ping_pong(32, 10 * calls),
        "disk_write": lambda: native.bench_disk(directory, 4, size, True),
        "disk_read": lambda: native.bench_disk(directory, 4, size, False),
        "bare_chain": lambda: native.bench_bare_chain(directory, 4, 3, size),
    }
    found = {}
    for name in names:
        if report:
            report(name)
        found[name] = Measured(*work[name]())
    return found


# ---- the native client


def _pieces(total: int, piece: int) -> list[int]:
    return list(range(0, total, piece))


def native_write(
    fs: FileSystem, path: str, total_bytes: int, *, piece_bytes: int = 32 * MIB, pids: Iterable[int] = ()
) -> Measured:
    """Write a file of `total_bytes` from one reused buffer, acknowledged by every replica."""
    data = memoryview(bytearray(os.urandom(MIB) * (piece_bytes // MIB)))
    meter = Meter(pids)
    with fs.open(path, "wb", buffering=0) as file, meter:
        for offset in _pieces(total_bytes, piece_bytes):
            file.pwrite(data[: min(piece_bytes, total_bytes - offset)], offset)
    return meter.result(bytes_=total_bytes)


def native_read(
    fs: FileSystem, path: str, total_bytes: int, *, piece_bytes: int = 8 * MIB, pids: Iterable[int] = ()
) -> Measured:
    """Read the first `total_bytes` of a file into one reused buffer."""
    buffer = memoryview(bytearray(piece_bytes))
    meter = Meter(pids)
    with fs.open(path, "rb", buffering=0) as file:
        file.pread_into(buffer, 0)
        with meter:
            for offset in _pieces(total_bytes, piece_bytes):
                file.pread_into(buffer[: min(piece_bytes, total_bytes - offset)], offset)
    return meter.result(bytes_=total_bytes)


def _random_offsets(file_bytes: int, count: int, seed: int) -> list[int]:
    blocks = random.Random(seed).choices(range(file_bytes // SMALL_FILE_BYTES), k=count)
    return [block * SMALL_FILE_BYTES for block in blocks]


def _timed(meter: Meter, calls: Iterable[Callable[[], object]]) -> float:
    """Make all calls within `meter`; the median latency of one in µs."""
    latencies = []
    with meter:
        for call in calls:
            start = time.perf_counter()
            call()
            latencies.append(time.perf_counter() - start)
    return sorted(latencies)[len(latencies) // 2] * 1e6


def native_random_read(
    fs: FileSystem, path: str, *, file_bytes: int, batch: int, operations: int, pids: Iterable[int] = ()
) -> Measured:
    """Read random 4 KiB blocks, `batch` of them per call; p50_us is that of one call."""
    buffers = [memoryview(bytearray(SMALL_FILE_BYTES)) for _ in range(batch)]
    calls = max(1, operations // batch)
    offsets = _random_offsets(file_bytes, calls * batch, seed=7)
    with fs.open(path, "rb", buffering=0) as file:

        def read(call: int) -> None:
            if batch == 1:
                file.pread_into(buffers[0], offsets[call])
            else:
                fs.read_many(zip([file] * batch, offsets[call * batch : (call + 1) * batch], buffers, strict=True))

        for call in range(max(1, calls // 10)):
            read(call)
        meter = Meter(pids)
        p50_us = _timed(meter, (functools.partial(read, call) for call in range(calls)))
    return meter.result(operations=calls * batch, p50_us=p50_us)


def native_batch_read(
    fs: FileSystem, path: str, total_bytes: int, *, piece_bytes: int = MIB, batch: int = 8, pids: Iterable[int] = ()
) -> Measured:
    """Read a file in order, `batch` pieces per call, into one reused buffer for each."""
    buffers = [memoryview(bytearray(piece_bytes)) for _ in range(batch)]
    meter = Meter(pids)
    with fs.open(path, "rb", buffering=0) as file:

        def read(start: int) -> None:
            offsets = range(start, start + batch * piece_bytes, piece_bytes)
            fs.read_many(zip([file] * batch, offsets, buffers, strict=True))

        read(0)
        with meter:
            for start in range(0, total_bytes, batch * piece_bytes):
                read(start)
    return meter.result(bytes_=total_bytes)


def native_random_overwrite(
    fs: FileSystem,
    path: str,
    *,
    file_bytes: int,
    batch: int,
    operations: int,
    replicas: int,
    pids: Iterable[int] = (),
    storage_pids: Sequence[int] = (),
) -> Measured:
    """Overwrite random 4 KiB blocks, `batch` of them per call, and sync at the end; the sync counts.

    With `storage_pids`, write_amplification is what these processes gave the disks to write, per byte and replica.
    """
    data = memoryview(os.urandom(SMALL_FILE_BYTES * batch))
    blocks = [data[i * SMALL_FILE_BYTES :][:SMALL_FILE_BYTES] for i in range(batch)]
    calls = max(1, operations // batch)
    offsets = _random_offsets(file_bytes, calls * batch, seed=8)
    with fs.open(path, "r+b", buffering=0) as file:

        def write(call: int) -> None:
            fs.write_many(zip([file] * batch, offsets[call * batch : (call + 1) * batch], blocks, strict=True))

        write(0)
        file.sync()
        before = sum(map(process_written_bytes, storage_pids))
        meter = Meter(pids)
        p50_us = _timed(meter, (functools.partial(write, call) for call in range(calls)))
        with meter:
            file.sync()
        written = sum(map(process_written_bytes, storage_pids)) - before
    amplification = written / (calls * batch * SMALL_FILE_BYTES * replicas)
    return replace(meter.result(operations=calls * batch, p50_us=p50_us), write_amplification=amplification)


# The figure of `storage` that is compared by its latency.
LATENCY = "random 4 KiB reads, one at a time"
# What the figures of `storage` are compared with.
STORAGE_LIMITS = {
    "large writes": "bare_chain",
    "large reads": "tcp_2_streams",
    LATENCY: "ping_pong",
    "random 4 KiB reads, batches of 256": "ping_pong_32",
}


def storage(
    fs: FileSystem,
    path: str,
    *,
    total_bytes: int,
    operations: int = 100_000,
    replicas: int = 3,
    times: int = 1,
    pids: Iterable[int] = (),
    storage_pids: Sequence[int] = (),
    report: Callable[[str], None] | None = None,
) -> dict[str, Measured]:
    """The storage layer's figures on a new file: large writes and reads, random 4 KiB reads and overwrites.

    `operations`: of the batched reads; the others do a fraction. Data are written and read before it counts.
    `times`: how often each is measured; the median counts.
    """
    pids = list(pids)
    size, batch = total_bytes, 256
    work: dict[str, Callable[[], Measured]] = {
        "large writes": lambda: native_write(fs, path, size, pids=pids),
        "large reads": lambda: native_read(fs, path, size, pids=pids),
        LATENCY: lambda: native_random_read(fs, path, file_bytes=size, batch=1, operations=operations // 10, pids=pids),
        f"random 4 KiB reads, batches of {batch}": lambda: native_random_read(
            fs, path, file_bytes=size, batch=batch, operations=operations, pids=pids
        ),
        f"random 4 KiB overwrites, batches of {batch}": lambda: native_random_overwrite(
            fs,
            path,
            file_bytes=size,
            batch=batch,
            operations=operations // 4,
            replicas=replicas,
            pids=pids,
            storage_pids=storage_pids,
        ),
    }
    for _ in range(2):
        native_write(fs, path, size)
    found = {}
    for name, measure in work.items():
        if report:
            report(name)
        if name == "large reads":
            for _ in range(2):
                measure()
        found[name] = middle(measure() for _ in range(times))
    return found


def native_metadata(
    fs: FileSystem, directory: str, *, operations: int, in_flight: int, pids: Iterable[int] = ()
) -> dict[str, Measured]:
    """Creations, stats and removals of empty files, `in_flight` threads at once."""
    fs.makedirs(directory, exist_ok=True)
    names = [f"{directory}/f{i}" for i in range(operations)]

    def create(name: str) -> None:
        fs.open(name, "xb", buffering=0).close()

    found = {}
    with ThreadPoolExecutor(in_flight) as pool:
        list(pool.map(fs.exists, names[:in_flight]))
        for label, call in (("create", create), ("stat", fs.stat), ("unlink", fs.remove)):
            meter = Meter(pids)
            with meter:
                list(pool.map(call, names))
            found[label] = meter.result(operations=operations)
    return found


# ---- through the mount


def mount_write(path: Path, total_bytes: int, *, pids: Iterable[int] = ()) -> Measured:
    """Write a file by 1 MiB writes, then fsync; the fsync counts."""
    data = os.urandom(MIB)
    meter = Meter(pids)
    with path.open("wb", buffering=0) as file, meter:
        for _ in range(total_bytes // MIB):
            file.write(data)
        os.fsync(file.fileno())
    return meter.result(bytes_=total_bytes)


def mount_read(path: Path, total_bytes: int, *, pids: Iterable[int] = ()) -> Measured:
    """Read a file by 1 MiB reads; the kernel's cached pages of it are dropped first."""
    buffer = memoryview(bytearray(MIB))
    meter = Meter(pids)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with meter:
            remaining = total_bytes
            while remaining and (count := file.readinto(buffer)):
                remaining -= count
    if remaining:
        raise OSError(f"{path} is {remaining} bytes shorter than expected")
    return meter.result(bytes_=total_bytes)


@contextmanager
def _ring(path: Path, batch: int, piece_bytes: int) -> Iterator[Callable[[Sequence[int]], None]]:
    """A function that reads `batch` pieces of a file of a mount at given offsets through its ring."""
    mount = h3.extract_mount_point(str(path))
    if mount is None:
        raise OSError(f"{path} is on no mount")
    memory = SharedMemory(create=True, size=batch * piece_bytes)
    fd = os.open(path, os.O_RDONLY)
    h3.register_fd(fd)
    try:
        iov, ring = h3.make_iovec(memory, mount), h3.make_ioring(mount, batch)
        parts = [iov[n * piece_bytes : (n + 1) * piece_bytes] for n in range(batch)]

        def read(offsets: Sequence[int]) -> None:
            for part, offset in zip(parts, offsets, strict=True):
                ring.prepare(part, True, fd, offset)
            for done in ring.submit().wait(min_results=batch):
                if done.result != piece_bytes:
                    raise OSError(-done.result, f"a read of {path} through the ring failed")

        yield read
        iov.withdraw()
    finally:
        h3.deregister_fd(fd)
        os.close(fd)
        memory.close()
        memory.unlink()


def ring_read(
    path: Path, total_bytes: int, *, piece_bytes: int = MIB, batch: int = 8, pids: Iterable[int] = ()
) -> Measured:
    """As :func:`native_batch_read`, through the ring of a mount."""
    meter = Meter(pids)
    with _ring(path, batch, piece_bytes) as read:
        read(range(0, batch * piece_bytes, piece_bytes))
        with meter:
            for start in range(0, total_bytes, batch * piece_bytes):
                read(range(start, start + batch * piece_bytes, piece_bytes))
    return meter.result(bytes_=total_bytes)


def ring_random_read(path: Path, *, file_bytes: int, batch: int, operations: int, pids: Iterable[int] = ()) -> Measured:
    """As :func:`native_random_read`, through the ring of a mount."""
    calls = max(1, operations // batch)
    offsets = _random_offsets(file_bytes, calls * batch, seed=7)
    with _ring(path, batch, SMALL_FILE_BYTES) as read_batch:

        def read(call: int) -> None:
            read_batch(offsets[call * batch : (call + 1) * batch])

        for call in range(max(1, calls // 10)):
            read(call)
        meter = Meter(pids)
        p50_us = _timed(meter, (functools.partial(read, call) for call in range(calls)))
    return meter.result(operations=calls * batch, p50_us=p50_us)


def mount_random_read(path: Path, *, file_bytes: int, operations: int, pids: Iterable[int] = ()) -> Measured:
    """Read random 4 KiB blocks with O_DIRECT, one at a time."""
    offsets = _random_offsets(file_bytes, operations, seed=9)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    meter = Meter(pids)
    with mmap.mmap(-1, SMALL_FILE_BYTES) as buffer:
        try:

            def read(offset: int) -> None:
                if os.preadv(descriptor, [buffer], offset) != SMALL_FILE_BYTES:
                    raise OSError(f"{path} is shorter than expected")

            for offset in offsets[: operations // 10]:
                read(offset)
            p50_us = _timed(meter, (functools.partial(read, offset) for offset in offsets))
        finally:
            os.close(descriptor)
    return meter.result(operations=operations, p50_us=p50_us)


def small_files(job: tuple[str, int, int]) -> int:
    """In the directory and under the number of a job, create, write and close so many files; returns how many."""
    directory, number, count = job
    data = b"x" * SMALL_FILE_BYTES
    for i in range(count):
        descriptor = os.open(f"{directory}/j{number}-{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(descriptor, data)
        os.close(descriptor)
    return count


def _stats(job: tuple[str, int, int]) -> int:
    directory, number, count = job
    for i in range(count):
        os.stat(f"{directory}/j{number}-{i}")
    return count


def _unlinks(job: tuple[str, int, int]) -> int:
    directory, number, count = job
    for i in range(count):
        os.unlink(f"{directory}/j{number}-{i}")
    return count


def mount_small_files(
    directory: Path, *, jobs: int, operations: int, shared: bool = False, pids: Sequence[int] = ()
) -> dict[str, Measured]:
    """Create + write 4 KiB + close, stat, unlink of `operations` files in all, by `jobs` processes.

    Each job has a directory of its own; with `shared` they all use one, where the kernel lets one create at a time.
    """
    homes = [directory if shared else directory / f"job-{number}" for number in range(jobs)]
    for home in homes:
        home.mkdir(parents=True, exist_ok=True)
    work = [(str(home), number, operations // jobs) for number, home in enumerate(homes)]
    warm = [(str(home), 1000 + number, 1) for number, home in enumerate(homes)]
    found = {}
    with ProcessPoolExecutor(jobs) as pool:
        list(pool.map(small_files, warm))
        children = list(pool._processes or {})
        for label, call in (("create_write_close", small_files), ("stat", _stats), ("unlink", _unlinks)):
            meter = Meter([*pids, *children])
            with meter:
                done = sum(pool.map(call, work))
            found[label] = meter.result(operations=done)
        list(pool.map(_unlinks, warm))
    for home in {*homes} - {directory}:
        home.rmdir()
    directory.rmdir()
    return found


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0))
