"""`fs3 kv`: namespaces of the KV cache, and what is in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import click

import fs3.kvcache
from fs3.cli.files import connected
from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.target import RemotePath, cluster_options, remote_path
from fs3.client import FileSystem
from fs3.core.errors import error
from fs3.core.units import format_seconds, parse_bytes, parse_seconds
from fs3.kvcache import Entry, KVCache, Stats
from fs3.v1.frame_pb2 import Code

NO_LIMIT = "none"
LISTED_MAX = 1000

directory_argument = click.argument("directory", metavar="DIR")
key_argument = click.argument("key", metavar="KEY")
hex_option = click.option("--hex", "as_hex", is_flag=True, help="KEY is written in hexadecimal.")
version_option = click.option("--version", default="", metavar="TEXT", help="The version that the keys were put under.")


@click.group("kv")
def kv_command() -> None:
    """Namespaces of the KV cache: directories whose entries are in the memory of storage nodes, or on their disks."""


def _where(directory: str, where: dict[str, Any]) -> RemotePath:
    return remote_path(directory, where["url"], where["cluster"], where["token_file"])


@contextmanager
def _opened(directory: str, where: dict[str, Any], version: str = "") -> Iterator[KVCache]:
    """A namespace that exists."""
    remote = _where(directory, where)
    with connected([remote]) as fs, fs3.kvcache.open(fs, remote.path, create=False, version=version) as cache:
        yield cache


def _key(text: str, as_hex: bool) -> bytes:
    if not as_hex:
        return text.encode()
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise error(
            Code.CODE_INVALID_ARGUMENT, f"{text!r} is not hexadecimal; write two digits for each byte"
        ) from None


def _limit(text: str | None, parse: Any) -> Any:
    """What a setting is given as: 0 stands for no limit."""
    return None if text is None else 0 if text == NO_LIMIT else parse(text)


@kv_command.command("create")
@directory_argument
@click.option("--capacity", metavar="SIZE", help="Bytes of values, for example 100GiB.  [default: the nodes' memory]")
@click.option("--ttl", metavar="TIME", help="When entries expire, for example 12h.  [default: never]")
@click.option("--replicas", type=click.IntRange(1, 16), help="Storage nodes that keep each value.  [default: 1]")
@click.option("--chunk-size", metavar="SIZE", help="The largest piece of a value.  [default: DIR's]")
@click.option("--durable", is_flag=True, help="Keep values on the disks, on all replicas of a chain, not in memory.")
@cluster_options
def create_command(
    directory: str,
    capacity: str | None,
    ttl: str | None,
    replicas: int | None,
    chunk_size: str | None,
    durable: bool,
    **where: Any,
) -> None:
    """Make DIR a namespace, and the directory itself if it is not there.

    Permissions of DIR say who may get and put. One that exists must have the settings that are given.
    """
    remote = _where(directory, where)
    with connected([remote]) as fs:
        cache = fs3.kvcache.open(
            fs,
            remote.path,
            capacity=None if capacity is None else parse_bytes(capacity),
            ttl=None if ttl is None else parse_seconds(ttl),
            replicas=replicas,
            chunk_bytes=None if chunk_size is None else parse_bytes(chunk_size),
            durable=durable,
        )
        cache.close()


@kv_command.command("set")
@directory_argument
@click.option("--capacity", metavar="SIZE", help=f"Bytes of values, or {NO_LIMIT}.")
@click.option("--ttl", metavar="TIME", help=f"When entries expire, or {NO_LIMIT}.")
@cluster_options
def set_command(directory: str, capacity: str | None, ttl: str | None, **where: Any) -> None:
    """Change capacity or time to live of a namespace, for all that use it."""
    if capacity is None and ttl is None:
        raise error(Code.CODE_INVALID_ARGUMENT, "nothing to set: give --capacity or --ttl")
    with _opened(directory, where) as cache:
        cache.configure(capacity=_limit(capacity, parse_bytes), ttl=_limit(ttl, parse_seconds))


@kv_command.command("stat")
@click.argument("directories", nargs=-1, metavar="[DIR]...")
@cluster_options
@json_option
def stat_command(directories: tuple[str, ...], as_json: bool, **where: Any) -> None:
    """Show what namespaces hold and how they did (default: all that this user may read)."""
    parsed = [_where(directory, where) for directory in directories or ("/",)]
    with connected(parsed) as fs:
        paths = [remote.path for remote in parsed] if directories else list(fs3.kvcache.namespaces(fs))
        records = [_record(path, _stats(fs, path)) for path in paths]
    if as_json:
        print_json(records)
        return
    header = [
        "ENTRIES",
        "BYTES",
        "CAPACITY",
        "TTL",
        "REPLICAS",
        "KIND",
        "HITS",
        "MISSES",
        "PUTS",
        "EVICTED",
        "EXPIRED",
        "PATH",
    ]
    print_table(header, [_cells(record) for record in records])
    for record in records:
        if record["nodes_silent"]:
            click.echo(f"fs3: {record['path']}: {record['nodes_silent']} storage nodes do not answer", err=True)


def _stats(fs: FileSystem, path: str) -> Stats:
    with fs3.kvcache.open(fs, path, create=False) as cache:
        return cache.stats()


def _record(path: str, stats: Stats) -> dict[str, Any]:
    """The machine-readable form, without what this command itself did."""
    found = asdict(stats)
    del found["client"]
    return {"path": path, **found, "evicted": stats.evicted}


def _cells(record: dict[str, Any]) -> list[object]:
    return [
        record["entries"],
        human_bytes(record["bytes"]),
        "-" if record["capacity"] is None else human_bytes(record["capacity"]),
        "-" if record["ttl"] is None else format_seconds(record["ttl"]),
        record["replicas"],
        "durable" if record["durable"] else "memory",
        *(record[name] for name in ("hits", "misses", "puts", "evicted", "expired", "path")),
    ]


@kv_command.command("ls")
@directory_argument
@click.option("--prefix", default="", metavar="TEXT", help="Only keys that begin with it.")
@click.option("--limit", default=LISTED_MAX, show_default=True, type=click.IntRange(1), help="No more than these.")
@cluster_options
@json_option
def ls_command(directory: str, prefix: str, limit: int, as_json: bool, **where: Any) -> None:
    """List entries, in no order; with replicas, each replica. What of a key is no text is shown in hexadecimal."""
    with _opened(directory, where) as cache:
        found = list(islice(cache.keys(prefix.encode()), limit + 1))
    shown = [_listed(entry) for entry in found[:limit]]
    if as_json:
        print_json(shown)
    else:
        rows = [[r["bytes"], f"{r['age_s']:.0f}s", f"{r['idle_s']:.0f}s", r["key"]] for r in shown]
        print_table(["BYTES", "AGE", "IDLE", "KEY"], rows)
    if len(found) > limit:
        click.echo(f"fs3: there are more than these {limit}; see --limit and --prefix", err=True)


def _listed(entry: Entry) -> dict[str, Any]:
    text = entry.key.decode(errors="backslashreplace")
    # A key may hold what would move the cursor.
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    ages = {"age_s": round(entry.age_s, 3), "idle_s": round(entry.idle_s, 3)}
    return {"key": shown, "hex": entry.key.hex(), "bytes": entry.bytes, **ages}


@kv_command.command("get")
@directory_argument
@key_argument
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write to this file.  [default: standard output]")
@hex_option
@version_option
@cluster_options
def get_command(directory: str, key: str, output: str | None, as_hex: bool, version: str, **where: Any) -> int:
    """Write the value of KEY to standard output or a file. Exit status 1 when there is none."""
    with _opened(directory, where, version) as cache:
        value = cache.get(_key(key, as_hex))
    if value is None:
        click.echo(f"fs3: {directory} has no value for {key}", err=True)
        return 1
    if output is not None:
        Path(output).write_bytes(value)
    else:
        sys.stdout.buffer.write(value)
    return 0


@kv_command.command("put")
@directory_argument
@key_argument
@click.argument("file", metavar="[FILE]", default="-", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@hex_option
@version_option
@cluster_options
def put_command(directory: str, key: str, file: str, as_hex: bool, version: str, **where: Any) -> int:
    """Put a file, or standard input, as the value of KEY. Exit status 1 when it is not kept."""
    with _opened(directory, where, version) as cache:
        value = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        if cache.put(_key(key, as_hex), value):
            return 0
    click.echo(
        f"fs3: {directory} did not keep the value: a storage node does not answer, or has no room for it", err=True
    )
    return 1


@kv_command.command("evict")
@directory_argument
@click.option("--all", "everything", is_flag=True, help="All entries.")
@click.option("--percent", type=click.FloatRange(0, 100), metavar="N", help="So much of what there is.")
@click.option("--bytes", "size", metavar="SIZE", help="So many bytes, for example 10GiB.")
@click.option("--key", metavar="KEY", help="One entry.")
@hex_option
@version_option
@cluster_options
@json_option
def evict_command(
    directory: str,
    everything: bool,
    percent: float | None,
    size: str | None,
    key: str | None,
    as_hex: bool,
    version: str,
    as_json: bool,
    **where: Any,
) -> int:
    """Forget one entry, or those that were not used for the longest time. Exit status 1 when KEY is not there."""
    if [everything, percent is not None, size is not None, key is not None].count(True) != 1:
        raise error(
            Code.CODE_INVALID_ARGUMENT, "what is to be evicted? Give one of --all, --percent, --bytes and --key"
        )
    with _opened(directory, where, version) as cache:
        if key is not None:
            removed = cache.remove(_key(key, as_hex))
            if not removed:
                click.echo(f"fs3: {directory} has no value for {key}", err=True)
            return 0 if removed else 1
        if size is not None:
            evicted = cache.evict(bytes=parse_bytes(size))
        else:
            evicted = cache.evict(1.0 if percent is None else percent / 100)
    if as_json:
        print_json({"entries": evicted.entries, "bytes": evicted.bytes})
    else:
        click.echo(f"{evicted.entries} entries, {human_bytes(evicted.bytes)}")
    return 0
