"""A cluster with two mounts and `fs3-fsx` on them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fs3.testing.cluster import ClusterSpec, LocalCluster
from tests.cluster.mounts import mounted

BINARY: Final = Path(sys.executable).parent / "fs3-fsx"
# Small chunks, so that files have many of them and most operations touch a border.
SPEC: Final = ClusterSpec(
    targets_per_disk=2, chunk_bytes=64 << 10, kv_durable=False, read_cache_bytes=64 << 20, gc_delay_ms=0
)
LENGTH: Final = 512 << 10


@dataclass(frozen=True)
class Trial:
    """What one run of `fs3-fsx` is to do. ``ops``: of all its processes."""

    name: str
    ops: int
    jobs: int = 1
    two_mounts: bool = False
    shared: bool = False

    def argv(self, one: Path, other: Path, seed: int, log: Path) -> list[str]:
        """The command, on a file of the directory `one` that is also in `other`."""
        argv = [str(BINARY), str(one / self.name), "--seed", str(seed), "--ops", str(self.ops // self.jobs)]
        argv += ["--jobs", str(self.jobs), "--length", str(LENGTH), "--log", str(log), "--shrink"]
        argv += ["--second", str(other / self.name)] if self.two_mounts else []
        return argv + (["--shared"] if self.shared else [])


def trials(ops: int) -> list[Trial]:
    """How `ops` operations are divided."""
    return [
        Trial("alone", ops * 6 // 10, jobs=4),
        Trial("two-mounts", ops * 2 // 10, jobs=2, two_mounts=True),
        Trial("shared", ops * 2 // 10, jobs=4, shared=True),
    ]


def fsx(argv: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run it; raises `TimeoutExpired`, after which nothing of it runs."""
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)


@contextmanager
def two_mounts(base: Path) -> Iterator[tuple[Path, Path]]:
    """A cluster in `base`, mounted twice, for the time of the block."""
    cluster = LocalCluster.create(base / "cluster", SPEC)
    cluster.up()
    try:
        with mounted(cluster, base / "a") as one, mounted(cluster, base / "b") as other:
            yield one, other
    finally:
        cluster.down()


def campaign(ops: int, seed: int, say: Callable[[str], None]) -> bool:
    """All trials, one after the other; says whether all agreed."""
    agreed = True
    with (
        tempfile.TemporaryDirectory(prefix="fs3-fsx-", ignore_cleanup_errors=True) as base,
        two_mounts(Path(base)) as (one, other),
    ):
        for number, trial in enumerate(trials(ops)):
            began_s = time.monotonic()
            log = Path(tempfile.gettempdir(), f"fsx-{seed}-{trial.name}.log")
            argv = trial.argv(one, other, seed + 1000 * number, log)
            say(f"{trial.name}: {' '.join(argv)}")
            agreed &= subprocess.run(argv, check=False).returncode == 0
            say(f"{trial.name}: {time.monotonic() - began_s:.0f} s")
    return agreed
