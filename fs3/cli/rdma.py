"""`fs3 rdma`: what this machine has for RDMA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import click

from fs3.cli.output import human_bytes, json_option, print_json
from fs3.core.rdma import Device, Port, Problem, Report, inspect


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
