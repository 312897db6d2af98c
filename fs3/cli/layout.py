"""`fs3 layout`: chunk size and stripe of files, and of what is made in a directory."""

from __future__ import annotations

from typing import Any

import click

from fs3.cli.files import connected, parse_paths
from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.target import cluster_options
from fs3.core.errors import error
from fs3.core.layout import narrowest, widest
from fs3.core.units import parse_bytes
from fs3.v1.frame_pb2 import Code

DEFAULT = "default"


@click.group("layout")
def layout_command() -> None:
    """Chunk size and stripe of files; of directories, what new files in them get."""


@layout_command.command("get")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@cluster_options
@json_option
def get_command(paths: tuple[str, ...], as_json: bool, **where: Any) -> None:
    """Show the layout of files and directories."""
    parsed = parse_paths(paths, where)
    rows: list[dict[str, Any]] = []
    with connected(parsed) as fs:
        for remote in parsed:
            layout = fs.layout(remote.path)
            # 0 stands for the cluster's default.
            rows.append(
                {
                    "path": remote.path,
                    "chunk_bytes": 0 if layout is None else layout.chunk_bytes,
                    "stripe": 0 if layout is None else narrowest(layout),
                    "stripe_max": 0 if layout is None else widest(layout),
                }
            )
    if as_json:
        print_json(rows)
        return
    table = [
        [human_bytes(row["chunk_bytes"]) if row["chunk_bytes"] else DEFAULT, _stripe(row), row["path"]] for row in rows
    ]
    print_table(["CHUNK SIZE", "STRIPE", "PATH"], table)


def _stripe(row: dict[str, Any]) -> str:
    if row["stripe"] == row["stripe_max"]:
        return str(row["stripe"] or DEFAULT)
    return f"{row['stripe']}-{row['stripe_max']}"


@layout_command.command("set")
@click.argument("paths", nargs=-1, required=True, metavar="DIRECTORY...")
@click.option("--chunk-size", metavar="SIZE", help=f"A power of two from 64KiB to 64MiB, or {DEFAULT}.")
@click.option("--stripe", metavar="N", help=f"Chains that a file lies on, or {DEFAULT}.")
@cluster_options
def set_command(paths: tuple[str, ...], chunk_size: str | None, stripe: str | None, **where: Any) -> None:
    """Choose the layout of files made in directories from now on; subdirectories made from now on take it over.

    Files that are there keep theirs; copy them to change it.
    """
    if chunk_size is None and stripe is None:
        raise error(Code.CODE_INVALID_ARGUMENT, "nothing to set: give --chunk-size or --stripe")
    chunk_bytes = None if chunk_size is None else 0 if chunk_size == DEFAULT else parse_bytes(chunk_size)
    parsed = parse_paths(paths, where)
    with connected(parsed) as fs:
        for remote in parsed:
            fs.set_layout(remote.path, chunk_bytes=chunk_bytes, stripe=None if stripe is None else _number(stripe))


def _number(stripe: str) -> int:
    if stripe == DEFAULT:
        return 0
    if not stripe.isascii() or not stripe.isdigit() or not 0 < int(stripe) < 1 << 32:
        raise error(Code.CODE_INVALID_ARGUMENT, f"--stripe is a number of chains or {DEFAULT}, not {stripe!r}")
    return int(stripe)
