"""Configuration of the services: frozen dataclasses from a TOML file, then overrides.

Unknown keys fail naming the key, the file and the nearest valid key; types are checked. A key that ends in
`_bytes`, `_bytes_max` or `_bytes_per_s` takes a number or a size such as "64MiB".
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fs3.core.errors import Fs3Error, error
from fs3.core.units import parse_bytes
from fs3.v1.frame_pb2 import Code

LOG_LEVELS = ("debug", "info", "warning", "error")
TRANSPORTS = ("auto", "tcp", "rdma")
RDMA_MTU_BYTES = (256, 512, 1024, 2048, 4096)
# Less has no room for the buffers of a few connections.
REGISTERED_BYTES_MIN = 64 << 20
CHUNK_BYTES_MIN = 64 << 10
CHUNK_BYTES_MAX = 64 << 20


def _invalid(message: str) -> Fs3Error:
    return error(Code.CODE_INVALID_ARGUMENT, message)


def _at_least(config: object, **minima: int) -> None:
    for key, minimum in minima.items():
        if getattr(config, key) < minimum:
            raise _invalid(f"{key} must be at least {minimum}, not {getattr(config, key)}")


@dataclass(frozen=True, kw_only=True)
class RdmaOptions:
    """How RDMA is used by a client, a mount or a storage service. The defaults are right for most networks.

    `devices` may be given as any sequence of names. Raises INVALID_ARGUMENT for values out of their range.
    """

    devices: tuple[str, ...] = ()
    """Names of the devices to use; empty: all."""
    gid_index: int | None = None
    """Index of the own address (GID) of a port, 0..255; None: the one that reaches furthest."""
    service_level: int = 0
    """InfiniBand service level, 0..15."""
    traffic_class: int = 0
    """Traffic class, 0..255; RoCE v2 has DSCP in its upper six bits and ECN in the lower two."""
    pkey_index: int = 0
    """Index of the partition key in the port's table, 0..65535."""
    mtu: int = 4096
    """Largest path MTU in bytes: 256, 512, 1024, 2048 or 4096; the port's when that is smaller."""
    ack_timeout: int = 14
    """A packet that is not acknowledged within 4.096 us * 2**ack_timeout is sent again; 0..31, 0: never."""
    retry_count: int = 7
    """How often it is sent again before the connection ends, 0..7."""
    registered_bytes_max: int = 16 << 30
    """Most memory that is registered with one device, in bytes, at least 64 MiB."""

    def __post_init__(self) -> None:
        devices: object = self.devices
        if not isinstance(devices, Sequence) or isinstance(devices, str) or not all(_is_name(d) for d in devices):
            raise _invalid(f"devices must be a list of names of RDMA devices, not {devices!r}")
        object.__setattr__(self, "devices", tuple(devices))
        if self.gid_index is not None:
            _within(self, gid_index=255)
        _within(self, service_level=15, traffic_class=255, pkey_index=65535, ack_timeout=31, retry_count=7)
        if self.mtu not in RDMA_MTU_BYTES:
            raise _invalid(f"mtu must be one of {', '.join(map(str, RDMA_MTU_BYTES))} bytes, not {self.mtu!r}")
        if not _is_int(self.registered_bytes_max) or self.registered_bytes_max < REGISTERED_BYTES_MIN:
            raise _invalid(f"registered_bytes_max must be at least 64MiB, not {self.registered_bytes_max!r}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _within(options: RdmaOptions, **maxima: int) -> None:
    for key, maximum in maxima.items():
        value = getattr(options, key)
        if not _is_int(value) or not 0 <= value <= maximum:
            raise _invalid(f"{key} must be a whole number in 0..{maximum}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """What every service has."""

    cluster_id: str
    """The cluster this service belongs to."""
    token: str = ""
    """The cluster's shared secret; prefer token_file."""
    token_file: str = ""
    """File with the shared secret. With neither, FS3_TOKEN; with none at all everybody is let in."""
    host: str = "127.0.0.1"
    """Address to listen on, and that others are told."""
    grpc_port: int = 0
    """0: choose a free one."""
    log_level: str = "info"
    ready_file: str = ""
    """Where {pid, host, frame_port, grpc_port, node_id} is written as JSON once it serves."""

    def __post_init__(self) -> None:
        if not self.cluster_id:
            raise _invalid("cluster_id is empty; name the cluster this service belongs to")
        if self.log_level not in LOG_LEVELS:
            raise _invalid(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {self.log_level!r}")
        for key in ("grpc_port", "frame_port"):
            if not 0 <= getattr(self, key, 0) < 65536:
                raise _invalid(f"{key} must be in 0..65535, not {getattr(self, key)}")

    def secret(self) -> str:
        """Return the token: `token`, else the content of `token_file`, else FS3_TOKEN, else "".

        Raises Fs3Error when the file cannot be read or is empty.
        """
        if self.token:
            return self.token
        if not self.token_file:
            return os.environ.get("FS3_TOKEN", "")
        try:
            token = Path(self.token_file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as exc:
            raise error(Code.CODE_ACCESS, f"token_file {self.token_file} cannot be read: {exc}") from exc
        if not token:
            raise _invalid(f"token_file {self.token_file} is empty")
        return token


@dataclass(frozen=True, kw_only=True)
class MgmtdConfig(ServiceConfig):
    """The cluster manager."""

    kv: str
    """URL of the key-value store: lmdb:/var/lib/fs3/kv, fdb:/etc/foundationdb/fdb.cluster."""
    replicas: int = 3
    """Targets per chain."""
    min_storage_nodes: int = 0
    """Chains are made once so many storage nodes are connected; 0: as many as `replicas`."""
    targets_per_disk: int = 8
    failure_domain: str = ""
    """A tag of storage nodes, such as "rack": no new chain has two targets where it has the same value, and nodes
    without it get no chains. Empty: every node by itself.
    """
    lease_ms: int = 6000
    """T: a node silent for T is failed; it serves until send time + T/2."""
    heartbeat_ms: int = 1000
    primary_lease_ms: int = 1200
    """Another manager takes over when the primary has been silent for this long.

    With `heartbeat_ms` well below half of `lease_ms`: nodes that find the new primary by then go on serving.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, replicas=1, min_storage_nodes=0, targets_per_disk=1, heartbeat_ms=10, primary_lease_ms=50)
        if self.lease_ms < 4 * self.heartbeat_ms:
            raise _invalid(
                f"lease_ms ({self.lease_ms}) must be at least 4 * heartbeat_ms ({self.heartbeat_ms}): "
                "a node serves for half the lease after a heartbeat"
            )
        if 0 < self.min_storage_nodes < self.replicas:
            raise _invalid(f"min_storage_nodes must be at least replicas ({self.replicas})")


@dataclass(frozen=True, kw_only=True)
class MetaConfig(ServiceConfig):
    """A metadata service."""

    kv: str
    mgmtd: tuple[str, ...]
    """host:port of every cluster manager."""
    frame_port: int = 0
    """0: choose a free one."""
    chunk_bytes: int = 1 << 20
    """Chunk size of new files: a power of two, 64 KiB .. 64 MiB."""
    stripe: int = 0
    """Chains per new file; 0: 16, if there are as many, and up to 128 as the file grows."""
    session_ms: int = 60_000
    """A client silent for this long loses its write sessions."""
    gc_delay_ms: int = 10_000
    """How long removed files stay, in which whoever has one open elsewhere says so."""
    data_dir: str = ""
    """Where the node's uuid is kept; with none it is derived from cluster, host and port."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self.mgmtd, "mgmtd")
        _at_least(self, stripe=0, session_ms=1000, gc_delay_ms=0)
        size = self.chunk_bytes
        if size & (size - 1) or not CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX:
            raise _invalid(f"chunk_bytes must be a power of two from 64KiB to 64MiB, not {size}")


@dataclass(frozen=True, kw_only=True)
class StorageConfig(ServiceConfig):
    """A storage service."""

    mgmtd: tuple[str, ...]
    """host:port of every cluster manager."""
    data_dir: str
    """Directory of the node itself: its uuid and its lock."""
    disks: tuple[str, ...]
    """One directory per disk."""
    frame_port: int = 0
    """0: choose a free one."""
    read_cache_bytes: int = 512 << 20
    kv_memory_bytes: int = 1 << 30
    """Memory that key-value caches may use on the node; 0: it keeps none."""
    durable_writes: bool = False
    """Acknowledge every write only after it is on stable storage."""
    scrub_bytes_per_s: int = 16 << 20
    """Bytes that the scrub reads from each disk in a second at most; 0: no scrub."""
    scrub_interval_s: int = 24 * 3600
    """From the begin of one scrub of a target to the begin of the next."""
    resync_bytes_per_s: int = 256 << 20
    """Bytes that are sent in a second at most to bring replicas of other nodes up to date; 0: no limit."""
    transport: str = "auto"
    """How clients and other storage nodes may reach it, and it them: auto (RDMA where both have it), tcp or rdma."""
    rdma: RdmaOptions = RdmaOptions()
    """The table [rdma]: how RDMA is used."""
    shared_memory: bool = True
    """Payloads to and from processes of the same host go through shared memory, unless transport is rdma."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _need(self.mgmtd, "mgmtd")
        _need(self.disks, "disks")
        if not self.data_dir:
            raise _invalid("data_dir is empty; name the directory that keeps the node's identity")
        if len({os.path.abspath(d) for d in self.disks}) != len(self.disks):
            raise _invalid("disks names the same directory twice")
        if self.transport not in TRANSPORTS:
            raise _invalid(f"transport must be one of {', '.join(TRANSPORTS)}, not {self.transport!r}")
        _at_least(
            self, read_cache_bytes=0, kv_memory_bytes=0, scrub_bytes_per_s=0, scrub_interval_s=1, resync_bytes_per_s=0
        )


def _need(values: tuple[str, ...], key: str) -> None:
    if not values or not all(values):
        raise _invalid(f"{key} is empty; give at least one")


C = TypeVar("C", bound=ServiceConfig)


def load(
    cls: type[C],
    path: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, object] | None = None,
    settings: Sequence[str] = (),
) -> C:
    """Make a configuration from the file at `path` (if any), then `settings`, then `overrides`.

    `settings` are "key=value" with the value in TOML (a bare word is a string). Overrides that are None are
    ignored. Raises Fs3Error with one line that names the key and where it came from.
    """
    values: dict[str, tuple[object, str]] = {}
    if path is not None:
        values.update({k: (v, str(path)) for k, v in _read(path).items()})
    for setting in settings:
        key, value = _parse_setting(setting)
        values[key] = (value, "--set")
    for key, given in (overrides or {}).items():
        if given is not None:
            values[key] = (given, "the command line")
    made = _converted(cls, values)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.name not in made:
            raise _invalid(f"{field.name} is missing{f' in {path}' if path else ''}; set it")
    try:
        return cls(**made)
    except Fs3Error as exc:
        raise _invalid(f"{path}: {exc.message}" if path else exc.message) from None


def parse_rdma(settings: Sequence[str]) -> RdmaOptions:
    """Make the options that `settings`, each "key=value" as for :func:`load`, change from the defaults.

    Raises INVALID_ARGUMENT with one line that says what is allowed.
    """
    return _rdma_options(dict(map(_parse_setting, settings)), "--rdma")


def _rdma_options(values: Mapping[str, object], origin: str) -> RdmaOptions:
    made = _converted(RdmaOptions, {key: (value, origin) for key, value in values.items()})
    try:
        return RdmaOptions(**made)
    except Fs3Error as exc:
        raise _invalid(f"{origin}: {exc.message}") from None


def _converted(cls: type[Any], values: Mapping[str, tuple[object, str]]) -> dict[str, Any]:
    """Convert (value, origin) by key to the types of `cls`. Raises INVALID_ARGUMENT for unknown keys."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    for key, (value, origin) in values.items():
        if key not in fields:
            raise _invalid(f"unknown key {key!r} in {origin}{_nearest(key, fields)}")
        made[key] = _convert(key, value, fields[key], origin)
    return made


def _read(path: str | os.PathLike[str]) -> dict[str, object]:
    try:
        with open(path, "rb") as handle:
            return tomllib.load(handle)
    except FileNotFoundError:
        raise error(Code.CODE_NOT_FOUND, f"{path} does not exist") from None
    except OSError as exc:
        raise error(Code.CODE_ACCESS, f"{path} cannot be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise _invalid(f"{path} is not valid TOML: {exc}") from exc


def _parse_setting(setting: str) -> tuple[str, object]:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not key:
        raise _invalid(f"{setting!r} is not a setting; write key=value")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text


def _nearest(key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(sorted(known))}"


def _convert(key: str, value: object, kind: Any, origin: str) -> object:
    if kind is RdmaOptions:
        if isinstance(value, RdmaOptions):
            return value
        if not isinstance(value, Mapping):
            raise _invalid(f"{key} in {origin} must be a table, not {value!r}")
        return _rdma_options(value, f"[{key}] of {origin}")
    if kind == int | None:
        kind = int
    if kind is int and isinstance(value, str) and key.endswith(("_bytes", "_bytes_per_s", "_bytes_max")):
        try:
            return parse_bytes(value)
        except Fs3Error as exc:
            raise _invalid(f"{key} in {origin}: {exc.message}") from None
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if (kind is str and isinstance(value, str)) or (kind is bool and isinstance(value, bool)):
        return value
    if kind == tuple[str, ...]:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise _invalid(f"{key} in {origin} must be a list of strings, not {value!r}")
    names = {int: "a whole number", str: "a string", bool: "true or false"}
    raise _invalid(f"{key} in {origin} must be {names[kind]}, not {value!r}")
