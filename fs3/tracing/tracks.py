"""Operations and requests as events of the Trace Event Format, on tracks where they do not overlap.

A call that blocks is shown on its thread, under the thread id that the PyTorch profiler uses, too. What overlaps
(awaited calls, requests to one service) gets as many tracks of its own as there are at once.
"""

from __future__ import annotations

import heapq
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from fs3 import native
from fs3.v1.frame_pb2 import Code, Method

Event = dict[str, Any]

# Track ids from here on are no threads: Linux' thread ids are at most 2^22.
FIRST_TRACK = 10_000_000
# Ids of arrows are unique among processes: the process' id, and this many bits. Together less than 2^53.
ARROW_BITS = 28
ROOT_INODE = 1


class Timed(Protocol):
    """Something that took some time, in nanoseconds from some moment on."""

    @property
    def start_ns(self) -> int:
        """When it began."""

    @property
    def duration_ns(self) -> int:
        """How long it took."""


T = TypeVar("T", bound=Timed)


def lanes(items: Iterable[T]) -> list[list[T]]:
    """Share `items` out to as few lists as it takes so that those in one list do not overlap, each in order of time."""
    found: list[list[T]] = []
    free: list[tuple[int, int]] = []  # (when its last item ended, lane)
    for item in sorted(items, key=lambda item: item.start_ns):
        end_ns = item.start_ns + item.duration_ns
        if free and free[0][0] <= item.start_ns:
            lane = free[0][1]
            heapq.heapreplace(free, (end_ns, lane))
        else:
            lane = len(found)
            found.append([])
            heapq.heappush(free, (end_ns, lane))
        found[lane].append(item)
    return found


class Tracks:
    """Makes the events of one process. `offset_ns` is added to all times; `threads` are names of threads by id."""

    def __init__(self, pid: int, process: str, threads: Mapping[int, str], offset_ns: int) -> None:
        self._pid = pid
        self._process = process
        self._threads = threads
        self._offset_ns = offset_ns
        self._next = FIRST_TRACK
        self._arrows = 0
        # Where each operation is shown.
        self._shown: dict[int, int] = {}

    def make(
        self, operations: Sequence[native.TracedOperation], requests: Sequence[native.TracedRequest]
    ) -> Iterator[Event]:
        """All events. Of operations that the trace has not, because they have not ended, requests may be among them."""
        yield self._named("process_name", 0, self._process)
        yield from self._on_threads([o for o in operations if not o.background])
        yield from self._awaited([o for o in operations if o.background])
        yield from self._by_service(requests)

    def _on_threads(self, operations: Sequence[native.TracedOperation]) -> Iterator[Event]:
        for thread in sorted({o.thread for o in operations}):
            yield self._named("thread_name", thread, self._name(thread))
        for operation in operations:
            yield self._operation(operation, operation.thread)

    def _awaited(self, operations: Sequence[native.TracedOperation]) -> Iterator[Event]:
        by_thread: dict[int, list[native.TracedOperation]] = defaultdict(list)
        for operation in operations:
            by_thread[operation.thread].append(operation)
        for thread, some in sorted(by_thread.items()):
            for track, named, lane in self._lanes(f"fs3 awaited by {self._name(thread)}", some):
                yield from named
                for operation in lane:
                    yield self._operation(operation, track)

    def _by_service(self, requests: Sequence[native.TracedRequest]) -> Iterator[Event]:
        by_service: dict[str, list[native.TracedRequest]] = defaultdict(list)
        for request in requests:
            by_service[_service(request)].append(request)
        for service, some in sorted(by_service.items()):
            for track, named, lane in self._lanes(f"fs3 {service}", some):
                yield from named
                for request in lane:
                    yield from self._request(request, track)

    def _lanes(self, name: str, items: Sequence[T]) -> Iterator[tuple[int, list[Event], list[T]]]:
        """The tracks that it takes for `items`, the events that name each, and what is on it."""
        for number, lane in enumerate(lanes(items), 1):
            track, self._next = self._next, self._next + 1
            order = {"ph": "M", "name": "thread_sort_index", "pid": self._pid, "tid": track}
            named = self._named("thread_name", track, f"{name} #{number}")
            yield track, [named, order | {"args": {"sort_index": track}}], lane

    def _operation(self, operation: native.TracedOperation, track: int) -> Event:
        self._shown[operation.number] = track
        name = "fs3." + operation.name.removeprefix("METHOD_META_").lower()
        return self._complete(operation, name, "fs3", track, _operation_arguments(operation))

    def _request(self, request: native.TracedRequest, track: int) -> Iterator[Event]:
        yield self._complete(request, _method(request.method), "fs3.request", track, _request_arguments(request))
        source = self._shown.get(request.operation)
        if source is None:
            return
        self._arrows += 1
        arrow = {"id": (self._pid << ARROW_BITS) | (self._arrows & ((1 << ARROW_BITS) - 1))}
        yield self._event("s", "request", "fs3.flow", source, request.start_ns) | arrow
        yield self._event("f", "request", "fs3.flow", track, request.start_ns) | arrow | {"bp": "e"}

    def _complete(self, item: Timed, name: str, category: str, track: int, arguments: dict[str, Any]) -> Event:
        event = self._event("X", name, category, track, item.start_ns)
        return event | {"dur": item.duration_ns / 1000, "args": arguments}

    def _event(self, phase: str, name: str, category: str, track: int, at_ns: int) -> Event:
        ts = (self._offset_ns + at_ns) / 1000
        return {"ph": phase, "name": name, "cat": category, "pid": self._pid, "tid": track, "ts": ts}

    def _name(self, thread: int) -> str:
        return self._threads.get(thread, f"thread {thread}")

    def _named(self, what: str, track: int, name: str) -> Event:
        return {"ph": "M", "name": what, "pid": self._pid, "tid": track, "args": {"name": name}}


def _service(request: native.TracedRequest) -> str:
    if request.node_id:
        return f"storage node {request.node_id} ({request.address})"
    return f"{_method(request.method).partition('.')[0]} {request.address}"


def _method(method: int) -> str:
    """METHOD_STORAGE_READ -> "storage.read"."""
    return Method.Name(method).removeprefix("METHOD_").lower().replace("_", ".", 1)  # type: ignore[arg-type]


def _operation_arguments(operation: native.TracedOperation) -> dict[str, Any]:
    arguments: dict[str, Any] = {"operation": operation.number}
    if operation.path:
        arguments["path"] = os.fsdecode(operation.path)
    if operation.inode > ROOT_INODE:
        arguments["inode"] = operation.inode
    for name in ("offset", "count", "hits", "bytes"):
        value = getattr(operation, name)
        if value is not None:
            arguments[name] = value
    return arguments | _end(operation)


def _request_arguments(request: native.TracedRequest) -> dict[str, Any]:
    arguments: dict[str, Any] = {"operation": request.operation, "address": request.address}
    numbers = {"node": request.node_id, "target": request.target_id, "chunks": request.chunks}
    numbers |= {"sent": request.sent, "received": request.received, "earlier tries": request.attempt}
    arguments |= {name: value for name, value in numbers.items() if value}
    if request.hedge:
        arguments["hedge"] = True
    return arguments | _end(request)


def _end(item: native.TracedOperation | native.TracedRequest) -> dict[str, str]:
    if not item.finished:
        return {"error": "given up"}
    if item.error is None:
        return {}
    return {"error": Code.Name(item.error).removeprefix("CODE_")}  # type: ignore[arg-type]
