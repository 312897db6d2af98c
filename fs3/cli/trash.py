"""`fs3 trash`: what was removed and is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from fs3.cli.files import connected, format_date, parse_paths
from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.target import RemotePath, cluster_options
from fs3.client import FileSystem
from fs3.client.trash import TrashEntry
from fs3.core.errors import error
from fs3.core.units import format_seconds, parse_seconds
from fs3.v1.frame_pb2 import Code


@click.group("trash")
def trash_command() -> None:
    """What was removed from directories with trash, until it expires."""


@trash_command.command("on")
@click.argument("paths", nargs=-1, required=True, metavar="DIRECTORY...")
@click.option("--keep", default="7d", show_default=True, metavar="TIME", help="For how long: 90s, 30m, 12h, 7d.")
@cluster_options
def on_command(paths: tuple[str, ...], keep: str, **where: Any) -> None:
    """Keep what is removed from directories; subdirectories made from now on take it over."""
    keep_s = parse_seconds(keep)
    if not keep_s:
        raise error(Code.CODE_INVALID_ARGUMENT, "--keep 0 keeps nothing: use `fs3 trash off`")
    _set(paths, keep_s, where)


@trash_command.command("off")
@click.argument("paths", nargs=-1, required=True, metavar="DIRECTORY...")
@cluster_options
def off_command(paths: tuple[str, ...], **where: Any) -> None:
    """Remove for good what is removed from directories from now on. What is in the trash stays until it expires."""
    _set(paths, 0, where)


def _set(paths: tuple[str, ...], keep_s: float, where: dict[str, Any]) -> None:
    parsed = parse_paths(paths, where)
    with connected(parsed) as fs:
        for remote in parsed:
            fs.trash.set(remote.path, keep_s)


@trash_command.command("get")
@click.argument("paths", nargs=-1, required=True, metavar="DIRECTORY...")
@cluster_options
@json_option
def get_command(paths: tuple[str, ...], as_json: bool, **where: Any) -> None:
    """Show for how long directories keep what is removed from them."""
    parsed = parse_paths(paths, where)
    with connected(parsed) as fs:
        kept = [(remote.path, fs.trash.keep_s(remote.path)) for remote in parsed]
    if as_json:
        print_json([{"path": path, "keep_s": keep_s} for path, keep_s in kept])
    else:
        print_table(["KEEP", "PATH"], [[format_seconds(keep_s) if keep_s else "off", path] for path, keep_s in kept])


@trash_command.command("ls")
@click.argument("path", required=False, metavar="[PATH]")
@cluster_options
@json_option
def ls_command(path: str | None, as_json: bool, **where: Any) -> None:
    """List what can be restored, what expires first first; with PATH what was at or below it."""
    parsed = parse_paths((path or "/",), where)
    with connected(parsed) as fs:
        entries = list(fs.trash.entries(None if path is None else parsed[0].path))
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    rows = [
        [
            format_date(entry.removed_ns),
            format_date(entry.expires_ns),
            "directory" if entry.is_dir else human_bytes(entry.length),
            entry.removed_by,
            _shown(entry),
        ]
        for entry in entries
    ]
    print_table(["REMOVED", "EXPIRES", "SIZE", "BY UID", "PATH"], rows)


def _shown(entry: TrashEntry) -> str:
    return entry.path or f"{entry.id} (its directory is gone, it was {entry.name})"


def _matching(fs: FileSystem, remote: RemotePath) -> list[TrashEntry]:
    """What was at exactly this path, the latest last; an id of `fs3 trash ls --json` serves as well."""
    wanted = remote.path.strip("/")
    return fs.trash.at(remote.path) or [entry for entry in fs.trash.entries() if entry.id == wanted]


@trash_command.command("restore")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--to", metavar="PATH", help="Restore it to this path.")
@cluster_options
def restore_command(paths: tuple[str, ...], to: str | None, **where: Any) -> int:
    """Put back what was removed at PATH, the latest if there are several; an id of `fs3 trash ls --json` is fine, too.

    A directory comes back with what was removed from it before. One that is still there gets back what was removed
    from it. Prints each path that is back.
    """
    if to is not None and len(paths) > 1:
        raise error(Code.CODE_INVALID_ARGUMENT, "--to takes one PATH")
    parsed = parse_paths((*paths, *([] if to is None else [to])), where)
    back = 0
    with connected(parsed) as fs:
        for remote in parsed[: len(paths)]:
            target = None if to is None else parsed[-1].path
            for path in _restored(fs, remote, target):
                back += 1
                click.echo(path)
    return 0 if back else 1


def _restored(fs: FileSystem, remote: RemotePath, to: str | None) -> Iterator[str]:
    matching = _matching(fs, remote)
    if matching and not (matching[-1].is_dir and fs.isdir(remote.path) and to is None):
        yield from fs.trash.restore(matching[-1], to)
    elif to is None and fs.isdir(remote.path):
        yield from fs.trash.restore_into(fs.stat(remote.path).st_ino, remote.path)
    else:
        raise error(Code.CODE_NOT_FOUND, f"the trash holds nothing that was at {remote.path}: see `fs3 trash ls`")


@trash_command.command("purge")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--all", "everything", is_flag=True, help="Everything that you may see.")
@click.option("--older-than", default="0", metavar="TIME", help="Only what was removed longer ago: 12h, 3d.")
@cluster_options
def purge_command(paths: tuple[str, ...], everything: bool, older_than: str, **where: Any) -> None:
    """Remove for good what was at or below PATHs, and give its space back."""
    if bool(paths) == everything:
        raise error(Code.CODE_INVALID_ARGUMENT, "say what to purge: PATHs or --all")
    before_ns = time.time_ns() - int(parse_seconds(older_than) * 1e9)
    parsed = parse_paths(paths or ("/",), where)
    purged = 0
    with connected(parsed) as fs:
        for remote in parsed:
            entries = fs.trash.entries(None if everything else remote.path)
            # Listed first: a page of the listing must not change while it is read.
            purged += fs.trash.purge([entry for entry in entries if entry.removed_ns <= before_ns])
    click.echo(f"purged {purged} {'entry' if purged == 1 else 'entries'}")
