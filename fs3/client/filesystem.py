"""The synchronous file system: the functions of :mod:`os`, :mod:`shutil` and :func:`open` on a cluster."""

from __future__ import annotations

import io
import os
import stat as stat_module
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any, Literal, overload

from fs3 import native
from fs3.client.batch import Batch
from fs3.client.buffers import Readable, Writable
from fs3.client.calls import (
    checked_counts,
    link_target,
    native_reads,
    native_writes,
    open_operation,
    stat_results,
    time_changes,
)
from fs3.client.connection import Connection, connect_options
from fs3.client.file import RawFile, check_arguments, parse_mode, wrap
from fs3.client.finish import finish
from fs3.client.paths import StrPath, join
from fs3.client.records import DirEntry, stat_result, statvfs_result
from fs3.client.scan import Scan
from fs3.client.trash import Trash

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed import (
        OpenBinaryModeReading,
        OpenBinaryModeUpdating,
        OpenBinaryModeWriting,
        OpenTextMode,
        ReadableBuffer,
    )

BinaryFile = RawFile | io.BufferedReader | io.BufferedWriter | io.BufferedRandom


def connect(url: str | None = None, token: str | None = None, **options: Any) -> FileSystem:
    """Connect to a cluster.

    `url` is ``fs3://host:port[,host:port][/base][?token_file=...]`` with addresses of meta services, default: that of
    FS3_URL; paths start at `base`. The token comes from the argument, the URL's token_file, FS3_TOKEN, or the file
    FS3_TOKEN_FILE. Options: ``cluster_id`` (refuse any other), ``uid``, ``gid``, ``groups``, ``umask`` (default: this
    process'), ``timeout_s`` (30; how long one operation may take in all), ``transport`` ("auto": storage by RDMA where
    both ends have it, "tcp", "rdma"), ``rdma`` (an :class:`fs3.RdmaOptions`: how RDMA is used),
    ``shared_memory`` (True: data from and to storage services on this host goes through memory shared with them),
    ``noatime`` (reading never changes access times), ``description``, and the limits of ``native.Client.connect``.

    Raises Denied for a bad token, INVALID_ARGUMENT for a bad URL, UNAVAILABLE or TimedOut when no meta service answers.
    """
    made = connect_options(url, token, **options)
    return FileSystem(Connection(made, made.start().wait()))


def _unpickle(url: str, token: str | None, options: dict[str, Any]) -> FileSystem:
    return FileSystem(Connection(connect_options(url, token, **options)))


class FileSystem:
    """A cluster as a file system. Thread-safe; also a context manager that closes it.

    Paths are str, bytes or path-like, from the URL's base directory, with or without a leading slash. Errors are
    OSErrors of :mod:`fs3.core.errors` (FileNotFoundError, PermissionError, ...). Metadata operations are linearizable;
    what one client wrote to a file, another sees after the first closed (or synced) it and the other opened it. After
    a fork the child connects anew by itself; files that were open in the parent cannot be used there.

    Can be pickled, as the arguments it was connected with: a copy connects by itself at its first call. A token that
    was an argument is in the pickle; one that was found in a file or the environment is looked for again.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __enter__(self) -> FileSystem:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, self._connection.options.given

    def __repr__(self) -> str:
        return f"FileSystem({self.url!r})"

    def close(self) -> None:
        """End the connections. Files that are still open fail afterwards: close them first."""
        client = self._connection.release()
        if client is not None:
            client.close().wait()

    @property
    def client(self) -> native.Client:
        """The native client of this process."""
        return self._connection.client()

    @property
    def url(self) -> str:
        """The URL it was connected with, without the token's file."""
        return str(self._connection.options.url)

    @property
    def cluster_id(self) -> str:
        """The cluster's id."""
        return self.client.cluster_id

    def stats(self) -> dict[str, int]:
        """What this client met: checksum failures, reads moved to another replica, writes sent again.

        With RDMA also what moved by each device, as ``rdma.DEVICE.COUNTER`` (docs/rdma.md), for all clients of this
        process with the same transport together.
        """
        return self.client.stats()

    def list_replicas(self) -> list[native.Replica]:
        """What every target of every chain holds, for comparing replicas. Large."""
        return self.client.list_replicas().wait()

    @property
    def trash(self) -> Trash:
        """What was removed from directories with trash."""
        return Trash(self._connection)

    # ---- files

    @overload
    def open(  # type: ignore[overload-overlap]
        self, path: StrPath, mode: str = ..., *, buffering: Literal[0], permissions: int = ..., chunk_bytes: int = ...
    ) -> RawFile: ...
    @overload
    def open(  # type: ignore[overload-overlap]
        self, path: StrPath, mode: str, buffering: Literal[0], *, permissions: int = ..., chunk_bytes: int = ...
    ) -> RawFile: ...
    @overload
    def open(
        self,
        path: StrPath,
        mode: OpenTextMode = ...,
        buffering: int = ...,
        encoding: str | None = ...,
        errors: str | None = ...,
        newline: str | None = ...,
        *,
        permissions: int = ...,
        chunk_bytes: int = ...,
    ) -> io.TextIOWrapper: ...
    @overload
    def open(
        self,
        path: StrPath,
        mode: OpenBinaryModeUpdating,
        buffering: int = ...,
        *,
        permissions: int = ...,
        chunk_bytes: int = ...,
    ) -> io.BufferedRandom: ...
    @overload
    def open(
        self,
        path: StrPath,
        mode: OpenBinaryModeWriting,
        buffering: int = ...,
        *,
        permissions: int = ...,
        chunk_bytes: int = ...,
    ) -> io.BufferedWriter: ...
    @overload
    def open(
        self,
        path: StrPath,
        mode: OpenBinaryModeReading,
        buffering: int = ...,
        *,
        permissions: int = ...,
        chunk_bytes: int = ...,
    ) -> io.BufferedReader: ...
    @overload
    def open(
        self,
        path: StrPath,
        mode: str,
        buffering: int = ...,
        encoding: str | None = ...,
        errors: str | None = ...,
        newline: str | None = ...,
        *,
        permissions: int = ...,
        chunk_bytes: int = ...,
    ) -> IO[Any]: ...

    def open(
        self,
        path: StrPath,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *,
        permissions: int = 0o666,
        chunk_bytes: int = 0,
    ) -> Any:
        """Open a file as :func:`open` does; the result is of the same classes around a :class:`RawFile`.

        ``buffering=0`` gives the RawFile itself, which moves bytes straight between the cluster and the caller's
        memory; otherwise the buffer has 1 MiB unless `buffering` says how many bytes. For a new file: `permissions`
        before umask, and `chunk_bytes`, a power of two from 64 KiB to 64 MiB (0: what the directory says).
        """
        parsed = parse_mode(mode)
        check_arguments(parsed, buffering, encoding, errors, newline)
        file = finish(open_operation(self._connection, path, parsed, permissions, chunk_bytes), path)
        raw = RawFile(self.client, file, os.fsdecode(path), parsed)
        return wrap(raw, parsed, buffering, encoding, errors, newline)

    def read_into(self, path: StrPath, buffer: Writable, offset: int = 0) -> int:
        """Open a file, fill `buffer` from byte `offset`, close it; the count, short only at the end of the file."""
        with self.open(path, "rb", buffering=0) as file:
            return file.pread_into(buffer, offset)

    def read_many(self, reads: Iterable[tuple[BinaryFile, int, Writable]], *, return_errors: bool = False) -> list[int]:
        """Read many ranges in one go, batched by node: (file, offset in bytes, writable contiguous buffer) each.

        Returns the counts in the order given, each short only at the end of its file. The first error is raised after
        all reads have ended; with `return_errors` errors stand in the list instead. Buffers must not overlap, are
        pinned until the call returns, and are undefined beyond the count.
        """
        ranges = list(reads)
        return checked_counts(ranges, self.client.read_many(native_reads(ranges)).wait(), return_errors)

    def read_batch(
        self,
        ranges: Iterable[tuple[BinaryFile | StrPath, int, int | None]],
        out: Writable | None = None,
        *,
        return_errors: bool = False,
    ) -> list[memoryview]:
        """Read ranges of many files in one go, batched by node: (open file or path, offset, length in bytes) each.

        A length of None reads to the end of the file. Every path is opened once, and closed again. Returns views of
        what was read, in the order given, each short only at the end of its file. They lie one after the other in
        `out`, any contiguous writable buffer, where each takes its length whether or not the file has it, so that
        places are known beforehand; without `out`, in memory of their own. The first error is raised; with
        `return_errors` errors stand in the list instead. Raises ValueError when `out` is too small.
        """
        batch = Batch(ranges)
        paths = [self._connection.path(path) for path in batch.paths]
        opened = self.client.open_many(paths).wait() if paths else []
        counts = self.client.read_many(batch.reads(opened, out, return_errors)).wait()
        return batch.results(counts, return_errors)

    def write_many(
        self, writes: Iterable[tuple[BinaryFile, int, Readable]], *, return_errors: bool = False
    ) -> list[int]:
        """Write many ranges in one go: (file, offset in bytes, contiguous buffer) each, all on their way together.

        Returns the counts in the order given after every serving replica has every byte; power loss needs a sync.
        Writes to the same bytes may be applied in any order. Errors and buffers as in :meth:`read_many`; what failed
        may have been applied in part.
        """
        ranges = list(writes)
        return checked_counts(ranges, self.client.write_many(native_writes(ranges)).wait(), return_errors)

    # ---- attributes

    def stat(self, path: StrPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """Attributes, like :func:`os.stat`."""
        return stat_result(finish(self.client.stat(self._connection.path(path), follow=follow_symlinks), path))

    def lstat(self, path: StrPath) -> os.stat_result:
        """Attributes, of a symlink itself if it is one."""
        return self.stat(path, follow_symlinks=False)

    def stat_many(self, paths: Sequence[StrPath], *, follow_symlinks: bool = True) -> list[os.stat_result | OSError]:
        """Attributes of many paths in few round trips, in the order given; where it failed, the error."""
        wanted = [self._connection.path(path) for path in paths]
        found = self.client.batch_stat(wanted, follow=follow_symlinks).wait()
        return stat_results(paths, found)

    def exists(self, path: StrPath) -> bool:
        """Whether something is there; a dangling symlink is nothing."""
        return self._mode(path, True) is not None

    def lexists(self, path: StrPath) -> bool:
        """Whether a name is there, a dangling symlink included."""
        return self._mode(path, False) is not None

    def isdir(self, path: StrPath) -> bool:
        """Whether it is a directory, or a symlink to one."""
        mode = self._mode(path, True)
        return mode is not None and stat_module.S_ISDIR(mode)

    def isfile(self, path: StrPath) -> bool:
        """Whether it is a regular file, or a symlink to one."""
        mode = self._mode(path, True)
        return mode is not None and stat_module.S_ISREG(mode)

    def islink(self, path: StrPath) -> bool:
        """Whether it is a symlink."""
        mode = self._mode(path, False)
        return mode is not None and stat_module.S_ISLNK(mode)

    def _mode(self, path: StrPath, follow: bool) -> int | None:
        """File type and permissions; None where nothing is."""
        try:
            return self.stat(path, follow_symlinks=follow).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None

    def chmod(self, path: StrPath, mode: int, *, follow_symlinks: bool = True) -> None:
        """Set permission and set-id bits."""
        where = self._connection.path(path)
        finish(self.client.setattr(where, follow=follow_symlinks, mode=mode & 0o7777), path)

    def chown(self, path: StrPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """Set owner and group; -1 leaves one as it is."""
        where = self._connection.path(path)
        owner, group = (None if number == -1 else number for number in (uid, gid))
        finish(self.client.setattr(where, follow=follow_symlinks, uid=owner, gid=group), path)

    def utime(
        self,
        path: StrPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        """Set times of access and modification: seconds or nanoseconds since 1970; neither: the service's now."""
        changes = time_changes(times, ns)
        finish(self.client.setattr(self._connection.path(path), follow=follow_symlinks, **changes), path)

    def truncate(self, path: StrPath, length: int) -> None:
        """Cut or extend (with zeros) a file to `length` bytes."""
        finish(self.client.truncate(self._connection.path(path), length), path)

    def getxattr(self, path: StrPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """The value of an extended attribute, like :func:`os.getxattr`. Raises OSError ENODATA when there is none."""
        where, name = self._connection.path(path), os.fsencode(attribute)
        return finish(self.client.getxattr(where, name, follow=follow_symlinks), path)

    def setxattr(
        self,
        path: StrPath,
        attribute: str | bytes,
        value: ReadableBuffer,
        flags: int = 0,
        *,
        follow_symlinks: bool = True,
    ) -> None:
        """Set an extended attribute (``user.``, as root also ``trusted.`` and ``security.``), like :func:`os.setxattr`.

        `value` has at most 64 KiB; `flags`: ``os.XATTR_CREATE`` or ``os.XATTR_REPLACE``.
        """
        where, name = self._connection.path(path), os.fsencode(attribute)
        finish(self.client.setxattr(where, name, bytes(value), flags, follow=follow_symlinks), path)

    def listxattr(self, path: StrPath = "/", *, follow_symlinks: bool = True) -> list[str]:
        """The names of the extended attributes, sorted by their bytes, like :func:`os.listxattr`."""
        names = finish(self.client.listxattr(self._connection.path(path), follow=follow_symlinks), path)
        return [os.fsdecode(name) for name in names]

    def removexattr(self, path: StrPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> None:
        """Remove an extended attribute, like :func:`os.removexattr`. Raises OSError ENODATA when there is none."""
        where, name = self._connection.path(path), os.fsencode(attribute)
        finish(self.client.removexattr(where, name, follow=follow_symlinks), path)

    def statvfs(self, path: StrPath = "/") -> os.statvfs_result:
        """Capacity and use, counted as a user does (raw capacity / replicas)."""
        return statvfs_result(finish(self.client.statfs(self._connection.path(path)), path))

    # ---- directories

    def listdir(self, path: StrPath = "/") -> list[str]:
        """The names in a directory, sorted by their bytes."""
        return [os.fsdecode(entry.name) for entry in finish(self.client.list(self._connection.path(path)), path)]

    def scandir(self, path: StrPath = "/") -> Scan:
        """The entries of a directory with their attributes, in few round trips. Also a context manager."""
        entries = finish(self.client.list(self._connection.path(path), with_attr=True), path)
        directory = os.fsdecode(path)
        return Scan(DirEntry(directory, entry, self._stat_entry) for entry in entries)

    def _stat_entry(self, path: str, follow: bool) -> os.stat_result:
        return self.stat(path, follow_symlinks=follow)

    def walk(
        self,
        top: StrPath = "/",
        *,
        topdown: bool = True,
        onerror: Callable[[OSError], object] | None = None,
        followlinks: bool = False,
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """Directories below `top` with the names in them, like :func:`os.walk`."""
        directory = os.fsdecode(top)
        try:
            entries = list(self.scandir(directory))
        except OSError as e:
            if onerror is not None:
                onerror(e)
            return
        directories = [e.name for e in entries if e.is_dir()]
        links = {e.name for e in entries if e.is_symlink()}
        files = [e.name for e in entries if not e.is_dir()]
        if topdown:
            yield directory, directories, files
        for name in directories:
            if followlinks or name not in links:
                yield from self.walk(join(directory, name), topdown=topdown, onerror=onerror, followlinks=followlinks)
        if not topdown:
            yield directory, directories, files

    def mkdir(self, path: StrPath, mode: int = 0o777, *, chunk_bytes: int = 0) -> None:
        """Make a directory. `mode` before umask; `chunk_bytes`: what new files in it get (0: as its parent)."""
        where = self._connection.path(path)
        finish(
            self.client.mkdir(where, mode=mode & 0o7777, umask=self._connection.umask, chunk_bytes=chunk_bytes), path
        )

    def layout(self, path: StrPath) -> native.Layout | None:
        """How a file lies on the chains, or what a directory passes on to new files (0: the cluster's default)."""
        return finish(self.client.stat(self._connection.path(path)), path).layout

    def set_layout(self, path: StrPath, *, chunk_bytes: int | None = None, stripe: int | None = None) -> None:
        """Set what files made in a directory from now on, and its new subdirectories, get; None leaves it as it is.

        `chunk_bytes`: a power of two from 64 KiB to 64 MiB. `stripe`: the number of chains that a file lies on. 0: the
        cluster's default. Files that are there keep theirs.
        """
        finish(self.client.setattr(self._connection.path(path), chunk_bytes=chunk_bytes, stripe=stripe), path)

    def makedirs(self, path: StrPath, mode: int = 0o777, exist_ok: bool = False) -> None:
        """Make a directory and those above it that are missing. An existing one is an error unless `exist_ok`."""
        if not exist_ok and self.lexists(path):
            # Lets the service say it in its own words.
            self.mkdir(path, mode)
            return
        where = self._connection.path(path)
        finish(self.client.mkdir(where, mode=mode & 0o7777, umask=self._connection.umask, parents=True), path)

    # ---- names

    def remove(self, path: StrPath) -> None:
        """Remove a name that is not a directory. An open file lives on until it is closed."""
        finish(self.client.unlink(self._connection.path(path)), path)

    unlink = remove

    def rmdir(self, path: StrPath) -> None:
        """Remove an empty directory."""
        finish(self.client.rmdir(self._connection.path(path)), path)

    def rmtree(self, path: StrPath, ignore_errors: bool = False, *, skip_trash: bool = False) -> None:
        """Remove a directory and everything below it in one atomic step.

        `skip_trash`: for good, also where directories keep what is removed from them.
        """
        where = self._connection.path(path)
        try:
            finish(self.client.remove_all(where, skip_trash=skip_trash), path)
        except OSError:
            if not ignore_errors:
                raise

    def rename(self, source: StrPath, destination: StrPath) -> None:
        """Give a file or directory another name. Raises FileExistsError when that is taken; see :meth:`replace`."""
        self._rename(source, destination, no_replace=True)

    def replace(self, source: StrPath, destination: StrPath) -> None:
        """Give a file or directory another name, atomically taking it from what has it now, like :func:`os.replace`."""
        self._rename(source, destination)

    def exchange(self, first: StrPath, second: StrPath) -> None:
        """Swap two names atomically."""
        self._rename(first, second, exchange=True)

    def _rename(
        self, source: StrPath, destination: StrPath, *, no_replace: bool = False, exchange: bool = False
    ) -> None:
        paths = (self._connection.path(source), self._connection.path(destination))
        finish(self.client.rename(*paths, no_replace=no_replace, exchange=exchange), source, destination)

    def link(self, source: StrPath, destination: StrPath, *, follow_symlinks: bool = False) -> None:
        """Make `destination` another name of the file `source`."""
        paths = (self._connection.path(source), self._connection.path(destination))
        finish(self.client.link(*paths, follow=follow_symlinks), source, destination)

    def symlink(self, target: StrPath, path: StrPath) -> None:
        """Make `path` a symlink to `target`, which is stored as it is written."""
        finish(self.client.symlink(self._connection.path(path), os.fsencode(target)), target, path)

    def readlink(self, path: StrPath) -> str:
        """Where a symlink points. Raises INVALID_ARGUMENT for anything else."""
        attr = finish(self.client.stat(self._connection.path(path), follow=False), path)
        return link_target(attr, path)
