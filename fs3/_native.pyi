"""Types of the native module (Rust crate ``fs3-py``); ``tests/unit/client/test_native_stub.py`` holds it to the binary.

Calls that may wait return an :class:`Operation`: ``op.wait()`` blocks (the interpreter is released, signal handlers run
within 100 ms), ``await op`` does so in asyncio. Errors are those of :mod:`fs3.core.errors`. Everything is thread-safe.
Objects made before a fork raise RuntimeError in the child.
"""

import builtins
from collections.abc import Generator, Sequence
from os import PathLike
from typing import Any, Generic, TypeVar, final

from typing_extensions import Buffer

from fs3.core.config import RdmaOptions

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

__version__: str

@final
class Operation(Generic[T_co]):
    def wait(self) -> T_co: ...
    def __await__(self) -> Generator[Any, None, T_co]: ...

@final
class Layout:
    @property
    def table_id(self) -> int: ...
    @property
    def table_version(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def stripe(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def stripe_first(self) -> int: ...
    @property
    def stripe_max(self) -> int: ...

@final
class Attr:
    @property
    def inode(self) -> int: ...
    @property
    def type(self) -> int: ...
    @property
    def mode(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def nlink(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def atime_ns(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def ctime_ns(self) -> int: ...
    @property
    def layout(self) -> Layout | None: ...
    @property
    def symlink_target(self) -> bytes: ...
    @property
    def rdev(self) -> int: ...
    @property
    def truncate_version(self) -> int: ...
    @property
    def parent(self) -> int: ...

@final
class DirEntry:
    @property
    def name(self) -> bytes: ...
    @property
    def inode(self) -> int: ...
    @property
    def type(self) -> int: ...
    @property
    def attr(self) -> Attr | None: ...

@final
class Statfs:
    @property
    def capacity_bytes(self) -> int: ...
    @property
    def free_bytes(self) -> int: ...
    @property
    def inodes(self) -> int: ...
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def name_bytes_max(self) -> int: ...
    @property
    def free_inodes(self) -> int | None: ...

@final
class Chunk:
    @property
    def chunk_id(self) -> bytes: ...
    @property
    def committed_version(self) -> int: ...
    @property
    def pending_version(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def chunk_crc32c(self) -> int: ...

@final
class Replica:
    @property
    def chain_id(self) -> int: ...
    @property
    def target_id(self) -> int: ...
    @property
    def state(self) -> int: ...
    @property
    def chunks(self) -> list[Chunk]: ...

@final
class File:
    @property
    def inode(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def created(self) -> bool: ...
    @property
    def writable(self) -> bool: ...
    def attr(self) -> Attr: ...
    def pread_into(self, buffer: Buffer, offset: int) -> Operation[int]: ...
    def pwrite(self, buffer: Buffer, offset: int) -> Operation[int]: ...
    def append(self, buffer: Buffer) -> Operation[int]: ...
    def sync(self) -> Operation[Attr]: ...
    def publish(self) -> Operation[Attr]: ...
    def punch(self, offset: int, length: int) -> Operation[None]: ...
    def seek_sparse(self, offset: int, hole: bool) -> Operation[int | None]: ...
    def truncate(self, length: int) -> Operation[Attr]: ...
    def refresh(self) -> Operation[Attr]: ...
    def close(self) -> Operation[Attr]: ...

@final
class Client:
    @staticmethod
    def connect(
        metas: Sequence[str],
        token: str,
        *,
        cluster_id: str | None = None,
        uid: int = 0,
        gid: int = 0,
        groups: Sequence[int] = ...,
        op_timeout_s: float = 30.0,
        read_attempt_timeout_s: float = 5.0,
        meta_attempt_timeout_s: float = 10.0,
        read_bytes_in_flight: int = ...,
        write_bytes_in_flight: int = ...,
        write_channels: int = 64,
        connections_per_peer: int = 2,
        transport: str = "auto",
        rdma: RdmaOptions | None = None,
        noatime: bool = ...,
        description: str = ...,
    ) -> Operation[Client]: ...
    @property
    def client_id(self) -> bytes: ...
    @property
    def cluster_id(self) -> str: ...
    @property
    def routing_version(self) -> int: ...
    def routing(self) -> bytes: ...
    def refresh_routing(self) -> Operation[int]: ...
    def stats(self) -> dict[str, int]: ...
    def close(self) -> Operation[None]: ...
    def stat(self, path: bytes, *, inode: int = 1, follow: bool = True) -> Operation[Attr]: ...
    def batch_stat(
        self, paths: Sequence[bytes], *, inode: int = 1, follow: bool = True
    ) -> Operation[builtins.list[Attr | OSError]]: ...
    def list(self, path: bytes, *, inode: int = 1, with_attr: bool = False) -> Operation[builtins.list[DirEntry]]: ...
    def create(
        self,
        path: bytes,
        *,
        inode: int = 1,
        mode: int = 0o644,
        umask: int = 0,
        exclusive: bool = False,
        truncate: bool = False,
        read: bool = True,
        write: bool = True,
        chunk_bytes: int = 0,
        follow: bool = True,
    ) -> Operation[File]: ...
    def open(
        self,
        path: bytes,
        *,
        inode: int = 1,
        read: bool = True,
        write: bool = False,
        truncate: bool = False,
        follow: bool = True,
    ) -> Operation[File]: ...
    def mknod(
        self, path: bytes, *, inode: int = 1, mode: int = 0o644, kind: int = 1, rdev: int = 0
    ) -> Operation[Attr]: ...
    def mkdir(
        self,
        path: bytes,
        *,
        inode: int = 1,
        mode: int = 0o755,
        umask: int = 0,
        parents: bool = False,
        chunk_bytes: int = 0,
    ) -> Operation[Attr]: ...
    def symlink(self, path: bytes, target: bytes, *, inode: int = 1) -> Operation[Attr]: ...
    def link(self, source: bytes, destination: bytes, *, inode: int = 1, follow: bool = False) -> Operation[Attr]: ...
    def unlink(self, path: bytes, *, inode: int = 1) -> Operation[Attr]: ...
    def rmdir(self, path: bytes, *, inode: int = 1) -> Operation[None]: ...
    def remove_all(self, path: bytes, *, inode: int = 1, skip_trash: bool = False) -> Operation[None]: ...
    def rename(
        self,
        source: bytes,
        destination: bytes,
        *,
        inode: int = 1,
        no_replace: bool = False,
        exchange: bool = False,
    ) -> Operation[None]: ...
    def setattr(
        self,
        path: bytes,
        *,
        inode: int = 1,
        follow: bool = True,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        atime_now: bool = False,
        mtime_now: bool = False,
        chunk_bytes: int | None = None,
        stripe: int | None = None,
    ) -> Operation[Attr]: ...
    def meta_call(self, method: int, request: bytes, with_op: bool) -> Operation[bytes]: ...
    def getxattr(self, path: bytes, name: bytes, *, inode: int = 1, follow: bool = True) -> Operation[bytes]: ...
    def listxattr(self, path: bytes, *, inode: int = 1, follow: bool = True) -> Operation[builtins.list[bytes]]: ...
    def setxattr(
        self, path: bytes, name: bytes, value: Buffer, flags: int = 0, *, inode: int = 1, follow: bool = True
    ) -> Operation[Attr]: ...
    def removexattr(self, path: bytes, name: bytes, *, inode: int = 1, follow: bool = True) -> Operation[Attr]: ...
    def truncate(self, path: bytes, length: int, *, inode: int = 1) -> Operation[Attr]: ...
    def statfs(self, path: bytes = ..., *, inode: int = 1) -> Operation[Statfs]: ...
    def read_many(self, ops: Sequence[tuple[File, int, Buffer]]) -> Operation[builtins.list[int | OSError]]: ...
    def write_many(self, ops: Sequence[tuple[File, int, Buffer]]) -> Operation[builtins.list[int | OSError]]: ...
    def list_replicas(self) -> Operation[builtins.list[Replica]]: ...

@final
class RegisteredMemory:
    def __new__(cls, buffer: Buffer, *, dmabuf: int | None = None, dmabuf_offset: int = 0) -> RegisteredMemory: ...
    def release(self) -> None: ...

class Mount:
    def __new__(
        cls,
        *,
        metas: Sequence[str],
        mountpoint: str | PathLike[str],
        token: str = "",
        cluster_id: str | None = None,
        allow_other: bool = False,
        default_permissions: bool = True,
        read_only: bool = False,
        suid: bool = False,
        dev: bool = False,
        threads: int = 0,
        max_memory_bytes: int = ...,
        attr_timeout_s: float = 1.0,
        entry_timeout_s: float = 1.0,
        readahead_bytes: int = ...,
        local_locks: bool = ...,
        noatime: bool = ...,
        op_timeout_s: float = 30.0,
        transport: str = "auto",
        rdma: RdmaOptions | None = None,
    ) -> Mount: ...
    def wait(self, timeout_s: float | None = None) -> bool: ...
    def unmount(self) -> None: ...

def crc32c(data: Buffer) -> int: ...
def crc_blocks(data: Buffer) -> bytes: ...
def init_logging(level: str) -> None: ...
def set_log_level(level: str) -> None: ...
def set_runtime_threads(count: int) -> None: ...

# (bytes, operations, seconds, cpu_seconds, p50_us)
def bench_memory_copy(total_bytes: int) -> tuple[int, int, float, float, float]: ...
def bench_checksum(total_bytes: int) -> tuple[int, int, float, float, float]: ...
def bench_tcp_stream(streams: int, total_bytes: int) -> tuple[int, int, float, float, float]: ...
def bench_tcp_ping_pong(in_flight: int, operations: int) -> tuple[int, int, float, float, float]: ...
def bench_disk(
    directory: str | PathLike[str], depth: int, total_bytes: int, write: bool
) -> tuple[int, int, float, float, float]: ...
def bench_bare_chain(
    directory: str | PathLike[str], connections: int, nodes: int, total_bytes: int
) -> tuple[int, int, float, float, float]: ...

# the device here, and (name, bytes/s, operations/s, median in us, p99 in us) of each measurement
def bench_rdma(
    addr: str, seconds: float, size_bytes: int, rdma: RdmaOptions | None = None
) -> Operation[tuple[str, list[tuple[str, float, float, float, float]]]]: ...

@final
class RdmaBenchServer:
    def __new__(cls, host: str, port: int, rdma: RdmaOptions | None = None) -> RdmaBenchServer: ...
    @property
    def port(self) -> int: ...

@final
class StorageEngine:
    """The engine of one storage process; see :class:`fs3.storage.engine.StorageEngine`."""

    def __new__(cls, config_json: str) -> StorageEngine: ...
    def start(self) -> int: ...
    def apply_routing(self, routing: bytes) -> None: ...
    def renew_lease(self, serve_until_monotonic_ns: int) -> None: ...
    def status(self) -> bytes: ...
    def stop(self) -> None: ...

class SimWorld:
    """Storage nodes, clients, network and disks in virtual time, all of it owned by `seed`.

    The storage services and the clients are the real ones. The driver plays the control plane: it starts the engines,
    hands them routing and leases, publishes the routing for the clients and lets time go on. Times are virtual
    nanoseconds since the world began, which is also the engines' monotonic clock. `options_json` fixes options that
    otherwise follow from the seed (see native/crates/fs3-sim/src/options.rs). Not to be used by two threads at a time.
    Raises ValueError for options that are wrong.
    """

    def __new__(cls, seed: int, options_json: str = "") -> SimWorld: ...
    def options_json(self) -> str:
        """All options, those that followed from the seed included."""

    def now_ns(self) -> int: ...
    def run_until(self, time_ns: int) -> None:
        """Let everything happen up to `time_ns`."""

    def engine(self, node: int, config_json: str = "") -> SimEngine:
        """The engine of node 0, 1, ...; with the configuration of `fs3.storage.engine.engine_config` it can be started.

        Its disks are those that the routing names: the configuration's are not looked at.
        """

    def events(self) -> list[tuple[int, str, int]]:
        """What happened to storage nodes since the last call: (time, "started"|"crashed"|"paused"|"resumed", node).

        At time 0 every node is started. A started node has a new process without an engine.
        """

    def delays(self, sender: str, receiver: str) -> list[int]:
        """How a control message fares now: delays in ns of the copies that arrive. Parties: "node0", "mgmtd0", ..."""

    def publish_routing(self, routing: bytes) -> None:
        """Let the clients learn a serialized fs3.v1.Routing; one that is older than known is ignored."""

    def set_load(self, on: bool) -> None:
        """Let clients work, or only end what they have begun."""

    def heal(self) -> None:
        """No faults from now on; every node gets a new process ("crashed", then "started")."""

    def quiescent(self) -> bool:
        """Whether every client operation has ended."""

    def violation(self) -> str:
        """The first violated property so far, in words; empty: none."""

    def check(self) -> str:
        """After `heal`, without load, once all targets serve: check everything; as `violation`. Takes virtual time.

        Leases must last for 300 virtual seconds: the world runs without its driver meanwhile.
        """

    def trace_hash(self) -> int:
        """Hash of everything that happened; the same for two runs of a seed under the same driver."""

    def trace(self) -> list[str]:
        """The last troubles and operations, for a report."""

    def statistics(self) -> dict[str, int]:
        """Faults by kind, operations, virtual seconds."""

class SimEngine:
    """The engine of a simulated node, with the methods of :class:`StorageEngine`. They raise while the node is down."""

    def start(self) -> int: ...
    def apply_routing(self, routing: bytes) -> None: ...
    def renew_lease(self, serve_until_monotonic_ns: int) -> None: ...
    def status(self) -> bytes: ...
    def stop(self) -> None: ...
