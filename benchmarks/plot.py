"""Draw the figures of benchmarks/RESULTS.md, or of `make bench ARGS=--markdown`, beside their limits.

    python benchmarks/plot.py -o docs/pictures/throughput.svg

The first table with the columns work, rate and ratio is drawn.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fs3", "font.family": "sans-serif", "font.size": 8}

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")
RATE = re.compile(r"([\d,]+)\s*(MB/s|/s)")
RATIO = re.compile(r"([\d.]+) × (.+)")
# What limits are, in words.
LIMITS = {
    "bare_chain": "a chain of disks and sockets without a file system",
    "tcp_2_streams": "two TCP streams",
    "ping_pong": "one TCP ping-pong",
    "ping_pong_32": "32 TCP ping-pongs",
    "passthrough_read": "passthrough_hp of libfuse on the local disk",
    "passthrough_random_read": "passthrough_hp of libfuse on the local disk",
    "native, in turn with it": "the native client",
}
FS3, LIMIT = "#4c78a8", "#d0d0d0"


@dataclass(frozen=True)
class Figure:
    """One row of the table."""

    work: str
    rate: float
    unit: str
    limit: float
    against: str


def figures(markdown: str) -> tuple[str, list[Figure]]:
    """The heading above the table, and the rows that are compared with a limit."""
    heading, found, inside = "", [], False
    for line in markdown.splitlines():
        if line.startswith("#") and not found:
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells[:2] == ["work", "rate"] and "ratio" in cells:
            inside, place = True, cells.index("ratio")
        elif not cells and inside:
            break
        elif inside and (rate := RATE.match(cells[1])) and (ratio := RATIO.match(cells[place])):
            value = float(rate[1].replace(",", ""))
            found.append(Figure(cells[0], value, rate[2], value / float(ratio[1]), ratio[2]))
    if not found:
        raise SystemExit("there is no table with the columns work, rate and ratio")
    return heading, found


def panel(axes: Axes, rows: list[Figure], unit: str, logarithmic: bool) -> None:
    """Bars of fs3 before those of the limits."""
    places = range(len(rows))
    axes.barh(places, [row.limit for row in rows], height=0.78, color=LIMIT)
    axes.barh(places, [row.rate for row in rows], height=0.5, color=FS3)
    for place, row in zip(places, rows, strict=True):
        text = f" {row.rate:,.0f}, {row.rate / row.limit:.2f} × {LIMITS.get(row.against, row.against)}"
        axes.text(max(row.rate, row.limit), place, text, va="center")
    axes.set_yticks(places, [row.work for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(1000, 100 * max(row.limit for row in rows))
    else:
        axes.set_xlim(0, 1.9 * max(row.limit for row in rows))


def draw(markdown: str, picture: Path) -> None:
    """Large I/O above, small I/O below."""
    heading, rows = figures(markdown)
    large, small = ([row for row in rows if row.unit == unit] for unit in ("MB/s", "/s"))
    figure, both = pyplot.subplots(
        2, 1, figsize=(10, 1.6 + 0.36 * len(rows)), layout="constrained", height_ratios=[len(large), len(small)]
    )
    panel(both[0], large, "MB/s, three replicas on loopback", logarithmic=False)
    panel(both[1], small, "operations per second (logarithmic)", logarithmic=True)
    figure.suptitle(
        f"fs3 (blue) and the limits of the machine in the same run (grey): {heading.partition(';')[0]}", fontsize=8
    )
    figure.savefig(picture, metadata={"Date": None, "Creator": None})


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=RESULTS, help="Markdown (default: RESULTS.md)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the picture, .svg")
    options = parser.parse_args()
    draw(options.source.read_text(), options.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
