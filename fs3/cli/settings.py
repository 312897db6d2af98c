"""`fs3 admin config`: settings of a cluster that hold without a restart."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import click

from fs3.cli.output import json_option, print_json, print_table
from fs3.cli.target import DEFAULT_DIRECTORY
from fs3.core.errors import error
from fs3.core.settings import SETTINGS
from fs3.rpc.mgmtd_client import MgmtdClient
from fs3.testing.cluster import LocalCluster
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import ChangeSettingsRequest
from fs3.v1.routing_pb2 import Settings

CALL_S = 15.0

cluster_option = click.option(
    "--cluster",
    "directory",
    metavar="DIR",
    default=lambda: os.environ.get("FS3_CLUSTER", DEFAULT_DIRECTORY),
    help="Directory of a cluster made by `fs3 up`.",
)


@click.group("config")
def config_command() -> None:
    """Settings of a cluster that hold without a restart, in every service within a moment."""


@config_command.command("ls")
@cluster_option
@json_option
def ls_command(directory: str, as_json: bool) -> None:
    """Show every setting there is, and what it is set to."""
    found = _change(directory, ChangeSettingsRequest())
    if as_json:
        print_json({"version": found.version, "values": dict(sorted(found.values.items()))})
        return
    rows = [[name, found.values.get(name, "-"), known.help] for name, known in SETTINGS.items()]
    rows += [[name, value, "of another version of fs3"] for name, value in found.values.items() if name not in SETTINGS]
    print_table(["SETTING", "VALUE", "MEANING"], rows)


@config_command.command("set")
@click.argument("assignments", nargs=-1, required=True, metavar="NAME=VALUE...")
@cluster_option
def set_command(assignments: tuple[str, ...], directory: str) -> None:
    """Set settings, all or none."""
    values: dict[str, str] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise error(Code.CODE_INVALID_ARGUMENT, f"write NAME=VALUE, not {assignment!r}")
        values[name] = value
    _say(_change(directory, ChangeSettingsRequest(values=values)))


@config_command.command("unset")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@cluster_option
def unset_command(names: tuple[str, ...], directory: str) -> None:
    """Go back to what the services' own configuration says."""
    _say(_change(directory, ChangeSettingsRequest(unset=names)))


def _say(settings: Settings) -> None:
    click.echo(f"settings version {settings.version}")


def _change(directory: str, request: ChangeSettingsRequest) -> Settings:
    cluster = LocalCluster(Path(directory))

    async def call() -> Any:
        manager = MgmtdClient(cluster.mgmtd_addresses, cluster.token, cluster.cluster_id)
        try:
            return await manager.call("ChangeSettings", request, CALL_S)
        finally:
            await manager.close()

    found: Settings = asyncio.run(call())
    return found
