"""`fs3 admin tag`: what an operator says of nodes, for example where they stand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from fs3.cli.output import json_option, print_json, print_table
from fs3.cli.settings import CALL_S, cluster_option
from fs3.core.errors import error
from fs3.rpc.mgmtd_client import MgmtdClient
from fs3.testing.cluster import LocalCluster
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import ChangeTagsRequest
from fs3.v1.routing_pb2 import Node


@click.command("tag")
@click.argument("node", type=int, required=False)
@click.argument("assignments", nargs=-1, metavar="[KEY=VALUE | KEY=]...")
@cluster_option
@json_option
def tag_command(node: int | None, assignments: tuple[str, ...], directory: str, as_json: bool) -> None:
    """Show the tags of all nodes, or set some of a NODE; KEY= removes one.

    With `failure_domain = "rack"` in the managers' configuration, chains that are made from then on have their
    targets in different racks.
    """
    cluster = LocalCluster(Path(directory))
    if node is None:
        _show(list(cluster.routing().nodes), as_json)
        return
    request = ChangeTagsRequest(node_id=node)
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise error(Code.CODE_INVALID_ARGUMENT, f"write KEY=VALUE, not {assignment!r}")
        if value:
            request.values[key] = value
        else:
            request.unset.append(key)
    _show([_change(cluster, request)], as_json)


def _change(cluster: LocalCluster, request: ChangeTagsRequest) -> Node:
    async def call() -> Any:
        manager = MgmtdClient(cluster.mgmtd_addresses, cluster.token, cluster.cluster_id)
        try:
            return await manager.call("ChangeTags", request, CALL_S)
        finally:
            await manager.close()

    found: Node = asyncio.run(call())
    return found


def _show(nodes: list[Node], as_json: bool) -> None:
    if as_json:
        print_json([{"node": n.node_id, "role": n.role, "tags": dict(sorted(n.tags.items()))} for n in nodes])
        return
    rows = [
        [n.node_id, n.role, f"{n.host}:{n.frame_port}", " ".join(f"{k}={v}" for k, v in sorted(n.tags.items()))]
        for n in nodes
    ]
    print_table(["NODE", "ROLE", "ADDRESS", "TAGS"], rows)
