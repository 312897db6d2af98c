"""What processes use, and when that is a leak.

The rule: the first half of a run is warm-up. Over the second half a line is fitted to each figure of each
process (least squares); a process leaks when the line rises by more than the slack of that figure, which is a
fixed amount or a part of its mean, whichever is more. Besides no figure may ever pass its limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Final

MIB: Final = 1 << 20


@dataclass(frozen=True)
class Rule:
    """Most that a figure may rise over the second half of a run, and most that it may be."""

    slack: float
    slack_of_mean: float
    limit: float


RULES: Final = {
    "rss": Rule(48 * MIB, 0.1, 2048 * MIB),
    "descriptors": Rule(24, 0.2, 2000),
    "threads": Rule(8, 0.1, 200),
}


@dataclass(frozen=True)
class Sample:
    """Figures of a process at a time. ``at_s``: seconds since the run began; ``rss``: bytes.

    Pages of files do not count: the embedded store is mapped, and what is read of it stays in the page cache, which
    the kernel takes back.
    """

    at_s: float
    rss: float
    descriptors: float
    threads: float


def sample(pid: int, at_s: float) -> Sample:
    """Figures of a running process. Raises OSError when it is gone."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    resident_kib = sum(int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem"))
    return Sample(at_s, resident_kib * 1024, descriptors, int(status["Threads"]))


def rise(samples: Sequence[Sample], figure: str) -> tuple[float, float]:
    """How much the fitted line rises over the second half of the run, and the mean there."""
    middle_s = (samples[0].at_s + samples[-1].at_s) / 2
    late = [s for s in samples if s.at_s >= middle_s]
    values = [getattr(s, figure) for s in late]
    slope = linear_regression([s.at_s for s in late], values).slope
    return slope * (late[-1].at_s - late[0].at_s), fmean(values)


def leaks(name: str, samples: Sequence[Sample]) -> list[str]:
    """What the process uses more and more of, or too much of; a line for each."""
    found = []
    for figure, rule in RULES.items():
        risen, mean = rise(samples, figure)
        most = max(getattr(s, figure) for s in samples)
        if risen > max(rule.slack, rule.slack_of_mean * mean):
            found.append(f"{name}: {figure} rose by {risen:,.0f} over the second half of the run, to {most:,.0f}")
        if most > rule.limit:
            found.append(f"{name}: {figure} reached {most:,.0f}, the limit is {rule.limit:,.0f}")
    return found
