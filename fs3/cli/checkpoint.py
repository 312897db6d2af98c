"""`fs3 checkpoint`: the checkpoints that fs3.checkpoint saved. Needs no PyTorch."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import click

from fs3.checkpoint import catalog
from fs3.cli.files import connected, format_date, parse_paths
from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.target import cluster_options


@click.group("checkpoint")
def checkpoint_command() -> None:
    """Checkpoints that training jobs saved with fs3.checkpoint."""


@checkpoint_command.command("list")
@click.argument("directory")
@cluster_options
@json_option
def list_command(directory: str, as_json: bool, **where: Any) -> None:
    """List the whole checkpoints in DIRECTORY, the newest last, and those that were not finished."""
    parsed = parse_paths((directory,), where)
    with connected(parsed) as fs:
        whole = catalog.list_checkpoints(fs, parsed[0].path)
        unfinished = catalog.unfinished(fs, parsed[0].path)
    if as_json:
        print_json(
            {
                "checkpoints": [{"path": found.path, **asdict(found.summary)} for found in whole],
                "unfinished": [asdict(found) for found in unfinished],
            }
        )
        return
    rows = [
        [
            found.name,
            format_date(found.summary.created_ns),
            human_bytes(found.summary.length),
            found.summary.items,
            found.summary.files,
        ]
        for found in whole
    ]
    print_table(["NAME", "SAVED", "SIZE", "ITEMS", "FILES"], rows)
    for left in unfinished:
        state = "is being saved" if left.in_use else f"was not finished; see `fs3 checkpoint clean {directory}`"
        click.echo(f"{left.name} {state}", err=True)


@checkpoint_command.command("verify")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@cluster_options
@json_option
def verify_command(paths: tuple[str, ...], as_json: bool, **where: Any) -> int:
    """Read checkpoints again and compare every byte with the checksums that were made of tensor memory.

    Exit status 1 when anything is not as it was saved.
    """
    parsed = parse_paths(paths, where)
    results = []
    with connected(parsed) as fs:
        for remote in parsed:
            with _Counter(remote.path, as_json) as counter:
                results.append(catalog.verify(fs, remote.path, counter.add))
    if as_json:
        print_json([{**asdict(found), "whole": found.whole} for found in results])
    else:
        for found in results:
            click.echo(f"{found.path}: {_verdict(found)}")
            for problem in found.problems:
                click.echo(f"  {problem}")
    return 0 if all(found.whole for found in results) else 1


def _verdict(found: catalog.Verification) -> str:
    read = f"{found.items} items, {human_bytes(found.bytes)}"
    return f"whole ({read})" if found.whole else f"NOT WHOLE, {len(found.problems)} problems ({read} read)"


class _Counter:
    """What has been read, on a terminal."""

    def __init__(self, path: str, quiet: bool) -> None:
        self._path = path
        self._visible = sys.stderr.isatty() and not quiet
        self._bytes = 0

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._visible:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def add(self, count: int) -> None:
        """So much more has been read."""
        self._bytes += count
        if self._visible:
            print(f"\r\x1b[K{self._path}: {human_bytes(self._bytes)}", end="", file=sys.stderr, flush=True)


@checkpoint_command.command("delete")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@cluster_options
def delete_command(paths: tuple[str, ...], **where: Any) -> None:
    """Remove checkpoints, each at once. Refuses what is no checkpoint; who is reading one can go on."""
    parsed = parse_paths(paths, where)
    with connected(parsed) as fs:
        for remote in parsed:
            catalog.delete(fs, remote.path)


@checkpoint_command.command("clean")
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY...")
@cluster_options
def clean_command(directories: tuple[str, ...], **where: Any) -> None:
    """Remove what jobs that were killed while saving have left, and print it.

    What a live job is writing stays. The cluster knows of a killed one after a minute.
    """
    parsed = parse_paths(directories, where)
    with connected(parsed) as fs:
        for remote in parsed:
            for path in catalog.clean(fs, remote.path):
                click.echo(path)
