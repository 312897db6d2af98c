"""`fs3 trace`: traces of clients."""

from __future__ import annotations

import click

from fs3.tracing import merge_traces


@click.group("trace")
def trace_command() -> None:
    """Traces that programs took with fs3.trace()."""


@trace_command.command("merge")
@click.argument("sources", nargs=-1, required=True, metavar="TRACE...", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="Where to write; .gz compresses.")
def merge_command(sources: tuple[str, ...], output: str) -> None:
    """Put traces of several processes, and of the PyTorch profiler, on one clock in one file."""
    merge_traces(sources, output)
