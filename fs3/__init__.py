"""fs3: a distributed file system for AI training and inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fs3.client import AsyncFileSystem, FileSystem, RdmaOptions, RegisteredMemory, connect, connect_async
    from fs3.tracing import Trace, merge_traces, trace

__all__ = [
    "AsyncFileSystem",
    "FileSystem",
    "RdmaOptions",
    "RegisteredMemory",
    "Trace",
    "__version__",
    "connect",
    "connect_async",
    "merge_traces",
    "trace",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The client needs the native module; services and tools that do not use it must not load it.
    if name in ("Trace", "merge_traces", "trace"):
        from fs3 import tracing

        return getattr(tracing, name)
    if name in __all__:
        from fs3 import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
