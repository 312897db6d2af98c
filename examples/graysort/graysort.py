"""Sort records of 100 bytes that do not fit in memory at once, as GraySort does, on fs3.

    python graysort.py --dir /mnt/fs3/sort --size 1GiB                                   # through a mount
    python graysort.py --url fs3://127.0.0.1:7000/?token_file=... --dir /sort --size 1GiB   # the native client

Four phases, each by parallel processes: generate records; partition them by ranges of keys, every input file into one
file per range (the layout of smallpond and MapReduce); sort each range; validate as valsort does: the number of
records, the order within and between files, and a checksum over all, which must be that of what was generated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from records import KEY_BYTES, RECORD_BYTES, SORTS, checksum, generate, in_order, records_of, split
from stores import Store, open_store

from fs3.core.units import parse_bytes

CHECKSUM_MASK = (1 << 64) - 1
# Of an input file, and about that of a partition; a process holds one or two of these at a time.
FILE_BYTES = 64 << 20

store: Store
"""Each process has its own."""


@dataclass(frozen=True)
class Job:
    """What every process needs to know."""

    directory: str
    records: int
    files: int
    sort: str
    seed: int

    def input(self, file: int) -> str:
        """An unsorted file."""
        return f"{self.directory}/input/{file:05}"

    def part(self, partition: int, file: int) -> str:
        """The records of one range of keys that come from one input file."""
        return f"{self.directory}/partitions/{partition:05}/{file:05}"

    def output(self, partition: int) -> str:
        """A sorted file; all keys of the next one are greater or equal."""
        return f"{self.directory}/output/{partition:05}"

    def first(self, file: int) -> int:
        """The number of the first record of an input file."""
        return self.records * file // self.files


@dataclass(frozen=True)
class Found:
    """What validation sees of one sorted file."""

    records: int
    checksum: int
    in_order: bool
    first_key: bytes
    last_key: bytes


def connect(url: str | None) -> None:
    """Start of a process."""
    global store
    store = open_store(url)


def warm(_: int) -> None:
    """Import what the work needs, so that it is not measured."""
    import duckdb  # noqa: F401
    import pyarrow.compute  # noqa: F401

    time.sleep(0.05)


def generate_file(job: Job, file: int) -> int:
    """Write one input file; the checksum of its records."""
    first, end = job.first(file), job.first(file + 1)
    records = generate(first, end - first, job.seed)
    store.write(job.input(file), records)
    return checksum(records)


def partition_file(job: Job, file: int) -> None:
    """Spread one input file over the ranges of keys."""
    parts = split(records_of(store.read([job.input(file)])), job.files)
    for number, part in enumerate(parts):
        store.write(job.part(number, file), part)


def sort_partition(job: Job, partition: int) -> None:
    """Sort all records of one range of keys."""
    records = records_of(store.read([job.part(partition, file) for file in range(job.files)]))
    store.write(job.output(partition), SORTS[job.sort](records))


def look_at(job: Job, partition: int) -> Found:
    """Check one sorted file."""
    records = records_of(store.read([job.output(partition)]))
    keys = [bytes(records[at, :KEY_BYTES]) if len(records) else b"" for at in (0, -1)]
    return Found(len(records), checksum(records), in_order(records), *keys)


def faults(job: Job, expected: int, found: Iterable[Found]) -> list[str]:
    """What is wrong with the output."""
    files = list(found)
    wrong = [f"{job.output(number)} is not in order" for number, file in enumerate(files) if not file.in_order]
    filled = [(number, file) for number, file in enumerate(files) if file.records]
    for (_, before), (number, file) in pairwise(filled):
        if file.first_key < before.last_key:
            wrong.append(f"{job.output(number)} begins before the end of the file before it")
    if (count := sum(file.records for file in files)) != job.records:
        wrong.append(f"{count} records came out, {job.records} went in")
    if sum(file.checksum for file in files) & CHECKSUM_MASK != expected:
        wrong.append("the checksum of all records has changed")
    return wrong


def run(job: Job, pool: ProcessPoolExecutor, jobs: int) -> list[str]:
    """All phases; what is wrong with the result."""
    print(f"{job.records:,} records in {job.files} files, {jobs} processes, sorted by {job.sort}")
    total_bytes = job.records * RECORD_BYTES

    def phase(name: str, moved: int, task: Callable[[Job, int], Any]) -> list[Any]:
        """Do a task for every file; `moved`: how often all bytes are read or written in it."""
        began = time.monotonic()
        results = list(pool.map(task, [job] * job.files, range(job.files)))
        seconds = time.monotonic() - began
        print(f"{name:<9} {seconds:7.2f} s {moved * total_bytes / seconds / 1e6:8,.0f} MB/s", flush=True)
        return results

    began = time.monotonic()
    expected = sum(phase("generate", 1, generate_file)) & CHECKSUM_MASK
    began_sort = time.monotonic()
    phase("partition", 2, partition_file)
    phase("sort", 2, sort_partition)
    seconds = time.monotonic() - began_sort
    print(f"{'sorted':<9} {seconds:7.2f} s {total_bytes / seconds / 1e6:8,.0f} MB/s of records")
    wrong = faults(job, expected, phase("validate", 1, look_at))
    print(f"{'all':<9} {time.monotonic() - began:7.2f} s, checksum {expected:016x}")
    return wrong


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True, help="where to work: a new directory, which is removed at the end")
    parser.add_argument("--url", help="of a cluster: use the native client; --dir is a path in the cluster")
    parser.add_argument("--size", default="1GiB", help="of all records (default: %(default)s)")
    parser.add_argument("--files", type=int, help="input files, and ranges of keys (default: one per 64 MiB)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    parser.add_argument("--sort", choices=SORTS, default="arrow", help="who sorts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the records")
    parser.add_argument("--keep", action="store_true", help="keep the files")
    return parser.parse_args(arguments)


def main() -> int:
    """Exit status 1 when the result is wrong."""
    options = parse()
    records = parse_bytes(options.size) // RECORD_BYTES
    files = options.files or max(options.jobs, -(-records * RECORD_BYTES // FILE_BYTES))
    if not records or files < 1 or options.jobs < 1:
        print("graysort: --size must hold a record, --files and --jobs must be at least 1", file=sys.stderr)
        return 2
    job = Job(options.dir.rstrip("/"), records, files, options.sort, options.seed)
    place = open_store(options.url)
    try:
        place.makedirs(job.directory)
    except FileExistsError:
        print(f"graysort: {job.directory} exists; name a directory that does not", file=sys.stderr)
        return 2
    try:
        for name in ("input", "output", *(f"partitions/{number:05}" for number in range(files))):
            place.makedirs(f"{job.directory}/{name}")
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, spawn, connect, (options.url,)) as pool:
            list(pool.map(warm, range(4 * options.jobs)))
            wrong = run(job, pool, options.jobs)
    finally:
        if not options.keep:
            place.rmtree(job.directory)
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    if not wrong:
        print("valid: every record is there, unchanged and in order")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
