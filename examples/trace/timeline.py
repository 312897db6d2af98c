"""Draw a trace as a picture: threads, calls of fs3, and requests to its services, one under the other.

python timeline.py train.json -o train.svg --from-ms 20 --to-ms 80
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fs3", "font.family": "sans-serif"}

from matplotlib import pyplot  # noqa: E402

# Tracks that are no threads have ids from here on.
FIRST_TRACK = 10_000_000
# What the profiler tells of operators is left out: it is far more than a picture can show.
CATEGORIES = ("user_annotation", "fs3", "fs3.request")
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b79a20", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac", "#79706e")

Event = dict[str, Any]


def rows(events: list[Event]) -> list[tuple[str, list[Event]]]:
    """Rows with their names: threads first, the I/O of each below it, then services."""
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    tracks: dict[tuple[Any, int, bool], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X" and event.get("cat") in CATEGORIES:
            tracks[event["pid"], event["tid"], event["cat"] != "user_annotation"].append(event)
    found: dict[str, list[Event]] = defaultdict(list)
    for (pid, tid, io), some in sorted(tracks.items(), key=lambda item: item[0][1:]):
        name = names.get((pid, tid), f"thread {tid}") + (": I/O" if io and tid < FIRST_TRACK else "")
        # The tracks of what overlaps at one service are drawn over each other.
        found[name.partition(" #")[0]] += outermost(some)
    return list(found.items())


def outermost(events: list[Event]) -> list[Event]:
    """Those that do not lie within another one of the same track."""
    found: list[Event] = []
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if not found or event["ts"] + event["dur"] > found[-1]["ts"] + found[-1]["dur"]:
            found.append(event)
    return found


def draw(trace: Path, picture: Path, from_ms: float, to_ms: float | None) -> None:
    """Draw from `from_ms` to `to_ms`, counted from the first event that is shown."""
    tracks = rows(json.loads(trace.read_text())["traceEvents"])
    began = min(e["ts"] for _, some in tracks for e in some)
    ended = max(e["ts"] + e["dur"] for _, some in tracks for e in some)
    low, high = from_ms, (ended - began) / 1e3 if to_ms is None else to_ms

    def shown(event: Event) -> tuple[float, float] | None:
        begin, end = (event["ts"] - began) / 1e3, (event["ts"] + event["dur"] - began) / 1e3
        return (max(begin, low), min(end, high)) if end > low and begin < high else None

    bars: list[tuple[str, dict[str, list[tuple[float, float]]]]] = []
    for name, events in tracks:
        by_name: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for event in events:
            if span := shown(event):
                by_name[event["name"]].append((span[0], span[1] - span[0]))
        if by_name:
            bars.append((name, by_name))
    # The same colour for the same thing, whatever part of a trace is drawn.
    all_kinds = sorted({event["name"] for _, events in tracks for event in events})
    colour = {kind: COLOURS[number % len(COLOURS)] for number, kind in enumerate(all_kinds)}
    kinds = [kind for kind in all_kinds if any(kind in by_name for _, by_name in bars)]
    figure, axes = pyplot.subplots(figsize=(10, 0.9 + 0.32 * len(bars)), layout="constrained")
    for row, (_, by_name) in enumerate(bars):
        for kind, spans in by_name.items():
            axes.broken_barh(spans, (row - 0.4, 0.8), facecolor=colour[kind], alpha=0.6, linewidth=0)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(low, high)
    axes.set_xlabel("ms", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour[kind]) for kind in kinds]
    figure.legend(handles, kinds, loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(picture, metadata={"Date": None, "Creator": None})


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture, .svg")
    parser.add_argument("--from-ms", type=float, default=0.0, help="where to begin (default: %(default)s)")
    parser.add_argument("--to-ms", type=float, help="where to end (default: the end)")
    options = parser.parse_args()
    draw(options.trace, options.output, options.from_ms, options.to_ms)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
