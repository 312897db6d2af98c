"""How commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

REDRAW_S = 0.1

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def print_json(value: Any) -> None:
    """One JSON document."""
    click.echo(json.dumps(value, indent=2, sort_keys=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as needed; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(header, *cells, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    click.echo(line(header))
    for row in cells:
        click.echo(line(row))


def human_bytes(count: float) -> str:
    """A size with a binary unit: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} PiB"


class ProgressLine:
    """A line on the terminal that tells how far something is; nothing when standard error is no terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._visible = sys.stderr.isatty() and not quiet
        self._start = time.monotonic()
        self._drawn = 0.0

    @property
    def seconds(self) -> float:
        """Since it began; never 0."""
        return max(time.monotonic() - self._start, 1e-6)

    def draw(self, text: Callable[[], str]) -> None:
        """Redraw, not too often."""
        now = time.monotonic()
        if self._visible and now - self._drawn >= REDRAW_S:
            self._drawn = now
            print(f"\r\x1b[K{text()}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Wipe the line."""
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
