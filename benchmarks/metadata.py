"""Metadata by the number of metadata services, durable and not, and a tree of many files. `make bench-meta` runs it.

Two client processes with 16 operations in flight each, every one at its own service where there are two; one replica,
as files are nearly empty. Lengths are published by 32 clients, each of its own file, then all of one. Clusters of its
own in a temporary directory. `--json FILE` keeps the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fs3
from fs3.client.aio import AsyncFileSystem, connect_async
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.measure import process_cpu_seconds

CLIENTS = 2
IN_FLIGHT = 16
LISTED_FILES = 10_000
TREE_DIRECTORY_FILES = 1000
COLLECT_S_MAX = 3600.0
PUBLISH_S = 4.0
PUBLISHED_BYTES = 4096

# In a client process.
_runner: asyncio.Runner
_fs: AsyncFileSystem


def _connect(url: str, token: str) -> None:
    global _runner, _fs
    _runner = asyncio.Runner()
    _fs = _runner.run(connect_async(url, token=token))


def _step(work: str, directory: str, first: int, count: int) -> None:
    """Do `work` on the files `first` to `first + count` of a directory, IN_FLIGHT at a time."""
    _runner.run(_all(work, iter([f"{directory}/f{i}" for i in range(first, first + count)])))


async def _all(work: str, names: Iterator[str]) -> None:
    call: Callable[[str], Any] = {"create": _create, "stat": _fs.stat, "unlink": _fs.remove}[work]

    async def turn() -> None:
        for name in names:
            await call(name)

    await asyncio.gather(*(turn() for _ in range(IN_FLIGHT)))


def _publish(url: str, token: str, names: list[str], first: int, seconds: float) -> list[float]:
    """As many clients as `names` write to their files and publish the lengths, again and again; seconds of each."""
    return _runner.run(_publishers(url, token, names, first, seconds))


async def _publishers(url: str, token: str, names: list[str], first: int, seconds: float) -> list[float]:
    took_s: list[float] = []
    ends_s = time.perf_counter() + seconds

    async def client(number: int, name: str) -> None:
        async with await connect_async(url, token=token) as fs, await fs.open(name, "r+b") as file:
            at = first + number
            while time.perf_counter() < ends_s:
                await file.pwrite(b"x" * PUBLISHED_BYTES, at * PUBLISHED_BYTES)
                began_s = time.perf_counter()
                await file.publish()
                took_s.append(time.perf_counter() - began_s)
                at += CLIENTS * IN_FLIGHT

    await asyncio.gather(*(client(number, name) for number, name in enumerate(names)))
    return took_s


async def _create(name: str) -> None:
    await (await _fs.open(name, "xb")).close()


class Clients:
    """Client processes; each at a service of its own as far as there are."""

    def __init__(self, cluster: LocalCluster, stack: ExitStack) -> None:
        addresses = cluster.url.removeprefix("fs3://").split(",")
        context = multiprocessing.get_context("spawn")
        self._pools = [
            stack.enter_context(
                ProcessPoolExecutor(
                    1,
                    mp_context=context,
                    initializer=_connect,
                    initargs=(f"fs3://{addresses[i % len(addresses)]}", cluster.token),
                )
            )
            for i in range(CLIENTS)
        ]

    def publish(self, cluster: LocalCluster, names: list[str]) -> list[float]:
        """Each of CLIENTS * IN_FLIGHT clients publishes lengths of its file; seconds of each time."""
        done = [
            pool.submit(_publish, cluster.url, cluster.token, names[first : first + IN_FLIGHT], first, PUBLISH_S)
            for first, pool in zip(range(0, len(names), IN_FLIGHT), self._pools, strict=True)
        ]
        return [seconds for each in done for seconds in each.result()]

    def run(self, work: str, directories: list[str], files: int) -> float:
        """Do `work` on `files` files of each directory, an even share by each client; returns seconds."""
        began_s = time.perf_counter()
        share = files // CLIENTS
        done = [
            pool.submit(_step, work, directory, i * share, share)
            for directory in directories
            for i, pool in enumerate(self._pools)
        ]
        for each in done:
            each.result()
        return time.perf_counter() - began_s


@contextmanager
def running(directory: Path, **spec: Any) -> Iterator[tuple[LocalCluster, Clients, fs3.FileSystem]]:
    """A cluster with clients that have connected."""
    cluster = LocalCluster.create(directory, ClusterSpec(storage=1, replicas=1, **spec))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(cluster.down)
        cluster.up()
        fs = stack.enter_context(fs3.connect(cluster.url, token=cluster.token))
        clients = Clients(cluster, stack)
        fs.mkdir("/warm")
        clients.run("create", ["/warm"], 2000)
        clients.run("unlink", ["/warm"], 2000)
        yield cluster, clients, fs


def list_s(cluster: LocalCluster, directory: str) -> float:
    """Seconds to list a directory with attributes, by a client that knows nothing yet."""
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        began_s = time.perf_counter()
        count = sum(1 for entry in fs.scandir(directory) if entry.stat(follow_symlinks=False).st_ino)
        assert count == LISTED_FILES
        return time.perf_counter() - began_s


def measure_rates(directory: Path, files: int, *, metas: int, durable: bool) -> dict[str, Any]:
    """Creations, stats and removals per second in one directory, each client with half of the names, and more."""
    with running(directory, meta=metas, kv_durable=durable) as (cluster, clients, fs):
        pids = cluster.pids("meta")
        found: dict[str, Any] = {"metas": metas, "durable": durable}
        fs.mkdir("/rates")
        for work in ("create", "stat", "unlink"):
            cpu_s = sum(map(process_cpu_seconds, pids))
            seconds = clients.run(work, ["/rates"], files)
            found[f"{work}_per_s"] = round(files / seconds)
            found[f"{work}_meta_cpu_us"] = round((sum(map(process_cpu_seconds, pids)) - cpu_s) / files * 1e6)
        fs.mkdir("/listed")
        clients.run("create", ["/listed"], LISTED_FILES)
        found["list_ms"] = round(statistics.median(list_s(cluster, "/listed") for _ in range(5)) * 1000)
        fs.mkdir("/published")
        for kind, files in (("own", CLIENTS * IN_FLIGHT), ("shared", 1)):
            names = [f"/published/{kind}{i % files}" for i in range(CLIENTS * IN_FLIGHT)]
            for name in set(names):
                fs.open(name, "xb").close()
            took_s = sorted(clients.publish(cluster, names))
            found[f"publish_{kind}_per_s"] = round(len(took_s) / PUBLISH_S)
            found[f"publish_{kind}_p99_ms"] = round(took_s[len(took_s) * 99 // 100] * 1000, 1)
        return found


def resident_bytes(pids: list[int]) -> int:
    """Memory of processes that is in RAM and their own: without pages of mapped files, as those of the store."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                total += int(line.split()[1]) * 1024
    return total


def measure_tree(directory: Path, files: int) -> dict[str, Any]:
    """A tree of `files` files in directories of TREE_DIRECTORY_FILES: what it takes to make, keep, list and remove."""
    with running(directory) as (cluster, clients, fs):
        metas = cluster.pids("meta")
        before_bytes, began_inodes = resident_bytes(metas), fs.statvfs("/").f_files
        directories = [f"/tree/d{i}" for i in range(files // TREE_DIRECTORY_FILES)]
        for each in directories:
            fs.makedirs(each)
        files = len(directories) * TREE_DIRECTORY_FILES
        found: dict[str, Any] = {"files": files}
        seconds = clients.run("create", directories, TREE_DIRECTORY_FILES)
        found["create_per_s"] = round(files / seconds)
        found["meta_resident_mib"] = [round(before_bytes / 2**20), round(resident_bytes(metas) / 2**20)]
        kv = sum(path.stat().st_blocks * 512 for path in (directory / "kv").rglob("*") if path.is_file())
        found["store_bytes_per_file"] = round(kv / files)
        began_s = time.perf_counter()
        listed = sum(sum(1 for _ in fs.scandir(each)) for each in directories)
        assert listed == files
        found["list_s"] = round(time.perf_counter() - began_s, 2)
        seconds = clients.run("stat", [directories[-1]], TREE_DIRECTORY_FILES)
        found["stat_per_s"] = round(TREE_DIRECTORY_FILES / seconds)
        began_s = time.perf_counter()
        fs.rmtree("/tree")
        found["remove_ms"] = round((time.perf_counter() - began_s) * 1000, 1)
        while fs.statvfs("/").f_files > began_inodes:
            if time.perf_counter() - began_s > COLLECT_S_MAX:
                raise TimeoutError("what was removed has not been collected")
            time.sleep(1)
        found["collected_s"] = round(time.perf_counter() - began_s)
        return found


def main() -> int:
    """Print one line of figures per cluster."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=20_000, help="files of each measurement of rates")
    parser.add_argument("--tree", type=int, default=1_000_000, help="files of the large tree; 0: none")
    parser.add_argument("--dir", help="where to work")
    parser.add_argument("--json", metavar="FILE", help="write the figures here as well")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="fs3-bench-", dir=arguments.dir))
    found: list[dict[str, Any]] = []
    try:
        for durable in (True, False):
            for metas in (1, 2):
                found.append(measure_rates(directory / "rates", arguments.files, metas=metas, durable=durable))
                print(json.dumps(found[-1]), flush=True)
        if arguments.tree:
            found.append(measure_tree(directory / "tree", arguments.tree))
            print(json.dumps(found[-1]), flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
