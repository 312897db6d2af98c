"""Several traces as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fs3.core.errors import error
from fs3.tracing.files import StrPath, read_trace, write_trace
from fs3.v1.frame_pb2 import Code

BASE = "baseTimeNanoseconds"


def merge_traces(sources: Sequence[StrPath], destination: StrPath) -> None:
    """Write the events of all `sources` to `destination`, which may be one of them, on one clock.

    The sources are traces of fs3 or of the PyTorch profiler, or any others whose times are microseconds since
    ``baseTimeNanoseconds`` (PyTorch from 2.2 on; without it, since 1970). Names ending in .gz are compressed files.
    Processes of other hosts that have the same id stay apart. Raises INVALID_ARGUMENT for a file that is no trace.
    """
    if not sources:
        raise error(Code.CODE_INVALID_ARGUMENT, "there are no traces to merge")
    write_trace(destination, *merged([read_trace(source) for source in sources]))


def merged(traces: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the events of all."""
    header: dict[str, Any] = {}
    for trace in traces:
        header = {name: value for name, value in trace.items() if name != "traceEvents"} | header
    dropped = sum(trace.get("fs3", {}).get("dropped_events", 0) for trace in traces)
    if "fs3" in header:
        header["fs3"] = header["fs3"] | {"dropped_events": dropped}
    bases = [int(trace.get(BASE, 0)) for trace in traces]
    header[BASE] = next((base for base in bases if base), 0)
    hosts: dict[int, Any] = {}
    events: list[dict[str, Any]] = []
    named: set[tuple[Any, Any, Any]] = set()
    for trace, base in zip(traces, bases, strict=True):
        shift_us = (base - header[BASE]) / 1000
        host = trace.get("host_name")
        for event in trace["traceEvents"]:
            moved = dict(event)
            if "ts" in moved:
                moved["ts"] = float(moved["ts"]) + shift_us
            if isinstance(pid := moved.get("pid"), int) and hosts.setdefault(pid, host) != host:
                moved["pid"] = f"{host} {pid}"
            if moved.get("ph") == "M":
                # Of names for the same, the first one counts.
                key = (moved.get("name"), moved.get("pid"), moved.get("tid"))
                if key in named:
                    continue
                named.add(key)
            events.append(moved)
    return header, events
