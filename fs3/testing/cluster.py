"""A real cluster of separate processes on one machine, in one directory.

`fs3 up` is this class; so are the cluster tests and the demo. The directory holds everything: configuration, token,
disks, key-value store, logs, pid files. It survives `down` and `up` with all data.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import signal
import sys
import time
import tomllib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO, TypeVar

from fs3.core.errors import Fs3Error, error
from fs3.core.process import last_line
from fs3.rpc.grpc_client import fetch_primary, fetch_routing, fetch_status
from fs3.testing.node_status import unready
from fs3.testing.ports import lasting_ports
from fs3.testing.process import ProcessRef, spawn
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import ManagerStatus
from fs3.v1.routing_pb2 import PublicState, Routing

FORMAT = 1
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
SERVING_TIMEOUT_S = 60.0

Report = Callable[[str], None]
T = TypeVar("T")


def _quiet(_: str) -> None:
    return None


@dataclass(frozen=True)
class ClusterSpec:
    """The shape of a local cluster. Sizes in bytes, times in milliseconds.

    ``kv``: URL of a key-value store that exists elsewhere; empty for one in the cluster's directory.
    """

    storage: int = 3
    replicas: int = 3
    meta: int = 1
    managers: int = 1
    targets_per_disk: int = 4
    chunk_bytes: int = 1 << 20
    lease_ms: int = 6000
    heartbeat_ms: int = 1000
    session_ms: int = 60_000
    gc_delay_ms: int = 10_000
    kv_durable: bool = True
    kv: str = ""
    read_cache_bytes: int = 512 << 20
    kv_memory_bytes: int = 1 << 30
    resync_bytes_per_s: int = 256 << 20
    shared_memory: bool = True
    durable_writes: bool = False

    def check(self) -> None:
        """Raise INVALID_ARGUMENT with one line when the numbers do not fit together."""
        for name in ("storage", "replicas", "meta", "managers", "targets_per_disk"):
            if getattr(self, name) < 1:
                raise error(Code.CODE_INVALID_ARGUMENT, f"--{name.replace('_', '-')} must be at least 1")
        if self.replicas > self.storage:
            raise error(
                Code.CODE_INVALID_ARGUMENT,
                f"{self.replicas} replicas need as many storage services; there are {self.storage}: "
                f"raise --storage or lower --replicas",
            )
        if self.kv.startswith("memory"):
            raise error(Code.CODE_INVALID_ARGUMENT, f"--kv {self.kv}: every service would have a store of its own")


@dataclass(frozen=True)
class Service:
    """One process of the cluster."""

    name: str
    kind: str
    directory: Path

    @property
    def index(self) -> int:
        """Its place among those of its kind, from 0."""
        number = self.name.rpartition("-")[2]
        return int(number) - 1 if number.isdigit() else 0

    @property
    def config(self) -> Path:
        """Its TOML file."""
        return self.directory / "config.toml"

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.directory / "log"

    @property
    def ready_file(self) -> Path:
        """What it writes once it serves."""
        return self.directory / "ready.json"

    @property
    def pid_file(self) -> Path:
        """Who it is."""
        return self.directory / "pid"

    def process(self) -> ProcessRef | None:
        """The running process, if any."""
        return ProcessRef.load(self.pid_file)

    def ready(self) -> dict[str, object] | None:
        """What the running process says of itself: pid, host, frame_port, grpc_port, node_id."""
        process = self.process()
        if process is None:
            return None
        try:
            data: dict[str, object] = json.loads(self.ready_file.read_text())
        except (OSError, ValueError):
            return None
        return data if data.get("pid") == process.pid else None


def _toml(values: dict[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


class LocalCluster:
    """A cluster in `directory`. Not thread-safe; operations of two processes exclude each other by a lock file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.absolute()
        path = self.directory / "cluster.toml"
        try:
            data = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise error(
                Code.CODE_NOT_FOUND, f"{directory} holds no cluster; make one with `fs3 up {directory}`"
            ) from None
        except (OSError, tomllib.TOMLDecodeError) as e:
            raise error(Code.CODE_INVALID_ARGUMENT, f"{path} cannot be read: {e}") from e
        if data.get("format") != FORMAT:
            raise error(
                Code.CODE_INVALID_ARGUMENT,
                f"{path} has format {data.get('format')}; this version of fs3 reads format {FORMAT}",
            )
        self.cluster_id = str(data["cluster_id"])
        # Clusters of earlier versions have one manager.
        self.mgmtd_ports = [int(p) for p in data.get("mgmtd_ports") or [data["mgmtd_port"]]]
        self.meta_ports = [int(p) for p in data["meta_ports"]]
        self.spec = ClusterSpec(**{f.name: data[f.name] for f in fields(ClusterSpec) if f.name in data})

    @classmethod
    def create(cls, directory: Path, spec: ClusterSpec) -> LocalCluster:
        """Lay out a new cluster; nothing is started. Raises EXISTS when there is one already."""
        spec.check()
        directory = directory.absolute()
        marker = directory / "cluster.toml"
        if marker.exists():
            raise error(Code.CODE_EXISTS, f"{directory} holds a cluster already")
        if directory.exists() and any(directory.iterdir()):
            raise error(Code.CODE_NOT_EMPTY, f"{directory} is not empty and holds no cluster; name another directory")
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as e:
            raise error(Code.CODE_ACCESS, f"{directory} cannot be made: {e.strerror}") from e
        token = directory / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_urlsafe(32) + "\n")
        ports = lasting_ports(spec.managers + spec.meta)
        values: dict[str, object] = {
            "format": FORMAT,
            "cluster_id": str(uuid.uuid4()),
            "mgmtd_ports": ports[: spec.managers],
            "meta_ports": ports[spec.managers :],
            **asdict(spec),
        }
        temporary = marker.with_suffix(".tmp")
        temporary.write_text("# Made by `fs3 up`.\n" + _toml(values))
        temporary.replace(marker)
        return cls(directory)

    # ---- who is there

    @property
    def token_file(self) -> Path:
        """The shared secret."""
        return self.directory / "token"

    @property
    def token(self) -> str:
        """The shared secret."""
        return self.token_file.read_text().strip()

    @property
    def mgmtd_addresses(self) -> list[str]:
        """host:port of every cluster manager."""
        return [f"127.0.0.1:{port}" for port in self.mgmtd_ports]

    @property
    def url(self) -> str:
        """What clients connect to."""
        return "fs3://" + ",".join(f"127.0.0.1:{port}" for port in self.meta_ports) + "/"

    def services(self) -> list[Service]:
        """Every process, in the order of starting."""
        managers = self.spec.managers
        names = [("mgmtd" if managers == 1 else f"mgmtd-{i + 1}", "mgmtd") for i in range(managers)]
        names += [(f"storage-{i + 1}", "storage") for i in range(self.spec.storage)]
        names += [(f"meta-{i + 1}", "meta") for i in range(self.spec.meta)]
        return [Service(name, kind, self.directory / name) for name, kind in names]

    def service(self, name: str) -> Service:
        """The service of that name. Raises NOT_FOUND."""
        for service in self.services():
            if service.name == name:
                return service
        known = ", ".join(s.name for s in self.services())
        raise error(Code.CODE_NOT_FOUND, f"there is no service {name}; there are {known}")

    def routing(self, *, timeout_s: float = 5.0) -> Routing:
        """The primary manager's routing now; each manager is asked for `timeout_s` at most. Raises UNAVAILABLE."""
        return self._ask_managers(fetch_routing, timeout_s)

    def primary(self, *, timeout_s: float = 5.0) -> str:
        """Name of the manager that is primary as far as the others know. Raises UNAVAILABLE."""
        address = self._ask_managers(fetch_primary, timeout_s)
        names = [service.name for service in self.services() if service.kind == "mgmtd"]
        return dict(zip(self.mgmtd_addresses, names, strict=True))[address]

    def manager_status(self, *, timeout_s: float = 5.0) -> ManagerStatus:
        """What the primary manager counts; each manager is asked for `timeout_s` at most. Raises UNAVAILABLE."""
        return self._ask_managers(fetch_status, timeout_s)

    def _ask_managers(self, ask: Callable[..., T], timeout_s: float) -> T:
        """The first answer that a manager gives. Raises the last one's Fs3Error."""
        failure: Fs3Error | None = None
        for address in self.mgmtd_addresses:
            try:
                return ask(address, token=self.token, cluster_id=self.cluster_id, timeout_s=timeout_s)
            except Fs3Error as e:
                failure = e
        assert failure is not None
        raise failure

    # ---- starting and stopping

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.directory / "lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise error(
                    Code.CODE_BUSY, f"another fs3 command is starting or stopping the cluster in {self.directory}"
                ) from None
            yield

    def up(self, report: Report = _quiet) -> None:
        """Start every service and wait until all chains serve. Raises EXISTS when it runs already.

        When a service does not start, those that did are stopped again and the error names the log.
        """
        with self._lock():
            running = [s.name for s in self.services() if s.process()]
            if running:
                raise error(
                    Code.CODE_EXISTS,
                    f"the cluster in {self.directory} runs already ({', '.join(running)}); "
                    f"see `fs3 status {self.directory}`, or stop it with `fs3 down {self.directory}`",
                )
            try:
                self._launch(self.services(), report)
                self.wait_serving(report=report)
            except BaseException:
                self._stop(report)
                raise

    def _launch(self, services: list[Service], report: Report) -> None:
        for wave in (["mgmtd"], ["storage", "meta"]):
            chosen = [s for s in services if s.kind in wave]
            for service in chosen:
                self._spawn(service)
            for service in chosen:
                self._wait_ready(service)
                report(f"{service.name} is up")

    def _spawn(self, service: Service) -> None:
        service.directory.mkdir(exist_ok=True)
        service.config.write_text("# Written by `fs3 up` at every start.\n" + _toml(self._config(service)))
        service.ready_file.unlink(missing_ok=True)
        spawn(self._argv(service), log=service.log).save(service.pid_file)

    def _argv(self, service: Service) -> list[str]:
        return [sys.executable, "-m", "fs3", service.kind, "--config", str(service.config)]

    def _config(self, service: Service) -> dict[str, object]:
        common: dict[str, object] = {
            "cluster_id": self.cluster_id,
            "token_file": str(self.token_file),
            "host": "127.0.0.1",
            "ready_file": str(service.ready_file),
        }
        kv = self.spec.kv or f"lmdb:{self.directory / 'kv'}" + ("" if self.spec.kv_durable else "?durable=0")
        if service.kind == "mgmtd":
            return {
                **common,
                "grpc_port": self.mgmtd_ports[service.index],
                "kv": kv,
                "replicas": self.spec.replicas,
                "min_storage_nodes": self.spec.storage,
                "targets_per_disk": self.spec.targets_per_disk,
                "lease_ms": self.spec.lease_ms,
                "heartbeat_ms": self.spec.heartbeat_ms,
            }
        common["mgmtd"] = self.mgmtd_addresses
        if service.kind == "meta":
            return {
                **common,
                "kv": kv,
                "frame_port": self.meta_ports[service.index],
                "chunk_bytes": self.spec.chunk_bytes,
                "session_ms": self.spec.session_ms,
                "gc_delay_ms": self.spec.gc_delay_ms,
                "data_dir": str(service.directory),
            }
        return {
            **common,
            "data_dir": str(service.directory),
            "disks": [str(service.directory / "disk-1")],
            "read_cache_bytes": self.spec.read_cache_bytes,
            "kv_memory_bytes": self.spec.kv_memory_bytes,
            "resync_bytes_per_s": self.spec.resync_bytes_per_s,
            "shared_memory": self.spec.shared_memory,
            "durable_writes": self.spec.durable_writes,
        }

    def _wait_ready(self, service: Service) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while service.ready() is None:
            if service.process() is None:
                raise error(
                    Code.CODE_UNAVAILABLE,
                    f"{service.name} ended while starting: {last_line(service.log) or 'no output'} "
                    f"(log: {service.log})",
                )
            if time.monotonic() > deadline:
                raise error(
                    Code.CODE_TIMEOUT, f"{service.name} did not start within {START_TIMEOUT_S:g} s (log: {service.log})"
                )
            time.sleep(0.02)

    def wait_serving(self, *, timeout_s: float = SERVING_TIMEOUT_S, report: Report = _quiet) -> Routing:
        """Wait until every target of every chain serves. Raises TIMEOUT saying what is missing."""
        deadline = time.monotonic() + timeout_s
        last = "the cluster manager does not answer"
        while True:
            try:
                routing = self.routing()
                waiting = unserving(routing) or unready(self, routing)
                if routing.chains and not waiting:
                    report(f"{len(routing.chains)} chains serve")
                    return routing
                last = f"{len(waiting)} targets do not serve yet" if routing.chains else "no chains have been made yet"
            except Fs3Error as e:
                last = e.message
            if time.monotonic() > deadline:
                raise error(Code.CODE_TIMEOUT, f"after {timeout_s:g} s {last} (logs: {self.directory}/*/log)")
            time.sleep(0.05)

    def down(self, report: Report = _quiet) -> None:
        """Stop every service in good order. Harmless when nothing runs."""
        with self._lock():
            self._stop(report)

    def _stop(self, report: Report) -> None:
        for wave in (["meta"], ["storage"], ["mgmtd"]):
            chosen = [(s, p) for s in self.services() if s.kind in wave and (p := s.process())]
            for _, process in chosen:
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)
            for service, process in chosen:
                graceful = process.stop(timeout_s=STOP_TIMEOUT_S)
                report(f"{service.name} is down" + ("" if graceful else " (killed: it did not end by itself)"))
                service.pid_file.unlink(missing_ok=True)

    # ---- one service, for tests and operators

    def start(self, name: str) -> None:
        """Start one service and wait until it is ready."""
        service = self.service(name)
        if service.process():
            raise error(Code.CODE_EXISTS, f"{name} runs already")
        self._spawn(service)
        self._wait_ready(service)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one service; SIGKILL and SIGTERM wait for its end."""
        process = self.service(name).process()
        if process is None:
            raise error(Code.CODE_NOT_FOUND, f"{name} does not run")
        process.signal(number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            process.wait(timeout_s=STOP_TIMEOUT_S)

    def print_logs(self, out: TextIO, *, lines: int = 30) -> None:
        """The end of every service's log."""
        for service in self.services():
            if service.log.exists():
                tail = service.log.read_text(errors="replace").splitlines()[-lines:]
                print(f"--- {service.name}", *tail, sep="\n", file=out)

    def pids(self, kind: str = "") -> list[int]:
        """Of the running services, of one kind ("storage", "meta", "mgmtd") if it is given."""
        services = [service for service in self.services() if kind in ("", service.kind)]
        return [process.pid for service in services if (process := service.process())]


def unserving(routing: Routing) -> list[int]:
    """Ids of the targets that are members of a chain and do not serve."""
    return [
        target.target_id
        for chain in routing.chains
        for target in chain.targets
        if target.state != PublicState.PUBLIC_STATE_SERVING
    ]
