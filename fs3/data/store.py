"""Where shards lie: on a cluster, through the native client, or in a local (or mounted) directory."""

from __future__ import annotations

import fnmatch
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

import fs3
from fs3 import native
from fs3.client import FileSystem
from fs3.client.finish import name_paths
from fs3.client.url import parse_url
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

SCHEME = "fs3://"
# Files that are kept open for reading; the one used longest ago makes room.
OPEN_FILES_MAX = 1024
# Those of a local store count against the process' limit of descriptors.
LOCAL_FILES_MAX = 128

H = TypeVar("H")
Read = tuple[str, int, memoryview]
# A row for each: the number of its file, first byte, place in the memory, length; the part that has a checksum, from
# the first byte on, and its length (0: none has), the CRC-32C. Places rise and do not overlap.
Spans = NDArray[np.uint64]


@dataclass(frozen=True)
class Status:
    """What is known of a file without reading it."""

    bytes: int
    mtime_ns: int


class Output(Protocol):
    """A file that is being written."""

    def pwrite(self, data: Any, offset: int, /) -> int:
        """Write all of `data` at byte `offset`."""

    def sync(self) -> None:
        """Make what was written survive power loss."""

    def close(self) -> None:
        """Close it."""


class Store(Protocol):
    """What datasets and writers need of a file system. Thread-safe; works after a fork; can be pickled."""

    def read(self, ranges: Sequence[Read]) -> list[int]:
        """Fill (path, offset, memory) each, all at once; the counts, short at the end of a file.

        Raises the first error.
        """

    def read_spans(self, paths: Sequence[str], spans: Spans, memory: NDArray[np.uint8]) -> list[int | None]:
        """Fill memory with spans of files, all at once.

        Returns the counts, short at the end of a file, and None where the bytes are not what their checksum says.
        Raises the first error.
        """

    def statuses(self, paths: Sequence[str]) -> list[Status | None]:
        """Of many files at once, None where nothing is. Raises the first other error."""

    def is_directory(self, path: str) -> bool:
        """Whether a directory is there."""

    def names(self, directory: str) -> list[str]:
        """What is in a directory, sorted."""

    def walk(self, directory: str) -> Iterator[tuple[str, Status]]:
        """Every regular file below a directory, links to files followed, in the order of the names."""

    def create(self, path: str) -> Output:
        """A new file. Raises FileExistsError."""

    def rename(self, source: str, destination: str) -> None:
        """Atomically; what was there is replaced."""

    def remove(self, path: str) -> None:
        """Remove a file."""

    def makedirs(self, directory: str) -> None:
        """Make a directory and those above unless they are there."""

    def close(self) -> None:
        """Let go of open files, and of the connection if it was made here."""


class Handles(OrderedDict[str, H]):
    """Open files by path, those used last at the end. The owner has a lock."""

    def __init__(self, most: int, close: Callable[[H], None] | None = None) -> None:
        super().__init__()
        self._most = most
        self._close = close

    def trim(self) -> None:
        """Let go of those used longest ago, beyond the limit."""
        while len(self) > self._most:
            _, handle = self.popitem(last=False)
            if self._close:
                self._close(handle)


class ClusterStore:
    """A cluster. Reads of one call go out together, batched by storage node, straight into the caller's memory."""

    def __init__(self, fs: FileSystem, *, owned: bool = False, open_files_max: int = OPEN_FILES_MAX) -> None:
        self.fs = fs
        self._owned = owned
        self._open_files_max = open_files_max
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.fs, self._owned, self._open_files_max)

    def _forget(self) -> None:
        self._turn = threading.Lock()
        self._pid = os.getpid()
        # A file that is dropped is closed: open for reading only, it has no session.
        self._handles: Handles[native.File] = Handles(self._open_files_max)

    def read(self, ranges: Sequence[Read]) -> list[int]:
        """Fill (path, offset, memory) each, in one submission."""
        files = self._files(path for path, _, _ in ranges)
        counts = self.fs.client.read_many([(files[path], offset, memory) for path, offset, memory in ranges]).wait()
        for (path, _, _), count in zip(ranges, counts, strict=True):
            if isinstance(count, OSError):
                self._drop(path)
                name_paths(count, path)
                raise count
        return counts  # type: ignore[return-value]

    def read_spans(self, paths: Sequence[str], spans: Spans, memory: NDArray[np.uint8]) -> list[int | None]:
        """Fill memory with spans of files, in one submission."""
        files = self._files(paths)
        counts = self.fs.client.read_spans([files[path] for path in paths], spans, memory).wait()  # type: ignore[arg-type]
        for number, count in enumerate(counts):
            if isinstance(count, OSError):
                path = paths[int(spans[number, 0])]
                self._drop(path)
                name_paths(count, path)
                raise count
        return counts  # type: ignore[return-value]

    def _files(self, paths: Iterable[str]) -> dict[str, native.File]:
        """The open files of this process, those that are missing opened together."""
        if self._pid != os.getpid():
            # The parent's files are of no use in a forked child, nor is a lock that some other thread held.
            self._forget()
        wanted = dict.fromkeys(paths)
        with self._turn:
            found = {path: self._handles[path] for path in wanted if path in self._handles}
            for path in found:
                self._handles.move_to_end(path)
        missing = [path for path in wanted if path not in found]
        if missing:
            opened = self.fs.client.open_many([self.fs._connection.path(path) for path in missing]).wait()
            for path, file in zip(missing, opened, strict=True):
                if isinstance(file, OSError):
                    name_paths(file, path)
                    raise file
                found[path] = file
            with self._turn:
                self._handles.update((path, found[path]) for path in missing)
                self._handles.trim()
        return found

    def _drop(self, path: str) -> None:
        """Open it anew next time: it may have been replaced."""
        with self._turn:
            self._handles.pop(path, None)

    def statuses(self, paths: Sequence[str]) -> list[Status | None]:
        """Of many files, in few round trips."""
        found: list[Status | None] = []
        for result in self.fs.stat_many(paths):
            if isinstance(result, FileNotFoundError):
                found.append(None)
            elif isinstance(result, OSError):
                raise result
            else:
                found.append(Status(result.st_size, result.st_mtime_ns))
        return found

    def is_directory(self, path: str) -> bool:
        """Whether a directory is there."""
        return self.fs.isdir(path)

    def names(self, directory: str) -> list[str]:
        """What is in a directory."""
        return sorted(self.fs.listdir(directory))

    def walk(self, directory: str) -> Iterator[tuple[str, Status]]:
        """Every regular file below a directory."""
        for entry in sorted(self.fs.scandir(directory), key=lambda e: e.name):
            path = join(directory, entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from self.walk(path)
            elif entry.is_file():
                st = entry.stat()
                yield path, Status(st.st_size, st.st_mtime_ns)

    def create(self, path: str) -> Output:
        """A new file."""
        return self.fs.open(path, "xb", buffering=0)

    def rename(self, source: str, destination: str) -> None:
        """Atomically."""
        self.fs.replace(source, destination)
        self._drop(destination)

    def remove(self, path: str) -> None:
        """Remove a file."""
        self.fs.remove(path)

    def makedirs(self, directory: str) -> None:
        """Make a directory."""
        self.fs.makedirs(directory, exist_ok=True)

    def close(self) -> None:
        """Let go of open files, and of the connection if it was made here."""
        with self._turn:
            self._handles.clear()
        if self._owned:
            self.fs.close()


def _unpickle(fs: FileSystem, owned: bool, open_files_max: int) -> ClusterStore:
    return ClusterStore(fs, owned=owned, open_files_max=open_files_max)


class LocalOutput:
    """A local file that is being written."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def pwrite(self, data: Any, offset: int, /) -> int:
        """Write all of `data` at byte `offset`."""
        view, count = memoryview(data).cast("B"), 0
        while count < len(view):
            count += os.pwrite(self._descriptor, view[count:], offset + count)
        return count

    def sync(self) -> None:
        """Make what was written survive power loss."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class LocalStore:
    """The local file system, for comparing and for mounts: one `preadv` after the other."""

    def __init__(self, *, open_files_max: int = LOCAL_FILES_MAX) -> None:
        self._open_files_max = open_files_max
        self._turn = threading.Lock()
        self._pid = os.getpid()
        self._handles: Handles[int] = Handles(open_files_max, os.close)

    def __reduce__(self) -> tuple[Any, ...]:
        return _local, (self._open_files_max,)

    def read(self, ranges: Sequence[Read]) -> list[int]:
        """Fill (path, offset, memory) each."""
        if self._pid != os.getpid():
            # Some thread of the parent may have held the lock when this process was forked.
            self._turn, self._pid = threading.Lock(), os.getpid()
        return [self._read(*one) for one in ranges]

    def read_spans(self, paths: Sequence[str], spans: Spans, memory: NDArray[np.uint8]) -> list[int | None]:
        """Fill memory with spans of files, one after the other."""
        view, counts = memoryview(memory), []  # type: ignore[arg-type]
        reads = [(paths[number], at, view[place : place + size]) for number, at, place, size, *_ in spans.tolist()]
        for (_, _, part), count, (*_, skip, summed, crc) in zip(reads, self.read(reads), spans.tolist(), strict=True):
            whole = summed and skip + summed <= count
            counts.append(None if whole and native.crc32c(part[skip : skip + summed]) != crc else count)
        return counts

    def _read(self, path: str, offset: int, memory: memoryview) -> int:
        with self._turn:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._handles.trim()
            self._handles.move_to_end(path)
            # One of its own: another thread may close the first at any time.
            descriptor = os.dup(self._handles[path])
        try:
            count = 0
            while count < len(memory) and (got := os.preadv(descriptor, [memory[count:]], offset + count)):
                count += got
        finally:
            os.close(descriptor)
        return count

    def statuses(self, paths: Sequence[str]) -> list[Status | None]:
        """Of many files."""
        found: list[Status | None] = []
        for path in paths:
            try:
                st = os.stat(path)
            except FileNotFoundError:
                found.append(None)
            else:
                found.append(Status(st.st_size, st.st_mtime_ns))
        return found

    def is_directory(self, path: str) -> bool:
        """Whether a directory is there."""
        return os.path.isdir(path)

    def names(self, directory: str) -> list[str]:
        """What is in a directory."""
        return sorted(os.listdir(directory))

    def walk(self, directory: str) -> Iterator[tuple[str, Status]]:
        """Every regular file below a directory."""
        with os.scandir(directory) as scan:
            entries = sorted(scan, key=lambda e: e.name)
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from self.walk(entry.path)
            elif entry.is_file():
                st = entry.stat()
                yield entry.path, Status(st.st_size, st.st_mtime_ns)

    def create(self, path: str) -> Output:
        """A new file."""
        return LocalOutput(path)

    def rename(self, source: str, destination: str) -> None:
        """Atomically; the name survives power loss."""
        os.replace(source, destination)
        with self._turn:
            if destination in self._handles:
                os.close(self._handles.pop(destination))
        descriptor = os.open(os.path.dirname(destination) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, path: str) -> None:
        """Remove a file."""
        os.remove(path)

    def makedirs(self, directory: str) -> None:
        """Make a directory."""
        os.makedirs(directory or ".", exist_ok=True)

    def close(self) -> None:
        """Close open files."""
        with self._turn:
            while self._handles:
                os.close(self._handles.popitem()[1])


def _local(open_files_max: int) -> LocalStore:
    return LocalStore(open_files_max=open_files_max)


Source = str | os.PathLike[str]


def locate(
    sources: Source | Sequence[Source], fs: FileSystem | None = None, token: str | None = None
) -> tuple[Store, list[str]]:
    """The store of `sources` and the paths on it: on `fs` if given, else URLs of one cluster, or local paths.

    Raises INVALID_ARGUMENT when there is none, or they do not lie in one place.
    """
    given = [os.fspath(s) for s in ([sources] if isinstance(sources, str | os.PathLike) else sources)]
    if not given:
        raise error(Code.CODE_INVALID_ARGUMENT, "no path is given")
    if fs is not None:
        return ClusterStore(fs), given
    remote = [path.startswith(SCHEME) for path in given]
    if not any(remote):
        return LocalStore(), given
    urls = [parse_url(path) for path in given] if all(remote) else []
    if len({(url.metas, url.token_file) for url in urls}) != 1:
        raise error(Code.CODE_INVALID_ARGUMENT, "all paths must be local, or URLs of the same cluster")
    root = replace(urls[0], base="")
    return ClusterStore(fs3.connect(root.complete(), token), owned=True), [f"/{url.base}" for url in urls]


def expand(store: Store, paths: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """Shards: files as they are given, those of a directory with one of `suffixes`, patterns of the last name.

    Raises NOT_FOUND when a directory or a pattern has none.
    """
    found: list[str] = []
    for path in paths:
        if not is_pattern(path) and store.is_directory(path):
            shards = [join(path, n) for n in store.names(path) if n.endswith(suffixes) and not n.startswith(".")]
            if not shards:
                raise error(Code.CODE_NOT_FOUND, f"{path} has no shard ({', '.join(suffixes)})")
            found += shards
        else:
            found += matching(store, path)
    return found


def is_pattern(path: str) -> bool:
    """Whether the last name is a pattern, of ``*``, ``?`` and ``[``."""
    return any(mark in split(path)[1] for mark in "*?[")


def matching(store: Store, path: str) -> list[str]:
    """What a pattern of the last name matches, or the path itself. Raises NOT_FOUND when nothing matches."""
    if not is_pattern(path):
        return [path]
    directory, name = split(path)
    found = [join(directory, n) for n in store.names(directory) if fnmatch.fnmatchcase(n, name)]
    if not found:
        raise error(Code.CODE_NOT_FOUND, f"nothing matches {path}")
    return found


def present(store: Store, paths: Sequence[str]) -> list[Status]:
    """Of files that must be there. Raises FileNotFoundError for the first that is not."""
    found = []
    for path, status in zip(paths, store.statuses(paths), strict=True):
        if status is None:
            missing = error(Code.CODE_NOT_FOUND, "it does not exist")
            name_paths(missing, path)
            raise missing
        found.append(status)
    return found


def split(path: str) -> tuple[str, str]:
    """The directory, and the name in it."""
    directory, slash, name = path.rstrip("/").rpartition("/")
    return directory or slash or ".", name


def join(directory: str, name: str) -> str:
    """`directory`/`name`."""
    return name if directory == "." else f"{directory.rstrip('/')}/{name}"


@contextmanager
def published(store: Store, path: str, *, sync: bool = True) -> Iterator[Output]:
    """A new file that appears under `path`, replacing what was there, when the block ends, and only then."""
    directory, name = split(path)
    hidden = join(directory, temporary(name))
    output = store.create(hidden)
    try:
        try:
            yield output
            if sync:
                output.sync()
        finally:
            output.close()
        store.rename(hidden, path)
    except BaseException:
        with suppress(OSError):
            store.remove(hidden)
        raise


def temporary(name: str) -> str:
    """A hidden name beside `name` that nobody else draws."""
    return f".{name}.{uuid.uuid4().hex[:12]}.tmp"


def read_whole(store: Store, pieces: Sequence[tuple[str, int, int]]) -> list[memoryview]:
    """Ranges (path, offset, length) in memory of their own, in one submission. Raises when a file is shorter."""
    views = [memoryview(bytearray(length)) for _, _, length in pieces]
    counts = store.read([(path, offset, view) for (path, offset, _), view in zip(pieces, views, strict=True)])
    for (path, offset, length), count in zip(pieces, counts, strict=True):
        if count < length:
            raise short(path, offset + length)
    return views


def short(path: str, needed: int) -> OSError:
    """The error of a file that ends too early."""
    why = f"the file ends before byte {needed}: it is cut, or the index is not its own"
    wrong = error(Code.CODE_CHECKSUM_MISMATCH, why)
    name_paths(wrong, path)
    return wrong
