"""A native client in memory, for what Python does on top of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fs3.client.connection import Connection, ConnectOptions
from fs3.client.url import ClusterUrl
from fs3.core.config import RdmaOptions
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileType

T = TypeVar("T")


class Done(Generic[T]):
    """An operation that is done when it is asked for."""

    def __init__(self, value: T) -> None:
        self.value = value

    def wait(self) -> T:
        return self.value


@dataclass
class FakeNode:
    type: int
    mode: int = 0o755
    data: bytearray = field(default_factory=bytearray)
    symlink_target: bytes = b""
    inode: int = 0
    uid: int = 0
    gid: int = 0
    nlink: int = 1
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    rdev: int = 0
    layout: None = None

    @property
    def length(self) -> int:
        return len(self.data)


@dataclass
class FakeFile:
    """An open file. Counts what was asked of it."""

    node: FakeNode
    closed: int = 0
    synced: int = 0
    fail_with: OSError | None = None

    @property
    def length(self) -> int:
        return len(self.node.data)

    @property
    def inode(self) -> int:
        return self.node.inode

    def pread_into(self, buffer: Any, offset: int) -> Done[int]:
        if self.fail_with is not None:
            raise self.fail_with
        view = memoryview(buffer).cast("B")
        piece = self.node.data[offset : offset + len(view)]
        view[: len(piece)] = piece
        return Done(len(piece))

    def pwrite(self, data: Any, offset: int) -> Done[int]:
        if self.fail_with is not None:
            raise self.fail_with
        view = memoryview(data).cast("B")
        end = offset + len(view)
        self.node.data.extend(bytes(max(0, end - len(self.node.data))))
        self.node.data[offset:end] = view
        return Done(len(view))

    def append(self, data: Any) -> Done[int]:
        self.pwrite(data, self.length)
        return Done(self.length)

    def truncate(self, length: int) -> Done[FakeNode]:
        del self.node.data[length:]
        self.node.data.extend(bytes(length - len(self.node.data)))
        return Done(self.node)

    def sync(self) -> Done[FakeNode]:
        self.synced += 1
        return Done(self.node)

    publish = sync

    def refresh(self) -> Done[FakeNode]:
        return Done(self.node)

    def close(self) -> Done[FakeNode]:
        self.closed += 1
        return Done(self.node)


@dataclass
class FakeEntry:
    name: bytes
    inode: int
    type: int
    attr: FakeNode


class FakeClient:
    """Enough of ``native.Client``: a flat table of paths, no symlinks followed except in the last place."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, FakeNode] = {b"": FakeNode(FileType.FILE_TYPE_DIRECTORY)}
        self.files: list[FakeFile] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.closed = False
        self._turn = threading.Lock()

    def _node(self, path: bytes, follow: bool = True) -> FakeNode:
        node = self.nodes.get(path)
        if node is not None and follow and node.type == FileType.FILE_TYPE_SYMLINK:
            node = self.nodes.get(node.symlink_target.strip(b"/"))
        if node is None:
            raise error(Code.CODE_NOT_FOUND, f"{path!r} does not exist")
        return node

    def _make(self, path: bytes, kind: int, **values: Any) -> FakeNode:
        with self._turn:
            if path in self.nodes:
                raise error(Code.CODE_EXISTS, f"{path!r} exists")
            node = self.nodes[path] = FakeNode(kind, inode=len(self.nodes) + 1, **values)
        return node

    def stat(self, path: bytes, *, inode: int = 1, follow: bool = True) -> Done[FakeNode]:
        return Done(self._node(path, follow))

    def batch_stat(self, paths: list[bytes], *, inode: int = 1, follow: bool = True) -> Done[list[Any]]:
        def one(path: bytes) -> Any:
            try:
                return self._node(path, follow)
            except OSError as e:
                return e

        return Done([one(path) for path in paths])

    def list(self, path: bytes, *, inode: int = 1, with_attr: bool = False) -> Done[list[FakeEntry]]:
        self._node(path)
        prefix = path + b"/" if path else b""
        names = sorted(p for p in self.nodes if p.startswith(prefix) and p != path and b"/" not in p[len(prefix) :])
        return Done([FakeEntry(p[len(prefix) :], 1, self.nodes[p].type, self.nodes[p]) for p in names])

    def create(self, path: bytes, **options: Any) -> Done[FakeFile]:
        self.calls.append(("create", options))
        if path not in self.nodes or options["exclusive"]:
            self._make(path, FileType.FILE_TYPE_FILE, mode=options["mode"] & ~options["umask"])
        return self._open(self._node(path), options["truncate"])

    def open(self, path: bytes, **options: Any) -> Done[FakeFile]:
        self.calls.append(("open", options))
        return self._open(self._node(path), False)

    def _open(self, node: FakeNode, truncate: bool) -> Done[FakeFile]:
        if node.type == FileType.FILE_TYPE_DIRECTORY:
            raise error(Code.CODE_IS_DIRECTORY, "it is a directory")
        if truncate:
            node.data.clear()
        file = FakeFile(node)
        self.files.append(file)
        return Done(file)

    def mkdir(
        self, path: bytes, *, mode: int, umask: int, parents: bool = False, chunk_bytes: int = 0
    ) -> Done[FakeNode]:
        mode &= ~umask
        if parents:
            for end in [i for i, byte in enumerate(path) if byte == ord("/")]:
                self.nodes.setdefault(path[:end], FakeNode(FileType.FILE_TYPE_DIRECTORY))
            return Done(self.nodes.setdefault(path, FakeNode(FileType.FILE_TYPE_DIRECTORY, mode)))
        return Done(self._make(path, FileType.FILE_TYPE_DIRECTORY, mode=mode))

    def symlink(self, path: bytes, target: bytes) -> Done[FakeNode]:
        return Done(self._make(path, FileType.FILE_TYPE_SYMLINK, symlink_target=target))

    def unlink(self, path: bytes) -> Done[FakeNode]:
        node = self._node(path, False)
        del self.nodes[path]
        return Done(node)

    def rename(self, source: bytes, destination: bytes, **flags: bool) -> Done[None]:
        self.calls.append(("rename", flags))
        return Done(None)

    def setattr(self, path: bytes, **changes: Any) -> Done[FakeNode]:
        self.calls.append(("setattr", changes))
        node = self._node(path, changes.pop("follow"))
        for name, value in changes.items():
            if hasattr(node, name) and value is not None:
                setattr(node, name, value)
        return Done(node)

    def close(self) -> Done[None]:
        self.closed = True
        return Done(None)


def connection(client: FakeClient, *, base: str = "", umask: int = 0o022) -> Connection:
    """A connection whose client is the fake."""
    options = ConnectOptions(
        url=ClusterUrl(("h:1",), base),
        token="",
        cluster_id=None,
        uid=0,
        gid=0,
        groups=(),
        umask=umask,
        timeout_s=1.0,
        description="",
        rdma=RdmaOptions(),
        limits={},
    )
    return Connection(options, client)  # type: ignore[arg-type]
