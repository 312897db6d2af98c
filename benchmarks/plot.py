"""Draw the figures of benchmarks/RESULTS.md, or of `make bench ARGS=--markdown`, as pictures for the documents.

    python benchmarks/plot.py -o docs/pictures

throughput.svg: the first table with the columns work, rate and ratio, each rate beside its limit. kv.svg: the first
table of the KV cache and its peers, if there is one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "fs3", "font.family": "sans-serif", "font.size": 8}

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure as Figure2D  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")
RATE = re.compile(r"([\d,]+)\s*(MB/s|/s)")
RATIO = re.compile(r"([\d.]+) × (.+)")
KV = "KV cache"
KV_CELL = re.compile(r"([\d,]+) MB/s, ([\d,]+) / ([\d,]+) µs")
# What limits are, in words.
LIMITS = {
    "bare_chain": "a chain of disks and sockets without a file system",
    "tcp_2_streams": "two TCP streams",
    "ping_pong": "one TCP ping-pong",
    "ping_pong_32": "32 TCP ping-pongs",
    "passthrough_read": "passthrough_hp of libfuse on the local disk",
    "passthrough_random_read": "passthrough_hp of libfuse on the local disk",
    "native": "the native client",
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


def tables(markdown: str) -> Iterator[tuple[str, list[list[str]]]]:
    """Every table with the heading above it; its rows, the header first."""
    heading, rows = "", list[list[str]]()
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            yield heading, [rows[0], *rows[2:]]
            rows = []
        if line.startswith("#"):
            heading = line.lstrip("# ").partition(";")[0]


def figures(markdown: str) -> tuple[str, list[Figure]]:
    """The rows that are compared with a limit, and the heading above them."""
    for heading, (header, *rows) in tables(markdown):
        if header[:2] != ["work", "rate"] or "ratio" not in header:
            continue
        found = []
        for cells in rows:
            rate, ratio = RATE.match(cells[1]), RATIO.match(cells[header.index("ratio")])
            if rate and ratio:
                value, against = float(rate[1].replace(",", "")), ratio[2].removesuffix(", in turn with it")
                found.append(Figure(cells[0], value, rate[2], value / float(ratio[1]), against))
        return heading, found
    raise SystemExit("there is no table with the columns work, rate and ratio")


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


def draw_throughput(markdown: str, picture: Path) -> None:
    """Large I/O above, small I/O below."""
    heading, rows = figures(markdown)
    large, small = ([row for row in rows if row.unit == unit] for unit in ("MB/s", "/s"))
    figure, both = pyplot.subplots(
        2, 1, figsize=(10, 1.6 + 0.36 * len(rows)), layout="constrained", height_ratios=[len(large), len(small)]
    )
    panel(both[0], large, "MB/s, three replicas on loopback", logarithmic=False)
    panel(both[1], small, "operations per second (logarithmic)", logarithmic=True)
    figure.suptitle(f"fs3 (blue) and the limits of the machine in the same run (grey): {heading}", fontsize=8)
    save(figure, picture)


def draw_kv(markdown: str, picture: Path) -> bool:
    """Median time of a call to the KV cache and to its peers; whether there is such a table."""
    heading, (header, *rows) = next((found for found in tables(markdown) if found[1][0][0] == KV), ("", [[""]]))
    if not rows:
        return False
    stores = [name for name, cell in zip(header, rows[0], strict=True) if KV_CELL.match(cell)]
    figure, axes = pyplot.subplots(figsize=(10, 0.9 + 0.16 * len(rows) * (len(stores) + 1)), layout="constrained")
    for number, store in enumerate(stores):
        for row, cells in enumerate(rows):
            found = KV_CELL.match(cells[header.index(store)])
            if not found:
                continue
            rate, p50, p99 = found.groups()
            place, time_us = row * (len(stores) + 1) + number, float(p50.replace(",", ""))
            axes.barh(place, time_us, color=FS3 if store.startswith("fs3") else LIMIT)
            axes.text(time_us, place, f" {store}: {p50} µs, p99 {p99} µs, {rate} MB/s", va="center", fontsize=7)
    axes.set_yticks([row * (len(stores) + 1) + (len(stores) - 1) / 2 for row in range(len(rows))], [r[0] for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=20 * axes.get_xlim()[1])
    axes.set_xlabel("median time of a call, µs (logarithmic)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"The KV cache and its peers in the same run: {heading}", fontsize=8)
    save(figure, picture)
    return True


def save(figure: Figure2D, picture: Path) -> None:
    """The same bytes each time."""
    figure.savefig(picture, metadata={"Date": None, "Creator": None})


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=RESULTS, help="Markdown (default: RESULTS.md)")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the pictures")
    options = parser.parse_args()
    markdown = options.source.read_text()
    draw_throughput(markdown, options.output / "throughput.svg")
    draw_kv(markdown, options.output / "kv.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
