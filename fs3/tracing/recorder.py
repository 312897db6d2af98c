"""Taking a trace of this process."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

from fs3 import native
from fs3.tracing.files import StrPath, write_trace
from fs3.tracing.merge import BASE, merge_traces
from fs3.tracing.tracks import Tracks

EVENTS_MAX = 200_000
SECOND_NS = 1_000_000_000


def trace(path: StrPath, *, merge: StrPath | Sequence[StrPath] = (), events_max: int = EVENTS_MAX) -> Trace:
    """Trace what all clients of this process do, in a ``with`` block or between ``start()`` and ``stop()``.

    At the end `path` has a trace for https://ui.perfetto.dev or chrome://tracing (compressed if it ends in .gz): every
    operation on its thread, awaited ones on tracks of their own, and the requests of each to metadata and storage
    services. Times are those of the PyTorch profiler, and so are the ids of processes and threads. `merge`: one or more
    traces, such as the profiler's, that are put in the same file; they are read at the end.

    Of more than `events_max` events (some 150 bytes of memory each) the newest are kept, and the file says how many
    were dropped. What is under way at the end is not shown. What goes through a mount is not either: the process that
    calls has no part in it. One trace at a time can be taken in a process; a forked child is not traced, and may take
    one of its own.
    """
    return Trace(path, [merge] if isinstance(merge, str | os.PathLike) else merge, events_max)


class Trace:
    """A trace that is or will be taken; made by :func:`trace`. Thread-safe."""

    def __init__(self, path: StrPath, merge: Sequence[StrPath], events_max: int) -> None:
        if events_max < 1:
            raise ValueError(f"events_max must be at least 1, not {events_max}")
        self.path = os.fspath(path)
        self._merge = [os.fspath(source) for source in merge]
        self._events_max = events_max
        self._at_exit: Finalize | None = None

    def __enter__(self) -> Trace:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if value is None:
            self.stop()
        elif self._write():
            # What went wrong before is what the caller wants to hear of.
            merge_traces([self.path, *filter(os.path.exists, self._merge)], self.path)

    def start(self) -> None:
        """Begin. Raises RuntimeError while a trace is being taken in this process.

        A trace that nobody stops ends with the process, if that ends in an orderly way.
        """
        if not native.trace_start(self._events_max):
            raise RuntimeError("a trace is being taken in this process already; stop it first")
        # Children of multiprocessing run these at their end, but not what atexit has.
        self._at_exit = Finalize(None, self.stop, exitpriority=0)

    def stop(self) -> None:
        """End, and write the file. Does nothing when no trace is being taken, as in a forked child.

        Raises OSError when a file cannot be written or read. When one that is to be merged cannot be read, the trace
        itself is at its path nevertheless.
        """
        if self._write() and self._merge:
            merge_traces([self.path, *self._merge], self.path)

    def _write(self) -> bool:
        if self._at_exit is not None:
            self._at_exit.cancel()
        taken = native.trace_stop()
        if taken is None:
            return False
        began_wall_ns, operations, requests, dropped, threads = taken
        base_ns = began_wall_ns // SECOND_NS * SECOND_NS
        process = os.path.basename(sys.argv[0]) or "python"
        tracks = Tracks(os.getpid(), process, threads, began_wall_ns - base_ns)
        header: dict[str, Any] = {
            "traceName": self.path,
            "displayTimeUnit": "ms",
            BASE: base_ns,
            "host_name": socket.gethostname(),
            "fs3": {"dropped_events": dropped},
        }
        write_trace(self.path, header, tracks.make(operations, requests))
        return True
