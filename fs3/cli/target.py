"""Which cluster a command speaks to, and how its paths are written.

A path on fs3 is a full URL (``fs3://host:port/dir/file``) or, for the default cluster, ``:/dir/file``. The default
cluster is the first of: ``--url``, ``--cluster DIR``, ``$FS3_URL``, ``$FS3_CLUSTER``, the directory ``./fs3-cluster``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from fs3.core.errors import error
from fs3.testing.cluster import LocalCluster
from fs3.v1.frame_pb2 import Code

DEFAULT_DIRECTORY = "fs3-cluster"

directory_argument = click.argument(
    "directory", default=lambda: os.environ.get("FS3_CLUSTER", DEFAULT_DIRECTORY), type=click.Path(file_okay=False)
)
SCHEME = "fs3://"

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Target:
    """A cluster's URL (without a path) and token."""

    url: str
    token: str | None


@dataclass(frozen=True)
class RemotePath:
    """A path on a cluster."""

    target: Target
    path: str


def cluster_options(command: F) -> F:
    """Add --url, --cluster and --token-file, gathered by :func:`default_target`."""
    for option in (
        click.option("--token-file", type=click.Path(dir_okay=False), help="File with the cluster's token."),
        click.option("--cluster", metavar="DIR", help="Directory of a local cluster made by `fs3 up`."),
        click.option("--url", metavar="URL", help="The cluster: fs3://host:port[,host:port]."),
    ):
        command = option(command)
    return command


def _token(token_file: str | None) -> str | None:
    """The token given by file or environment; None when there is none."""
    path = token_file or os.environ.get("FS3_TOKEN_FILE")
    if path:
        try:
            return Path(path).read_text().strip()
        except OSError as e:
            raise error(Code.CODE_ACCESS, f"the token file {path} cannot be read: {e.strerror}") from e
    return os.environ.get("FS3_TOKEN")


def default_target(url: str | None, cluster: str | None, token_file: str | None) -> Target:
    """The default cluster by the order above. Raises NOT_FOUND saying how to name one."""
    url = url or (None if cluster else os.environ.get("FS3_URL"))
    if url:
        return Target(url, _token(token_file))
    directory = cluster or os.environ.get("FS3_CLUSTER")
    if directory is None:
        if not (Path(DEFAULT_DIRECTORY) / "cluster.toml").exists():
            raise error(
                Code.CODE_NOT_FOUND,
                "which cluster? Give --url fs3://host:port or --cluster DIR (or FS3_URL, FS3_CLUSTER), "
                "or start one here with `fs3 up`",
            )
        directory = DEFAULT_DIRECTORY
    local = LocalCluster(Path(directory))
    return Target(local.url, _token(token_file) or local.token)


def is_remote(path: str) -> bool:
    """Whether a path of `cp` names something on fs3."""
    return path.startswith((":", SCHEME))


def remote_path(text: str, url: str | None, cluster: str | None, token_file: str | None) -> RemotePath:
    """Parse a path on fs3: a URL, ``:/path``, or (where nothing local is meant) a plain ``/path``."""
    if text.startswith(SCHEME):
        hosts, slash, path = text[len(SCHEME) :].partition("/")
        return RemotePath(Target(SCHEME + hosts, _token(token_file)), slash + path or "/")
    path = text.removeprefix(":")
    if not path.startswith("/"):
        path = "/" + path
    return RemotePath(default_target(url, cluster, token_file), path)
