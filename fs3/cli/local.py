"""`fs3 up`, `fs3 down`, `fs3 status`: a cluster on this machine, in one directory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from fs3.cli.health import counters, describe_metas, describe_storage, is_sound, meta_lines, storage_lines
from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.target import DEFAULT_DIRECTORY, directory_argument
from fs3.core.errors import Fs3Error, error
from fs3.core.units import parse_bytes
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.node_status import engine_statuses, meta_statuses
from fs3.v1.frame_pb2 import Code
from fs3.v1.routing_pb2 import NodeStatus, PublicState, Routing


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command("up")
@directory_argument
@click.option("--storage", type=int, metavar="N", help="Storage services of a new cluster.  [default: 3]")
@click.option("--replicas", type=int, metavar="R", help="Copies of every chunk in a new cluster.  [default: 3]")
@click.option("--meta", type=int, metavar="N", help="Metadata services of a new cluster.  [default: 1]")
@click.option("--managers", type=int, metavar="N", help="Cluster managers of a new cluster.  [default: 1]")
@click.option("--chunk-size", metavar="SIZE", help="Chunk size of a new cluster's files.  [default: 1MiB]")
@click.option("--lease-ms", type=int, help="Silence after which a node counts as failed.  [default: 6000]")
@click.option("--kv", metavar="URL", help="Key-value store of a new cluster, for example fdb:.  [default: lmdb in DIR]")
@click.option("--no-durable-metadata", is_flag=True, help="New cluster: metadata commits do not wait for the disk.")
@json_option
def up_command(
    directory: str,
    storage: int | None,
    replicas: int | None,
    meta: int | None,
    managers: int | None,
    chunk_size: str | None,
    lease_ms: int | None,
    kv: str | None,
    no_durable_metadata: bool,
    as_json: bool,
) -> None:
    """Start a cluster in DIRECTORY (default ./fs3-cluster), making it when there is none.

    Every service is a process of its own; they go on when this command ends. Stop them with `fs3 down`; all data
    stays in DIRECTORY.
    """
    path = Path(directory)
    given: dict[str, Any] = {
        "storage": storage,
        "replicas": replicas,
        "meta": meta,
        "managers": managers,
        "lease_ms": lease_ms,
        "kv": kv,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if lease_ms is not None:
        given["heartbeat_ms"] = max(50, lease_ms // 6)
    if chunk_size is not None:
        given["chunk_bytes"] = parse_bytes(chunk_size)
    if no_durable_metadata:
        given["kv_durable"] = False
    if (path / "cluster.toml").exists():
        cluster = LocalCluster(path)
        changed = [name for name, value in given.items() if getattr(cluster.spec, name) != value]
        if changed:
            raise error(
                Code.CODE_INVALID_ARGUMENT,
                f"the cluster in {path} was made with {changed[0]} = {getattr(cluster.spec, changed[0])}; "
                f"leave the option away or name another directory",
            )
    else:
        if "storage" in given and "replicas" not in given:
            given["replicas"] = min(3, given["storage"])
        cluster = LocalCluster.create(path, ClusterSpec(**given))
    cluster.up(_say)
    if as_json:
        print_json({"url": cluster.url, "directory": str(cluster.directory), "cluster_id": cluster.cluster_id})
        return
    click.echo(f"{cluster.url}  (cluster {cluster.cluster_id} in {cluster.directory})")
    where = "" if directory == DEFAULT_DIRECTORY else f" --cluster {directory}"
    click.echo(f"mount it:  fs3 mount{where} MOUNTPOINT      look at it:  fs3 status {directory}", err=True)


@click.command("down")
@directory_argument
def down_command(directory: str) -> None:
    """Stop the cluster in DIRECTORY. Nothing is lost; `fs3 up` starts it again."""
    LocalCluster(Path(directory)).down(_say)


def _service_rows(cluster: LocalCluster) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for service in cluster.services():
        process, ready = service.process(), service.ready() or {}
        port = ready.get("frame_port") or ready.get("grpc_port")
        rows.append(
            {
                "name": service.name,
                "state": "down" if process is None else "up" if ready else "starting",
                "pid": process.pid if process else None,
                "address": f"{ready['host']}:{port}" if port else None,
            }
        )
    return rows


def _chain_rows(routing: Routing) -> list[dict[str, Any]]:
    return [
        {
            "chain": chain.chain_id,
            "version": chain.version,
            "targets": [
                {"target": t.target_id, "state": PublicState.Name(t.state).removeprefix("PUBLIC_STATE_").lower()}
                for t in chain.targets
            ],
        }
        for chain in routing.chains
    ]


def _describe(cluster: LocalCluster) -> dict[str, Any]:
    result: dict[str, Any] = {
        "directory": str(cluster.directory),
        "cluster_id": cluster.cluster_id,
        "url": cluster.url,
        "services": _service_rows(cluster),
    }
    try:
        routing = cluster.routing(timeout_s=2.0)
        result["primary"] = cluster.primary(timeout_s=2.0)
    except Fs3Error as e:
        result["error"] = e.message
        return result
    result["routing_version"] = routing.version
    result["nodes"] = [
        {
            "node": n.node_id,
            "role": n.role,
            "address": f"{n.host}:{n.frame_port or n.grpc_port}",
            "status": NodeStatus.Name(n.status).removeprefix("NODE_STATUS_").lower(),
        }
        for n in routing.nodes
    ]
    result["chains"] = _chain_rows(routing)
    result["manager"] = _describe_manager(cluster)
    result["storage"] = describe_storage(engine_statuses(cluster, routing))
    result["meta"] = describe_metas(meta_statuses(cluster, routing))
    result["capacity_bytes"] = sum(d.capacity_bytes for d in routing.disks)
    result["used_bytes"] = sum(t.used_bytes for t in routing.targets)
    return result


def _describe_manager(cluster: LocalCluster) -> dict[str, Any]:
    try:
        return counters(cluster.manager_status(timeout_s=2.0))
    except Fs3Error as e:
        return {"error": e.message}


def healthy(described: dict[str, Any]) -> bool:
    """Every service is up, every target of every chain serves, and nothing stored is beyond repair."""
    return (
        "error" not in described
        and all(s["state"] == "up" for s in described["services"])
        and bool(described["chains"])
        and all(t["state"] == "serving" for c in described["chains"] for t in c["targets"])
        and is_sound(described.get("storage", []))
    )


@click.command("status")
@directory_argument
@click.option("--chains", "show_chains", is_flag=True, help="List every chain and its targets.")
@json_option
def status_command(directory: str, show_chains: bool, as_json: bool) -> int:
    """Show services, nodes and chains of the cluster in DIRECTORY. Exit status 1 unless everything serves."""
    cluster = LocalCluster(Path(directory))
    described = _describe(cluster)
    ok = healthy(described)
    if as_json:
        print_json({**described, "healthy": ok})
        return 0 if ok else 1
    click.echo(f"cluster {described['cluster_id']}  {described['url']}")
    # With one manager it goes without saying.
    primary = described.get("primary") if cluster.spec.managers > 1 else None
    print_table(
        ["SERVICE", "STATE", "PID", "ADDRESS", ""],
        [
            [s["name"], s["state"], s["pid"] or "-", s["address"] or "-", "primary" * (s["name"] == primary)]
            for s in described["services"]
        ],
    )
    if "error" in described:
        click.echo(f"no routing: {described['error']}")
        return 1
    states = Counter(t["state"] for c in described["chains"] for t in c["targets"])
    total = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none yet"
    click.echo(f"{len(described['chains'])} chains; targets: {total}; routing version {described['routing_version']}")
    click.echo(f"{human_bytes(described['used_bytes'])} used of {human_bytes(described['capacity_bytes'])} raw")
    if show_chains:
        print_table(
            ["CHAIN", "VERSION", "TARGETS"],
            [
                [c["chain"], c["version"], " ".join(f"{t['target']}:{t['state']}" for t in c["targets"])]
                for c in described["chains"]
            ],
        )
    for line in meta_lines(described["meta"]) + storage_lines(described["storage"]):
        click.echo(line)
    click.echo("healthy" if ok else "NOT fully serving" if is_sound(described["storage"]) else "NOT healthy")
    return 0 if ok else 1
