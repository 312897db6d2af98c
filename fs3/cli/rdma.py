"""`fs3 rdma`: what this machine has for RDMA, and how fast it is."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Final

import click

from fs3.cli.output import human_bytes, json_option, print_json
from fs3.core.config import parse_rdma
from fs3.core.errors import error
from fs3.core.rdma import Device, Port, Problem, Report, inspect
from fs3.core.units import parse_bytes
from fs3.v1.frame_pb2 import Code

BENCH_PORT: Final = 9900
# What is measured, and the name for people; reads bring data to the measuring side.
MEASURED: Final = {"read": "read", "write": "write", "ping": "small message there and back"}
SIZE_BYTES_MAX: Final = 8 << 20


@click.group("rdma")
def rdma_command() -> None:
    """RDMA on this machine."""


@rdma_command.command("check")
@json_option
def check_command(as_json: bool) -> int:
    """Tell whether fs3 can use RDMA here, over what, and what to do where it cannot. Exit status 1 when it cannot."""
    report = inspect()
    if as_json:
        print_json(describe(report))
    else:
        click.echo("\n".join(lines(report)))
    return 0 if report.usable else 1


def describe(report: Report) -> dict[str, Any]:
    """Make the machine-readable form: the report, with `usable` at each level."""
    described = {"usable": report.usable, **asdict(report)}
    for device, found in zip(described["devices"], report.devices, strict=True):
        device["usable"] = found.usable
        for port, found_port in zip(device["ports"], found.ports, strict=True):
            port["usable"] = found_port.usable
    return described


def lines(report: Report) -> Iterator[str]:
    """Make the form for people."""
    usable = [f"{d.name} port {p.number}" for d in report.devices if d.usable for p in d.ports if p.usable]
    if report.usable:
        yield f"RDMA can be used, over {', '.join(usable)}"
    else:
        yield "RDMA cannot be used on this machine; fs3 uses TCP"
    yield f"verbs library    {report.library or 'none'}"
    locked = report.locked_bytes_max
    yield f"lockable memory  {'unlimited' if locked is None else human_bytes(locked)}"
    yield from _problems(report.problems, "")
    for device in report.devices:
        yield ""
        yield from _device(device)


def _device(device: Device) -> Iterator[str]:
    numa = "" if device.numa_node is None else f", NUMA node {device.numa_node}"
    firmware = f", firmware {device.firmware}" if device.firmware else ""
    yield f"{device.name}: {device.driver or 'unknown driver'}{firmware}{numa}, {device.uverbs or 'no uverbs device'}"
    if device.limits:
        yield "  limits  " + ", ".join(f"{name} {value}" for name, value in device.limits.items())
    if device.takes_dmabufs is not None:
        yield f"  GPU memory  {'can' if device.takes_dmabufs else 'cannot'} be registered (dma-buf)"
    yield from _problems(device.problems, "  ")
    for port in device.ports:
        yield from _port(port)


def _port(port: Port) -> Iterator[str]:
    lid = f", LID {port.lid}" if port.link_layer == "InfiniBand" else ""
    mtu = "" if port.mtu_bytes is None else f", MTU {port.mtu_bytes}"
    yield f"  port {port.number}  {port.state} ({port.physical_state}), {port.link_layer}, {port.rate}{mtu}{lid}"
    for gid in port.gids:
        device = f"  {gid.net_device}" if gid.net_device else ""
        chosen = f"  ← fs3 uses it: {port.chosen_because}" if gid == port.chosen_gid else ""
        yield f"    GID {gid.index}  {gid.address}  {gid.type}{device}{chosen}"
    yield from _problems(port.problems, "    ")


def _problems(problems: Iterable[Problem], indent: str) -> Iterator[str]:
    for problem in problems:
        yield f"{indent}{'fail' if problem.fatal else 'warn'}  {problem.what}  → {problem.advice}"


@rdma_command.command("bench")
@click.argument("peer", required=False, metavar="[HOST[:PORT]]")
@click.option("--listen", is_flag=True, help="Be the other side until interrupted, for whoever reaches the port.")
@click.option("--host", default="0.0.0.0", show_default=True, help="With --listen: the address.")
@click.option("--port", default=BENCH_PORT, show_default=True, help="With --listen: the port; 0: any.")
@click.option("--seconds", default=2.0, show_default=True, help="Length of each of the six measurements.")
@click.option("--size", default="1MiB", show_default=True, help="Bytes of a large operation, 8MiB at most.")
@click.option("--rdma", multiple=True, metavar="KEY=VALUE", help="As of `fs3 mount`; may be repeated.")
@json_option
def bench_command(
    peer: str | None,
    listen: bool,
    host: str,
    port: int,
    seconds: float,
    size: str,
    rdma: tuple[str, ...],
    as_json: bool,
) -> int:
    """Measure RDMA between this node and HOST, where `fs3 rdma bench --listen` runs.

    First raw verbs, then fs3's own calls, over connections that are made alike: reads and writes of --size, four at a
    time, and small messages one at a time.
    """
    from fs3 import native

    options = parse_rdma(rdma)
    if listen == (peer is not None):
        raise error(Code.CODE_INVALID_ARGUMENT, "give either HOST, the node that listens, or --listen")
    if peer is None:
        server = native.RdmaBenchServer(host, port, options)
        told = {"host": host, "port": server.port}
        click.echo(json.dumps(told) if as_json else f"listening; on the other node: fs3 rdma bench HOST:{server.port}")
        threading.Event().wait()
        return 0
    size_bytes = parse_bytes(size)
    if not 0 < size_bytes <= SIZE_BYTES_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"--size must be in 1..8MiB, not {size}")
    if not 0 < seconds <= 3600:
        raise error(Code.CODE_INVALID_ARGUMENT, f"--seconds must be more than 0 and at most 3600, not {seconds}")
    addr = peer if ":" in peer.rpartition("]")[2] else f"{peer}:{BENCH_PORT}"
    device, rows = native.bench_rdma(addr, seconds, size_bytes, options).wait()
    report = bench_report(device, size_bytes, seconds, rows)
    if as_json:
        print_json(report)
    else:
        click.echo("\n".join(bench_lines(report)))
    return 0


def bench_report(
    device: str, size_bytes: int, seconds: float, rows: Iterable[tuple[str, float, float, float, float]]
) -> dict[str, Any]:
    """Make the machine-readable form: raw verbs and fs3 side by side, with fs3's rate in parts of the raw one."""
    keys = ("bytes_per_s", "operations_per_s", "median_us", "p99_us")
    by_name = {name: dict(zip(keys, numbers, strict=True)) for name, *numbers in rows}
    measurements = []
    for what in MEASURED:
        raw, own = by_name[f"raw_{what}"], by_name[f"fs3_{what}"]
        ratio = own["operations_per_s"] / raw["operations_per_s"] if raw["operations_per_s"] else None
        measurements.append({"what": what, "raw": raw, "fs3": own, "ratio": ratio})
    return {"device": device, "size_bytes": size_bytes, "seconds": seconds, "measurements": measurements}


def bench_lines(report: dict[str, Any]) -> Iterator[str]:
    """Make the table for people."""
    yield f"over {report['device']}, {human_bytes(report['size_bytes'])} at a time"
    yield f"{'':30}{'raw verbs':>12}{'median':>10}{'p99':>10}{'fs3':>14}{'median':>10}{'p99':>10}{'fs3/raw':>9}"
    for m in report["measurements"]:
        cells = [f"{MEASURED[m['what']]:30}"]
        for side, width in ((m["raw"], 12), (m["fs3"], 14)):
            moved = side["bytes_per_s"]
            rate = f"{human_bytes(moved)}/s" if moved else f"{side['operations_per_s']:.0f}/s"
            cells.append(f"{rate:>{width}}{side['median_us']:>7.0f} us{side['p99_us']:>7.0f} us")
        cells.append(f"{m['ratio']:>9.2f}" if m["ratio"] is not None else f"{'-':>9}")
        yield "".join(cells)
