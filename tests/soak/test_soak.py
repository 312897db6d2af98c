"""A short run of the soak, and its rule: `make soak` is the long one."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.soak.campaign import soak
from tests.soak.resources import MIB, Sample, leaks

SECONDS = 30.0
SEED = int(os.environ.get("FS3_SOAK_SEED", "1"))


def test_no_process_uses_more_and_more_under_mixed_work(tmp_path: Path) -> None:
    report = soak(tmp_path, seconds=SECONDS, seed=SEED)
    assert report.problems == [], report.table()
    assert min(report.rounds.values()) > 0
    assert len(report.samples) == 6


def series(rss_per_s: float = 0.0, descriptors_per_s: float = 0.0, *, warm_up_mib: float = 300.0) -> list[Sample]:
    """1000 seconds of a process that fills its caches in the first 300, with noise."""
    rng = random.Random(1)
    return [
        Sample(
            float(at_s),
            100 * MIB + warm_up_mib * MIB * min(at_s / 300, 1) + rss_per_s * at_s + rng.uniform(-10, 10) * MIB,
            40 + descriptors_per_s * at_s + rng.randrange(5),
            20,
        )
        for at_s in range(1000)
    ]


def test_a_process_that_grows_is_told_from_one_that_warms_up() -> None:
    assert leaks("steady", series()) == []
    assert [line.split(" over")[0].split(" by")[0] for line in leaks("x", series(0.2 * MIB))] == ["x: rss rose"]
    assert "x: descriptors rose" in leaks("x", series(descriptors_per_s=0.1))[0]
    assert "the limit" in leaks("x", series(warm_up_mib=3000))[0]
