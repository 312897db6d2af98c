"""`fs3 mgmtd`, `fs3 meta`, `fs3 storage`: one service in the foreground, from a TOML file or flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from fs3.core.config import LOG_LEVELS, MetaConfig, MgmtdConfig, StorageConfig, load

F = TypeVar("F", bound=Callable[..., Any])

kv_option = click.option("--kv", metavar="URL", help="Key-value store: lmdb:/path, or fdb:/cluster/file.")
mgmtd_option = click.option("--mgmtd", metavar="HOST:PORT", help="Cluster managers, separated by commas.")
frame_port_option = click.option("--frame-port", type=int, help="Port for clients; 0 chooses a free one.")


def service_options(command: F) -> F:
    """Add the options that every service has; a flag wins over the file."""
    for option in (
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any key of the file; repeatable."),
        click.option("--ready-file", metavar="FILE", help="Write pid and ports here once it serves."),
        click.option("--log-level", type=click.Choice(LOG_LEVELS)),
        click.option("--grpc-port", type=int, help="Port for control calls; 0 chooses a free one."),
        click.option("--host", help="Address to listen on and to tell others.  [default: 127.0.0.1]"),
        click.option("--token-file", metavar="FILE", help="File with the cluster's token."),
        click.option("--cluster-id", help="The cluster this service belongs to."),
        click.option("--config", "config_file", metavar="FILE", help="TOML file with the settings."),
    ):
        command = option(command)
    return command


@click.command("mgmtd")
@service_options
@kv_option
@click.option("--replicas", type=int, help="Copies of every chunk.  [default: 3]")
@click.option("--min-storage-nodes", type=int, help="Make chains once so many storage services are there.")
def mgmtd_command(config_file: str | None, settings: tuple[str, ...], **flags: Any) -> int:
    """Run a cluster manager until SIGTERM."""
    from fs3.mgmtd import service

    return service.run(load(MgmtdConfig, config_file, flags, settings))


@click.command("meta")
@service_options
@kv_option
@mgmtd_option
@frame_port_option
def meta_command(config_file: str | None, settings: tuple[str, ...], **flags: Any) -> int:
    """Run a metadata service until SIGTERM."""
    from fs3.meta import service

    return service.run(load(MetaConfig, config_file, flags, settings))


@click.command("storage")
@service_options
@mgmtd_option
@frame_port_option
@click.option("--data-dir", metavar="DIR", help="Directory of the node itself.")
@click.option("--disks", metavar="DIR[,DIR...]", help="One directory per disk.")
def storage_command(config_file: str | None, settings: tuple[str, ...], **flags: Any) -> int:
    """Run a storage service until SIGTERM."""
    from fs3.storage import service

    return service.run(load(StorageConfig, config_file, flags, settings))
