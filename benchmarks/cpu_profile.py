"""Where the CPU time of small files at a mount goes: by service, thread and function. `make profile` runs it.

Three storage services and three replicas, one metadata service, durable; jobs create, write 4 KiB to and close files in
directories of their own. Threads are summed by name. With `--functions` `perf` samples all services meanwhile, which
costs some speed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from fs3.fuse import MountOptions, mount, umount
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.measure import small_files

TICK_US = 10_000
PERF_HZ = 800
PERF_LINES = 25
WARM_FILES = 50
# Less of a thread than this per file is not shown.
SHOWN_US = 5.0


class Used(NamedTuple):
    """What a thread used so far."""

    user_us: float
    system_us: float
    switches: int

    def less(self, other: Used) -> Used:
        """What it used since."""
        return Used(*(a - b for a, b in zip(self, other, strict=True)))

    def plus(self, other: Used) -> Used:
        """The sum."""
        return Used(*(a + b for a, b in zip(self, other, strict=True)))


NOTHING = Used(0, 0, 0)


def threads(pids: Sequence[int]) -> dict[tuple[int, str], tuple[str, Used]]:
    """What each thread of some processes used, with its name, by process and thread id."""
    found = {}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            try:
                stat = (task / "stat").read_text().rpartition(")")[2].split()
                status = (task / "status").read_text().splitlines()
                name = (task / "comm").read_text().strip()
            except OSError:
                continue
            switches = sum(int(line.split()[1]) for line in status if "ctxt_switches" in line)
            found[pid, task.name] = (
                name.rstrip("-0123456789"),
                Used(int(stat[11]) * TICK_US, int(stat[12]) * TICK_US, switches),
            )
    return found


def by_name(
    before: Mapping[tuple[int, str], tuple[str, Used]], after: Mapping[tuple[int, str], tuple[str, Used]]
) -> dict[str, Used]:
    """What was used between two looks, summed by the threads' names."""
    sums: dict[str, Used] = defaultdict(lambda: NOTHING)
    for thread, (name, used) in after.items():
        sums[name] = sums[name].plus(used.less(before.get(thread, (name, NOTHING))[1]))
    return sums


@contextmanager
def sampled(directory: Path, services: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """`perf` samples the services meanwhile; their most expensive functions are printed at the end."""
    recorders = [
        subprocess.Popen(
            ["perf", "record", "-q", "-F", str(PERF_HZ), "-o", directory / service, "-p", ",".join(map(str, pids))],
            stderr=subprocess.DEVNULL,
        )
        for service, pids in services.items()
    ]
    time.sleep(1.0)
    try:
        yield
    finally:
        for recorder in recorders:
            recorder.send_signal(signal.SIGINT)
            recorder.wait()
    for service in services:
        report = ["perf", "report", "-i", directory / service, "--sort", "symbol", "--stdio"]
        done = subprocess.run(report, capture_output=True, text=True, check=True)
        lines = [" ".join(line.split())[:100] for line in done.stdout.splitlines() if "%" in line]
        print(f"\n{service}\n" + "\n".join(lines[:PERF_LINES]), flush=True)


def profile(directory: Path, *, jobs: int, files: int, functions: bool) -> None:
    """Print the figures of one run."""
    cluster = LocalCluster.create(directory / "cluster", ClusterSpec())
    mountpoint, pid_file = directory / "mnt", directory / "mount.pid"
    mountpoint.mkdir()
    with ExitStack() as stack:
        stack.callback(cluster.down)
        cluster.up()
        options = MountOptions(pid_file=str(pid_file), log_file=str(directory / "mount.log"))
        mount(cluster.url, str(mountpoint), token=cluster.token, options=options)
        stack.callback(umount, str(mountpoint), pid_file=str(pid_file))
        services = {
            "metadata": cluster.pids("meta"),
            "storage": cluster.pids("storage"),
            "mount": [json.loads(pid_file.read_text())["pid"]],
        }
        homes = [mountpoint / f"job-{number}" for number in range(jobs)]
        for home in homes:
            home.mkdir()
        pool = stack.enter_context(ProcessPoolExecutor(jobs))
        list(pool.map(small_files, [(str(home), 1, WARM_FILES) for home in homes]))
        groups = {**services, "jobs": list(pool._processes or {})}
        with sampled(directory, services) if functions else ExitStack():
            before = {group: threads(pids) for group, pids in groups.items()}
            began_s = time.perf_counter()
            done = sum(pool.map(small_files, [(str(home), 0, files // jobs) for home in homes]))
            seconds = time.perf_counter() - began_s
            used = {group: by_name(before[group], threads(pids)) for group, pids in groups.items()}
    print(f"{done / seconds:.0f} files/s, {jobs} jobs; CPU-µs (user + system) and context switches per file")
    for group, names in used.items():
        for name, each in sorted(names.items(), key=lambda item: -item[1].user_us - item[1].system_us):
            user_us, system_us = each.user_us / done, each.system_us / done
            if user_us + system_us >= SHOWN_US:
                print(f"{group:9} {name:14} {user_us:5.0f} + {system_us:3.0f} µs {each.switches / done:6.1f}")


def main() -> int:
    """Print the profile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--files", type=int, default=6000)
    parser.add_argument("--functions", action="store_true", help="which functions, by perf")
    arguments = parser.parse_args()
    if arguments.functions and shutil.which("perf") is None:
        parser.error("--functions needs perf: apt-get install linux-perf")
    directory = Path(tempfile.mkdtemp(prefix="fs3-profile-"))
    try:
        profile(directory, jobs=arguments.jobs, files=arguments.files, functions=arguments.functions)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
