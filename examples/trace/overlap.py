"""How long two kinds of events of a trace took at the same time."""

from __future__ import annotations

import json
from pathlib import Path

Span = tuple[float, float]


def spans(events: list[dict], name: str) -> list[Span]:
    """(begin, end) of the events of a name in microseconds, those that overlap joined, in order."""
    found: list[Span] = []
    for begin, end in sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["name"] == name):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def common_us(first: list[Span], second: list[Span]) -> float:
    """How long both lists of spans have in common."""
    total, at = 0.0, 0
    for begin, end in first:
        while at < len(second) and second[at][1] <= begin:
            at += 1
        for other_begin, other_end in second[at:]:
            if other_begin >= end:
                break
            total += min(end, other_end) - max(begin, other_begin)
    return total


def overlapped(path: str | Path, name: str, other: str) -> tuple[float, float]:
    """For how many microseconds events of `name` went on, and for how many of these some of `other` did, too."""
    events = json.loads(Path(path).read_text())["traceEvents"]
    mine = spans(events, name)
    return sum(end - begin for begin, end in mine), common_us(mine, spans(events, other))
