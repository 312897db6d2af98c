"""`fs3 data pack|index|verify|info`: record files and other shards of training data. Needs NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from fs3.cli.copy import Ends
from fs3.cli.output import ProgressLine, human_bytes, json_option, print_json, print_table
from fs3.cli.target import cluster_options
from fs3.client import FileSystem
from fs3.core.errors import error
from fs3.core.units import parse_bytes
from fs3.v1.frame_pb2 import Code

JOBS = 4


@click.group("data")
def data_command() -> None:
    """Training data: pack it into record files, look at shards, verify them.

    Paths on a cluster are written :/path (the default cluster) or fs3://host:port/path; others are local. A directory
    stands for all shards in it, and the last name may be a pattern (quote it).
    """
    try:
        import fs3.data  # noqa: F401
    except ImportError as e:
        raise click.ClickException(str(e)) from e


@contextmanager
def _places(texts: tuple[str, ...], where: dict[str, Any]) -> Iterator[tuple[FileSystem | None, list[str]]]:
    """The one file system that paths are on (None: this machine), and the paths there."""
    with Ends(where) as ends:
        parsed = [ends.parse(text) for text in texts]
        if len({id(fs) for fs, _ in parsed}) > 1:
            raise error(Code.CODE_INVALID_ARGUMENT, "the paths must all be local, or all on the same cluster")
        yield parsed[0][0], [path for _, path in parsed]


@data_command.command("pack")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("destination")
@click.option("--shard-size", default="256MiB", show_default=True, help="A shard is closed once it has as much.")
@click.option("--prefix", default="part", show_default=True, help="What the names of shards begin with.")
@click.option("-j", "--jobs", default=JOBS, show_default=True, help="Shards that are written at a time.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@cluster_options
@json_option
def pack_command(
    sources: tuple[str, ...],
    destination: str,
    shard_size: str,
    prefix: str,
    jobs: int,
    quiet: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Pack files into shards of records in the directory DESTINATION.

    SOURCE... are files and directories (every file below is a record), WebDataset tar shards (every sample is one, its
    members the fields) or files of lines (.jsonl: every line is one). Every shard appears whole; after an interruption
    the same command goes on with the shards that are missing.
    """
    from fs3.data.packing import Progress, pack

    line = ProgressLine(quiet or as_json)

    def describe(done: Progress) -> str:
        skipped = f" ({done.skipped} were there)" if done.skipped else ""
        return (
            f"{done.shards} of {done.shards_total} shards{skipped}, {done.records} records, "
            f"{human_bytes(done.bytes)} in {line.seconds:.1f} s ({human_bytes(done.bytes / line.seconds)}/s)"
        )

    with _places(sources, where) as (source_fs, paths), _places((destination,), where) as (fs, (directory,)):
        try:
            done = pack(
                paths,
                directory,
                source_fs=source_fs,
                fs=fs,
                shard_bytes=parse_bytes(shard_size),
                jobs=jobs,
                prefix=prefix,
                progress=lambda done: line.draw(lambda: describe(done)),
            )
        finally:
            line.close()
    if as_json:
        print_json({key: value for key, value in asdict(done).items() if key != "path"})
    elif not quiet:
        click.echo(describe(done), err=True)


@data_command.command("index")
@click.argument("shards", nargs=-1, required=True, metavar="SHARD...")
@click.option("-f", "--force", is_flag=True, help="Also where an index is there that fits.")
@click.option("-j", "--jobs", default=JOBS, show_default=True, help="Shards that are scanned at a time.")
@cluster_options
@json_option
def index_command(shards: tuple[str, ...], force: bool, jobs: int, as_json: bool, **where: Any) -> None:
    """Leave an index beside tar shards (SHARD.tar.fs3i), so that datasets need not scan them."""
    from fs3.data.store import expand, locate
    from fs3.data.tar import TarDataset, index_shards

    line = ProgressLine(as_json)
    with _places(shards, where) as (fs, given):
        store, given = locate(given, fs)
        try:
            paths = expand(store, given, TarDataset.suffixes)
            made = index_shards(
                store,
                paths,
                jobs=jobs,
                force=force,
                progress=lambda n: line.draw(lambda: f"{n} of {len(paths)} shards"),
            )
        finally:
            line.close()
            store.close()
    if as_json:
        print_json({"shards": len(paths), "indexed": sorted(made)})
    else:
        click.echo(f"{len(made)} of {len(paths)} shards indexed; the others were", err=True)


@data_command.command("verify")
@click.argument("shards", nargs=-1, required=True, metavar="SHARD...")
@click.option("-j", "--jobs", default=JOBS, show_default=True, help="Shards that are read at a time.")
@cluster_options
@json_option
def verify_command(shards: tuple[str, ...], jobs: int, as_json: bool, **where: Any) -> int:
    """Read every sample and compare the checksums of records. Exit status 1 when anything is wrong."""
    from fs3.data.check import verify

    line = ProgressLine(as_json)
    with _places(shards, where) as (fs, paths):
        try:
            samples, problems = verify(
                paths, fs=fs, jobs=jobs, progress=lambda n, bad: line.draw(lambda: f"{n} samples, {bad} problems")
            )
        finally:
            line.close()
    if as_json:
        print_json({"samples": samples, "problems": [asdict(problem) for problem in problems]})
    else:
        for problem in problems:
            which = "" if problem.sample is None else f" sample {problem.sample}:"
            click.echo(f"{problem.path}:{which} {problem.message}")
        click.echo(f"{samples} samples read, {len(problems)} problems", err=True)
    return 1 if problems else 0


@data_command.command("info")
@click.argument("shards", nargs=-1, required=True, metavar="SHARD...")
@cluster_options
@json_option
def info_command(shards: tuple[str, ...], as_json: bool, **where: Any) -> None:
    """Say what shards hold: samples, bytes, fields."""
    from fs3.data import open_dataset
    from fs3.data.check import describe

    with _places(shards, where) as (fs, paths), open_dataset(paths, fs=fs) as dataset:
        found = describe(dataset)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            shard["path"],
            shard["samples"],
            human_bytes(shard["bytes"]),
            ",".join(shard["fields"]) or "-",
            "yes" if shard["checksums"] else "no",
        ]
        for shard in found["shards"]
    ]
    print_table(["SHARD", "SAMPLES", "SIZE", "FIELDS", "CHECKSUMS"], rows)
    click.echo(f"{found['kind']}: {found['samples']} samples, {human_bytes(found['bytes'])}", err=True)
