"""`fs3 cp`: copies between this machine and a cluster, both ways, several files at a time."""

from __future__ import annotations

import os
import stat as stat_module
from contextlib import ExitStack
from typing import Any

import click

import fs3
from fs3.cli.output import ProgressLine, human_bytes
from fs3.cli.target import RemotePath, cluster_options, is_remote, remote_path
from fs3.client import FileSystem, transfer
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

PATH_COLUMNS = 40


class Bar:
    """A line that tells what has been copied."""

    def __init__(self, quiet: bool) -> None:
        self._line = ProgressLine(quiet)

    def update(self, done: transfer.Progress) -> None:
        """Redraw, not too often."""
        self._line.draw(lambda: f"{self.describe(done)}  {done.path[-PATH_COLUMNS:]}")

    def close(self) -> None:
        """Wipe the line."""
        self._line.close()

    def describe(self, done: transfer.Progress) -> str:
        """Totals and speed so far."""
        seconds = self._line.seconds
        links = f", {done.symlinks} links" if done.symlinks else ""
        return (
            f"{done.files} files{links}, {human_bytes(done.bytes)} in {seconds:.1f} s "
            f"({human_bytes(done.bytes / seconds)}/s)"
        )


class Ends:
    """Local paths and paths on clusters, behind the same questions."""

    def __init__(self, where: dict[str, Any]) -> None:
        self._where = where
        self._stack = ExitStack()
        self._connections: dict[Any, FileSystem] = {}

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def parse(self, text: str) -> tuple[FileSystem | None, str]:
        """The file system (None: this machine) and the path on it."""
        if not is_remote(text):
            return None, text
        remote: RemotePath = remote_path(text, self._where["url"], self._where["cluster"], self._where["token_file"])
        if remote.target not in self._connections:
            connection = fs3.connect(remote.target.url, token=remote.target.token)
            self._connections[remote.target] = self._stack.enter_context(connection)
        return self._connections[remote.target], remote.path


def _is_directory(fs: FileSystem | None, path: str) -> bool:
    return os.path.isdir(path) if fs is None else fs.isdir(path)


def _check_source(fs: FileSystem | None, path: str, recursive: bool) -> None:
    st = os.lstat(path) if fs is None else fs.lstat(path)
    if stat_module.S_ISDIR(st.st_mode) and not recursive:
        raise error(Code.CODE_IS_DIRECTORY, f"{path} is a directory; copy it with -r")


@click.command("cp")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("destination")
@click.option("-r", "-R", "--recursive", is_flag=True, help="Directories and everything below them.")
@click.option("-n", "--no-clobber", is_flag=True, help="Fail when a file exists already.")
@click.option("-j", "--jobs", default=transfer.JOBS, show_default=True, help="Files, or pieces of files, at a time.")
@click.option("--no-preserve", is_flag=True, help="Do not keep permission bits and times.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
@cluster_options
def cp_command(
    sources: tuple[str, ...],
    destination: str,
    recursive: bool,
    no_clobber: bool,
    jobs: int,
    no_preserve: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Copy files or trees to, from or between clusters.

    Paths on a cluster are written :/path (the default cluster) or fs3://host:port/path; others are local. Like cp: into
    DESTINATION if that is a directory, else to that name.
    """
    if not any(map(is_remote, (*sources, destination))):
        raise error(Code.CODE_INVALID_ARGUMENT, "both ends are local; write a path on the cluster as :/path")
    if jobs < 1:
        raise error(Code.CODE_INVALID_ARGUMENT, "--jobs must be at least 1")
    bar = Bar(quiet)
    files = links = size = 0
    with Ends(where) as ends:
        target_fs, target = ends.parse(destination)
        into = _is_directory(target_fs, target)
        if len(sources) > 1 and not into:
            raise error(Code.CODE_NOT_DIRECTORY, f"{destination} is not a directory; several sources need one")
        try:
            for text in sources:
                fs, path = ends.parse(text)
                _check_source(fs, path, recursive)
                goal = os.path.join(target, os.path.basename(path.rstrip("/"))) if into else target
                options: dict[str, Any] = {
                    "jobs": jobs,
                    "preserve": not no_preserve,
                    "overwrite": not no_clobber,
                    "progress": bar.update,
                }
                if fs is None:
                    if target_fs is None:
                        raise error(Code.CODE_INVALID_ARGUMENT, f"{path} and {target} are both local")
                    done = transfer.upload(target_fs, path, goal, **options)
                elif target_fs is None:
                    done = transfer.download(fs, path, goal, **options)
                else:
                    done = transfer.copy(fs, path, target_fs, goal, **options)
                files, links, size = files + done.files, links + done.symlinks, size + done.bytes
        finally:
            bar.close()
    if not quiet:
        click.echo(bar.describe(transfer.Progress(files, 0, links, size, "")), err=True)
