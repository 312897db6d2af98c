"""Seeds until the time is over, each in fresh directories of one mount and one local file system."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fs3.testing.cluster import ClusterSpec, LocalCluster
from tests.cluster.mounts import mounted
from tests.posix.compare import Divergence, Side, drawn, run, shrunk

SEED: Final = int(os.environ.get("FS3_POSIX_SEED", "1"))
OPERATIONS: Final = 120
SPEC: Final = ClusterSpec(
    storage=1, replicas=1, targets_per_disk=2, chunk_bytes=64 << 10, kv_durable=False, read_cache_bytes=16 << 20
)
# What a local file system needs to be compared with.
PROBE: Final = "user.fs3-probe"


@dataclass
class Done:
    """How far a campaign came. ``seed``: the last one."""

    seed: int
    seeds: int = 0
    operations: int = 0


def reason_not_to_run() -> str:
    """Why the local file system cannot serve; empty when it can."""
    with tempfile.TemporaryDirectory(prefix="fs3-posix-") as directory:
        try:
            os.setxattr(directory, PROBE, b"x")
        except OSError as exc:
            return f"{directory} takes no extended attributes: {exc.strerror}"
    return ""


def campaign(
    *, seed: int, seconds: float = float("inf"), seeds: int = 1 << 62, say: Callable[[str], None] = lambda _: None
) -> tuple[Done, Divergence | None]:
    """Run seeds one after the other until one shows a difference, made short, or the time or the seeds are used up."""
    done = Done(seed)
    ends_s = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fs3-posix-") as base:
        os.chmod(base, 0o755)
        local = Path(base, "local")
        local.mkdir()
        cluster = LocalCluster.create(Path(base, "cluster"), SPEC)
        cluster.up()
        try:
            with (
                mounted(cluster, Path(base, "mount"), "allow_other,suid,dev") as mountpoint,
                Side.open("local", local) as one,
                Side.open("fs3  ", mountpoint) as other,
            ):
                for done.seed in range(seed, seed + seeds):
                    found = run((one, other), drawn(done.seed, OPERATIONS))
                    if found is not None:
                        say(f"seed {done.seed} shows a difference; making it short")
                        return done, shrunk((one, other), found)
                    done.seeds += 1
                    done.operations += OPERATIONS
                    say(f"seed {done.seed}: {OPERATIONS} operations agree")
                    if time.monotonic() > ends_s:
                        break
        finally:
            cluster.down()
    return done, None
