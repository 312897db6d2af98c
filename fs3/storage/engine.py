"""What the shell needs of the native storage engine."""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from fs3.core.config import StorageConfig
from fs3.core.errors import Fs3Error, error
from fs3.storage.disks import DiskIdentity
from fs3.v1.frame_pb2 import Code


class StorageEngine(Protocol):
    """The native engine of one process. Its methods may be called from any thread; none blocks for long but stop."""

    def start(self) -> int:
        """Open the disks, listen for frames; returns the port. Raises OSError."""

    def apply_routing(self, routing: bytes) -> None:
        """Take a serialized fs3.v1.Routing; targets of this node that are missing on disk are made."""

    def renew_lease(self, serve_until_monotonic_ns: int) -> None:
        """Serve until that time of CLOCK_MONOTONIC; never shortens."""

    def status(self) -> bytes:
        """Return a serialized fs3.v1.EngineStatus."""

    def stop(self) -> None:
        """Stop serving, finish what is being written, close the disks. Harmless twice."""


EngineFactory = Callable[[str], StorageEngine]


def engine_config(
    config: StorageConfig, *, node_id: int, node_uuid: bytes, token: str, disks: Sequence[DiskIdentity]
) -> str:
    """Make the JSON that an engine is configured with."""
    return json.dumps(
        {
            "node_id": node_id,
            "node_uuid_hex": node_uuid.hex(),
            "cluster_id": config.cluster_id,
            "token": token,
            "host": config.host,
            "frame_port": config.frame_port,
            "disks": [{"path": d.path, "uuid_hex": d.uuid.hex()} for d in disks],
            "read_cache_bytes": config.read_cache_bytes,
            "kv_memory_bytes": config.kv_memory_bytes,
            "durable_writes": config.durable_writes,
            "scrub_bytes_per_s": config.scrub_bytes_per_s,
            "scrub_interval_s": config.scrub_interval_s,
            "resync_bytes_per_s": config.resync_bytes_per_s,
            "transport": config.transport,
            "rdma": asdict(config.rdma),
            "shared_memory": config.shared_memory,
        }
    )


def native_engine(config_json: str) -> StorageEngine:
    """Make the engine of the native module. Raises NOT_SUPPORTED when the module is not built."""
    engine: StorageEngine = _native().StorageEngine(config_json)
    return engine


def log_engine(level: str) -> None:
    """Send what engines of this process log at `level` and above to stderr. Harmless twice, and without the module."""
    with contextlib.suppress(Fs3Error, RuntimeError):  # RuntimeError: the process has done so already
        _native().init_logging(_native_level(level))


def change_engine_log(level: str) -> None:
    """Log at that level from now on what engines log. Harmless before `log_engine`, and without the module."""
    with contextlib.suppress(Fs3Error, RuntimeError):
        _native().set_log_level(_native_level(level))


def _native_level(level: str) -> str:
    return {"warning": "warn"}.get(level, level)


def _native() -> Any:
    try:
        return importlib.import_module("fs3.native")
    except ImportError as exc:
        raise error(
            Code.CODE_NOT_SUPPORTED, f"the native module is not there ({exc}); build it with `make build`"
        ) from exc
