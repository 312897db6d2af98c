"""What storage services say of themselves: disks, repairs, scrubs, resyncs; and `fs3 scrub`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
from google.protobuf.message import Message

from fs3.cli.output import human_bytes, json_option, print_json
from fs3.cli.target import directory_argument
from fs3.core.errors import Fs3Error, error
from fs3.testing.cluster import LocalCluster
from fs3.testing.node_status import ask_storage, engine_statuses
from fs3.v1.frame_pb2 import Code, Method
from fs3.v1.meta_pb2 import MetaStatus
from fs3.v1.routing_pb2 import LocalState, Routing
from fs3.v1.storage_pb2 import EngineStatus, ScrubRequest, ScrubResponse

POLL_S: Final = 0.2


def describe_storage(statuses: Mapping[int, EngineStatus | Fs3Error]) -> list[dict[str, Any]]:
    """Make the machine-readable form."""
    described: list[dict[str, Any]] = []
    for node, status in sorted(statuses.items()):
        if isinstance(status, Fs3Error):
            described.append({"node": node, "error": status.message})
            continue
        described.append(
            {
                "node": node,
                "disks": [
                    {
                        "path": d.path,
                        "capacity_bytes": d.capacity_bytes,
                        "free_bytes": d.free_bytes,
                        "error": d.error or None,
                        "warning": d.warning or None,
                    }
                    for d in status.disks
                ],
                "targets": [_target(t) for t in status.targets],
                "counters": dict(sorted(status.counters.items())),
                "connections": [
                    {
                        "peer": c.peer,
                        "outgoing": c.outgoing,
                        "transport": "rdma" if c.rdma_device else "shared memory" if c.shared_memory else "tcp",
                        "rdma_device": c.rdma_device or None,
                    }
                    for c in status.connections
                ],
                "rdma": {d.name: dict(sorted(d.counters.items())) for d in status.rdma_devices},
            }
        )
    return described


def _target(t: EngineStatus.TargetStatus) -> dict[str, Any]:
    return {
        "target": t.target_id,
        "chain": t.chain_id,
        "local_state": LocalState.Name(t.local_state).removeprefix("LOCAL_STATE_").lower(),  # type: ignore[arg-type]
        "error": t.error or None,
        "chunks": t.chunks,
        "used_bytes": t.used_bytes,
        "repairs_waiting": t.repairs_waiting,
        "damaged_chunks": t.damaged_chunks,
        "damaged": t.damaged or None,
        "scrub": {
            "running": t.scrub_total_chunks > 0,
            "done_chunks": t.scrub_done_chunks,
            "total_chunks": t.scrub_total_chunks,
            "ended_ms": t.scrub_ended_ms or None,
        },
        "resyncs": [
            {
                "to_target": r.to_target_id,
                "done_chunks": r.done_chunks,
                "total_chunks": r.total_chunks,
                "done_bytes": r.done_bytes,
                "total_bytes": r.total_bytes,
                "sent_bytes": r.sent_bytes,
                "bytes_per_s": r.bytes_per_s,
                "stuck_chunks": r.stuck_chunks,
                "eta_s": round((r.total_bytes - r.done_bytes) / r.bytes_per_s, 1) if r.bytes_per_s else None,
            }
            for r in t.resyncs
        ],
    }


def describe_metas(statuses: Mapping[int, MetaStatus | Fs3Error]) -> list[dict[str, Any]]:
    """Make the machine-readable form."""
    described: list[dict[str, Any]] = []
    for node, status in sorted(statuses.items()):
        if isinstance(status, Fs3Error):
            described.append({"node": node, "error": status.message})
        else:
            described.append({"node": node, **counters(status)})
    return described


def counters(message: Message) -> dict[str, Any]:
    """Make the machine-readable form of a message of numbers and of messages of numbers."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {name: counters(value) if isinstance(value, Message) else value for name, value in values.items()}


def meta_lines(metas: list[dict[str, Any]]) -> list[str]:
    """Make the lines for a person: services that are silent, and removed files whose space is not free yet."""
    lines = [f"node {node['node']} does not answer: {node['error']}" for node in metas if "error" in node]
    answered = [node for node in metas if "error" not in node]
    if waiting := max((node["gc_waiting"] for node in answered), default=0):
        oldest_s = max(node["gc_oldest_ms"] for node in answered) / 1000
        refused = sum(node["gc_refused"] for node in answered)
        trouble = f"; storage does not take {refused} of them now" if refused else ""
        lines.append(
            f"{waiting} removed files wait for their space to be freed, the first for {oldest_s:.0f} s{trouble}"
        )
    return lines


def is_sound(storage: list[dict[str, Any]]) -> bool:
    """Tell whether no disk has failed and no chunk is damaged beyond repair."""
    return not any(
        any(d["error"] for d in node.get("disks", ())) or any(t["damaged_chunks"] for t in node.get("targets", ()))
        for node in storage
    )


def storage_lines(storage: list[dict[str, Any]]) -> list[str]:
    """Make the lines for a person: troubles, then connections, resyncs, scrubs and repairs."""
    lines = []
    for node in storage:
        if "error" in node:
            lines.append(f"node {node['node']} does not answer: {node['error']}")
        for disk in node.get("disks", ()):
            if disk["error"]:
                lines.append(f"node {node['node']}, disk {disk['path']} FAILED: {disk['error']}")
            elif disk["warning"]:
                lines.append(f"node {node['node']}, disk {disk['path']}: {disk['warning']}")
        for target in node.get("targets", ()):
            if target["error"]:
                lines.append(f"node {node['node']}, target {target['target']}: {target['error']}")
            if target["damaged"]:
                lines.append(f"node {node['node']}, target {target['target']}: {target['damaged']}")
    lines += [_connections_line(node) for node in storage if node.get("connections")]
    targets = [t for node in storage for t in node.get("targets", ())]
    lines += [_resync_line(t, r) for t in targets for r in t["resyncs"]]
    if targets:
        lines.append(_scrub_line(storage, targets))
    return lines


def _connections_line(node: dict[str, Any]) -> str:
    ways = Counter(f"rdma on {c['rdma_device']}" if c["rdma_device"] else c["transport"] for c in node["connections"])
    return f"node {node['node']}: connections: {', '.join(f'{n} {way}' for way, n in sorted(ways.items()))}"


def _resync_line(target: dict[str, Any], resync: dict[str, Any]) -> str:
    left = "" if resync["eta_s"] is None else f", about {resync['eta_s']:.0f} s left"
    stuck = f", {resync['stuck_chunks']} damaged chunks cannot be copied" if resync["stuck_chunks"] else ""
    return (
        f"chain {target['chain']}: target {resync['to_target']} syncs from {target['target']}: "
        f"{resync['done_chunks']}/{resync['total_chunks']} chunks, "
        f"{human_bytes(resync['done_bytes'])} of {human_bytes(resync['total_bytes'])}, "
        f"{human_bytes(resync['bytes_per_s'])}/s{left}{stuck}"
    )


def _scrub_line(storage: list[dict[str, Any]], targets: list[dict[str, Any]]) -> str:
    def total(name: str) -> int:
        return sum(node.get("counters", {}).get(name, 0) for node in storage)

    ended = [t["scrub"]["ended_ms"] for t in targets if t["scrub"]["ended_ms"]]
    running = [t["scrub"] for t in targets if t["scrub"]["running"]]
    words = [f"scrub: {len(ended)} of {len(targets)} targets checked since the start"]
    if ended:
        words.append(f"the oldest {datetime.fromtimestamp(min(ended) / 1000, UTC):%Y-%m-%d %H:%M} UTC")
    if running:
        done = sum(s["done_chunks"] for s in running) / max(1, sum(s["total_chunks"] for s in running))
        words.append(f"{len(running)} running ({done:.0%})")
    if total("rotten_chunks"):
        words.append(f"{total('rotten_chunks')} rotten chunks found, {total('repaired_chunks')} repaired")
    return ", ".join(words)


@click.command("scrub")
@directory_argument
@click.option("--wait", is_flag=True, help="Return when everything has been read; exit status 1 when it is not sound.")
@click.option("--timeout", "timeout_s", type=float, default=24 * 3600.0, help="Seconds to wait at most.")
@json_option
def scrub_command(directory: str, wait: bool, timeout_s: float, as_json: bool) -> int:
    """Begin to read and check everything stored in the cluster in DIRECTORY now; damaged blocks are repaired."""
    cluster = LocalCluster(Path(directory))
    routing = cluster.routing()
    before = _ended(engine_statuses(cluster, routing))
    answers = ask_storage(cluster, routing, Method.METHOD_STORAGE_SCRUB, ScrubRequest(), ScrubResponse)
    for node, answer in answers.items():
        if isinstance(answer, Fs3Error):
            raise error(answer.code, f"node {node} does not scrub: {answer.message}")
    if not wait:
        targets = sum(a.targets for a in answers.values() if isinstance(a, ScrubResponse))
        if as_json:
            print_json({"targets": targets})
        else:
            click.echo(f"{targets} targets are being checked; see `fs3 status {directory}`")
        return 0
    storage = _wait_scrubbed(cluster, routing, before, timeout_s)
    ok = is_sound(storage)
    if as_json:
        print_json({"sound": ok, "storage": storage})
    else:
        click.echo("\n".join(storage_lines(storage)))
    return 0 if ok else 1


def _ended(statuses: Mapping[int, EngineStatus | Fs3Error]) -> dict[int, int]:
    """End of the last scrub by target, of those that are in use."""
    found = [s for s in statuses.values() if isinstance(s, EngineStatus)]
    usable = (LocalState.LOCAL_STATE_ONLINE, LocalState.LOCAL_STATE_UPTODATE)
    return {t.target_id: t.scrub_ended_ms for s in found for t in s.targets if t.local_state in usable}


def _wait_scrubbed(
    cluster: LocalCluster, routing: Routing, before: Mapping[int, int], timeout_s: float
) -> list[dict[str, Any]]:
    """Return the status once every target of `before` has been scrubbed since and no repair waits. Raises TIMEOUT."""
    ends_s = time.monotonic() + timeout_s
    while True:
        statuses = engine_statuses(cluster, routing)
        storage = describe_storage(statuses)
        now = _ended(statuses)
        left = [target for target, ended_ms in before.items() if target in now and now[target] <= ended_ms]
        waiting = sum(t["repairs_waiting"] for node in storage for t in node.get("targets", ()))
        if not left and not waiting:
            return storage
        if time.monotonic() > ends_s:
            raise error(Code.CODE_TIMEOUT, f"{len(left)} targets are not checked yet; see `fs3 status`")
        time.sleep(POLL_S)
