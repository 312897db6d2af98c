"""Serving a mount: in the foreground, or in a daemon that gets its parameters as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fs3.core.config import RdmaOptions
from fs3.core.errors import Fs3Error, error
from fs3.core.process import start_ticks
from fs3.fuse.handover import Door, Predecessor
from fs3.fuse.metrics import serve_metrics
from fs3.fuse.options import MountOptions, parse_address, parse_id_map
from fs3.fuse.table import Daemon, default_file, digest, run_directory
from fs3.v1.frame_pb2 import Code


@dataclass(frozen=True)
class Parameters:
    """Everything the daemon needs to know. The mountpoint is absolute and resolved."""

    metas: list[str]
    source: str
    """The URL as it was given: what the mount table shows."""
    mountpoint: str
    pid_file: str
    log_file: str
    token: str = field(default="", repr=False)
    takeover: bool = False
    """Go on with the mount that another daemon serves."""
    options: MountOptions = field(default_factory=MountOptions)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps({**asdict(self), "options": asdict(self.options)})

    def shown(self) -> dict[str, Any]:
        """How it is mounted, for people and programs that ask; without the token."""
        kept = {"source": self.source, "metas": self.metas, "mountpoint": self.mountpoint, "pid": os.getpid()}
        return {**kept, **asdict(self.options), "pid_file": self.pid_file, "log_file": self.log_file}

    @classmethod
    def from_json(cls, text: str) -> Parameters:
        """The reverse of :meth:`to_json`."""
        data = json.loads(text)
        options = {**data["options"], "rdma": RdmaOptions(**data["options"]["rdma"])}
        return cls(**{**data, "options": MountOptions(**options)})


def door_file(mountpoint: str) -> Path:
    """Where a daemon listens for a successor. The name is short: those of sockets have to be."""
    return run_directory() / f"mount-{digest(mountpoint)}.sock"


def _begin(parameters: Parameters) -> Any:
    """Mount, or go on with a mount, and serve in the background; returns the native handle."""
    if not parameters.takeover:
        return _start(parameters)
    with Predecessor(door_file(parameters.mountpoint)) as predecessor:
        return _start(parameters, predecessor)


def _start(parameters: Parameters, predecessor: Predecessor | None = None) -> Any:
    """Mount and serve in the background; returns what ends it, a native handle or one that is like it."""
    from fs3 import native

    options = parameters.options
    with contextlib.suppress(RuntimeError):  # in the foreground the program may have set them already
        native.init_logging({"warning": "warn"}.get(options.log_level, options.log_level))
    with contextlib.suppress(RuntimeError):
        native.set_runtime_threads(max(2, min(8, os.cpu_count() or 2)))
    if options.engine == "fusepy":
        from fs3.fuse.python_engine import PythonMount

        return PythonMount(parameters.metas, parameters.token, parameters.mountpoint, parameters.source, options)
    return native.Mount(
        metas=parameters.metas,
        token=parameters.token,
        cluster_id=options.cluster_id or None,
        mountpoint=parameters.mountpoint,
        allow_other=options.allow_other,
        default_permissions=options.default_permissions,
        read_only=options.read_only,
        suid=options.suid,
        dev=options.dev,
        threads=options.threads,
        max_memory_bytes=options.max_memory_bytes,
        attr_timeout_s=options.attr_timeout_s,
        entry_timeout_s=options.entry_timeout_s,
        readahead_bytes=options.readahead_bytes,
        local_locks=options.local_locks,
        noatime=options.noatime,
        op_timeout_s=options.op_timeout_s,
        transport=options.transport,
        rdma=options.rdma,
        shared_memory=options.shared_memory,
        exec=options.exec,
        cache=options.cache,
        subdir=os.fsencode(options.subdir),
        uid=options.uid,
        gid=options.gid,
        uidmap=parse_id_map(options.uidmap),
        gidmap=parse_id_map(options.gidmap),
        source=parameters.source,
        config=json.dumps(parameters.shown(), indent=2) + "\n",
        predecessor=predecessor,
    )


class _Counters:
    """Where a mount serves its counters, if anywhere. A successor takes the place over."""

    def __init__(self, address: str, stats: Callable[[], str]) -> None:
        self._address = address
        self._stats = stats
        self._close: Callable[[], None] | None = None

    def open(self) -> None:
        """Serve them. Raises BUSY when the address is taken."""
        if not self._address:
            return
        try:
            self._close = serve_metrics(parse_address(self._address), self._stats)
        except OSError as e:
            message = f"counters cannot be served at {self._address}: {e.strerror or e}"
            raise error(Code.CODE_BUSY, message) from e

    def close(self) -> None:
        """Serve them no more."""
        if self._close is not None:
            self._close()
            self._close = None


def notify(state: str) -> None:
    """Tell the service manager that started this process, if one asked for it (the protocol of sd_notify)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def announce(parameters: Parameters) -> None:
    """Say that the mount can be used: a line on standard output, and READY=1 to a service manager."""
    print(f"{parameters.source} is mounted on {parameters.mountpoint}", flush=True)
    notify("READY=1")


def _note_daemon(pid_file: Path, log_file: str) -> None:
    try:
        Daemon(os.getpid(), start_ticks(os.getpid()) or 0, log_file).save(pid_file)
    except OSError as e:
        raise error(Code.CODE_ACCESS, f"the pid file {pid_file} cannot be written: {e.strerror}") from e


def _open_door(parameters: Parameters, mount: Any, counters: _Counters) -> Door:
    where = door_file(parameters.mountpoint)
    try:
        return Door(where, parameters.to_json, mount, counters)
    except OSError as e:
        raise error(Code.CODE_ACCESS, f"the socket {where} cannot be made: {e.strerror or e}") from e


def serve(parameters: Parameters, ready: Callable[[], None]) -> int:
    """Mount, call `ready`, and return an exit status when the mount has ended.

    SIGTERM and SIGINT write everything and unmount. Must run in the main thread. Raises Fs3Error when mounting fails.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def note(what: bytes) -> None:
        with contextlib.suppress(OSError):
            os.write(write_end, what)

    previous = {n: signal.signal(n, lambda *_: note(b"s")) for n in (signal.SIGTERM, signal.SIGINT)}
    # The default place too, so that `umount` finds the process without being told where its pid file is.
    pid_files = {Path(parameters.pid_file), default_file(parameters.mountpoint, ".pid")}
    failures: list[Fs3Error | OSError] = []
    ending = contextlib.ExitStack()
    try:
        mount = _begin(parameters)
        counters = _Counters(parameters.options.metrics, lambda: str(mount.stats()))
        ending.callback(counters.close)
        try:
            for pid_file in pid_files:
                _note_daemon(pid_file, parameters.log_file)
            if parameters.options.engine == "native":
                ending.callback(_open_door(parameters, mount, counters).close)
            counters.open()
        except Fs3Error as e:
            if not parameters.takeover:
                mount.unmount()
                raise
            # Programs have files open on it: it is better served without these.
            print(f"fs3 mount: {e.message}", file=sys.stderr, flush=True)

        def watch() -> None:
            try:
                mount.wait()
            except OSError as e:
                failures.append(e)
            note(b"e")

        watcher = threading.Thread(target=watch, name="fs3-mount-watch", daemon=True)
        watcher.start()
        ready()
        if os.read(read_end, 1) == b"s":
            notify("STOPPING=1")
            mount.unmount()
        watcher.join(timeout=60)
    finally:
        ending.close()
        for pid_file in pid_files:
            daemon = Daemon.load(pid_file)
            # A successor has put its own there.
            if daemon is None or daemon.pid == os.getpid():
                with contextlib.suppress(OSError):
                    pid_file.unlink(missing_ok=True)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(read_end)
        os.close(write_end)
    if failures:
        print(f"fs3 mount: {failures[0]}", file=sys.stderr, flush=True)
        return 1
    return 0


def main(argv: list[str]) -> int:
    """Entry of the daemon: parameters on stdin, the outcome on the descriptor that the first argument names."""
    report = os.fdopen(int(argv[0]), "w")
    os.chdir("/")
    parameters = Parameters.from_json(sys.stdin.readline())
    # Each piece of memory and each process that announced it has a descriptor, and one more while it is handed over.
    _, descriptors_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors_max, descriptors_max))
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text("fs3 mount")

    def tell(outcome: dict[str, object]) -> None:
        if not report.closed:
            with contextlib.suppress(OSError):
                report.write(json.dumps(outcome) + "\n")
                report.close()

    try:
        return serve(parameters, lambda: tell({"ok": True}))
    except Fs3Error as e:
        print(f"fs3 mount: {e.message}", file=sys.stderr, flush=True)
        tell({"code": e.code, "message": e.message})
        return 1
    except ImportError as e:
        tell({"code": Code.CODE_UNAVAILABLE, "message": f"the native module is missing ({e}); build it: make build"})
        return 1
    except OSError as e:
        print(f"fs3 mount: {e}", file=sys.stderr, flush=True)
        tell({"code": Code.CODE_UNAVAILABLE, "message": str(e)})
        return 1
