"""The file system for asyncio: the same names and contracts as :class:`FileSystem`, as coroutines."""

from __future__ import annotations

import os
import stat as stat_module
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fs3 import native
from fs3.client.batch import Batch
from fs3.client.buffers import Readable, Writable, exported
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
from fs3.client.file import Mode, parse_mode, total, vectors
from fs3.client.finish import finished
from fs3.client.paths import StrPath, join
from fs3.client.records import DirEntry, stat_result, statvfs_result

if TYPE_CHECKING:
    from types import TracebackType

    from _typeshed import ReadableBuffer


async def connect_async(url: str | None = None, token: str | None = None, **options: Any) -> AsyncFileSystem:
    """Connect to a cluster; arguments and errors as for :func:`connect`."""
    made = connect_options(url, token, **options)
    return AsyncFileSystem(Connection(made, await made.start()))


def _unpickle(url: str, token: str | None, options: dict[str, Any]) -> AsyncFileSystem:
    return AsyncFileSystem(Connection(connect_options(url, token, **options)))


class AsyncFile:
    """An open file; see :class:`RawFile` for the contracts. An async context manager that closes it.

    Calls may overlap. Cancelling one gives up on its result: a write may or may not take place, and the buffer stays
    pinned until nothing uses it.
    """

    def __init__(self, client: native.Client, file: native.File, name: str, mode: Mode) -> None:
        self._client = client
        self._file = file
        self.name = name
        self.mode = str(mode)
        self.closed = False

    async def __aenter__(self) -> AsyncFile:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<fs3.AsyncFile name={self.name!r} mode={self.mode!r}{' closed' if self.closed else ''}>"

    @property
    def native(self) -> native.File:
        """The file of the native client. Raises ValueError when closed."""
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return self._file

    @property
    def length(self) -> int:
        """The length in bytes as this client knows it."""
        return self.native.length

    async def pread_into(self, buffer: Writable, offset: int) -> int:
        """Fill a contiguous writable buffer from byte `offset`; the count, short only at the end of the file."""
        return await finished(self.native.pread_into(exported(buffer), offset), self.name)

    async def preadv(self, buffers: Iterable[Writable], offset: int) -> int:
        """Fill buffers one after the other from byte `offset`, all at once; the count in all."""
        counts = await self._client.read_many(vectors(self.native, buffers, offset))
        return total(counts, self.name)

    async def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from byte `offset`, fewer only at the end of the file."""
        file = self.native
        buffer = bytearray(max(0, min(length, file.length - offset)))
        count = await finished(file.pread_into(buffer, offset), self.name) if buffer else 0
        return bytes(memoryview(buffer)[:count])

    async def read(self) -> bytes:
        """The whole file."""
        return await self.pread(self.length, 0)

    async def pwrite(self, data: Readable, offset: int) -> int:
        """Write all of a contiguous buffer at byte `offset`; returns after every serving replica has it."""
        return await finished(self.native.pwrite(exported(data), offset), self.name)

    async def pwritev(self, buffers: Iterable[Readable], offset: int) -> int:
        """Write buffers one after the other from byte `offset`, all at once; the count in all."""
        counts = await self._client.write_many(vectors(self.native, buffers, offset))
        return total(counts, self.name)

    async def append(self, data: Readable) -> int:
        """Write all of a contiguous buffer at the end of the file; returns where it ends.

        Appends never overlap, through whichever files and clients. Those of one client keep their order.
        """
        return await finished(self.native.append(exported(data)), self.name)

    async def punch(self, offset: int, length: int) -> None:
        """Make a hole, as far as the file goes: it reads as zeros, and whole blocks give their disk space back."""
        await finished(self.native.punch(offset, length), self.name)

    async def truncate(self, size: int) -> None:
        """Cut or extend (with zeros) to `size` bytes."""
        await finished(self.native.truncate(size), self.name)

    async def sync(self) -> None:
        """Make acknowledged writes survive power loss of all nodes, and publish length and time of modification."""
        await finished(self.native.sync(), self.name)

    async def publish(self) -> None:
        """Make the length known to other clients, as closing does, without a disk sync."""
        await finished(self.native.publish(), self.name)

    async def stat(self) -> os.stat_result:
        """Attributes from the service, merged with this client's writes."""
        return stat_result(await finished(self.native.refresh(), self.name))

    async def close(self) -> None:
        """Publish length and time of modification and end the session. Closing again does nothing."""
        if not self.closed:
            self.closed = True
            await finished(self._file.close(), self.name)


class AsyncFileSystem:
    """A cluster as a file system for asyncio. An async context manager that closes it.

    Paths, errors, consistency, forks and pickling as :class:`FileSystem`. May be used from several event loops. The
    first call of a copy, or in a forked child, connects, and keeps the event loop waiting for that.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def __aenter__(self) -> AsyncFileSystem:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, self._connection.options.given

    def __repr__(self) -> str:
        return f"AsyncFileSystem({self.url!r})"

    async def close(self) -> None:
        """End the connections. Files that are still open fail afterwards: close them first."""
        client = self._connection.release()
        if client is not None:
            await client.close()

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
        """What this client met: checksum failures, reads moved to another replica, writes sent again."""
        return self.client.stats()

    # ---- files

    async def open(
        self, path: StrPath, mode: str = "rb", *, permissions: int = 0o666, chunk_bytes: int = 0
    ) -> AsyncFile:
        """Open a file in a binary mode of :func:`open` except append; always unbuffered."""
        parsed = parse_mode(mode)
        if not parsed.binary or parsed.action == "a":
            raise ValueError(f"invalid mode: {mode!r}; files are opened in rb, wb, xb, with + or without")
        file = await finished(open_operation(self._connection, path, parsed, permissions, chunk_bytes), path)
        return AsyncFile(self.client, file, os.fsdecode(path), parsed)

    async def read_into(self, path: StrPath, buffer: Writable, offset: int = 0) -> int:
        """Open a file, fill `buffer` from byte `offset`, close it; the count, short only at the end of the file."""
        async with await self.open(path) as file:
            return await file.pread_into(buffer, offset)

    async def read_many(
        self, reads: Iterable[tuple[AsyncFile, int, Writable]], *, return_errors: bool = False
    ) -> list[int]:
        """Read many ranges in one go; see :meth:`FileSystem.read_many`."""
        ranges = list(reads)
        return checked_counts(ranges, await self.client.read_many(native_reads(ranges)), return_errors)

    async def read_batch(
        self,
        ranges: Iterable[tuple[AsyncFile | StrPath, int, int | None]],
        out: Writable | None = None,
        *,
        return_errors: bool = False,
    ) -> list[memoryview]:
        """Read ranges of many files in one go; see :meth:`FileSystem.read_batch`."""
        batch = Batch(ranges)
        paths = [self._connection.path(path) for path in batch.paths]
        opened = await self.client.open_many(paths) if paths else []
        counts = await self.client.read_many(batch.reads(opened, out, return_errors))
        return batch.results(counts, return_errors)

    async def write_many(
        self, writes: Iterable[tuple[AsyncFile, int, Readable]], *, return_errors: bool = False
    ) -> list[int]:
        """Write many ranges in one go; see :meth:`FileSystem.write_many`."""
        ranges = list(writes)
        return checked_counts(ranges, await self.client.write_many(native_writes(ranges)), return_errors)

    # ---- attributes

    async def stat(self, path: StrPath, *, follow_symlinks: bool = True) -> os.stat_result:
        """Attributes, like :func:`os.stat`."""
        return stat_result(await finished(self.client.stat(self._connection.path(path), follow=follow_symlinks), path))

    async def lstat(self, path: StrPath) -> os.stat_result:
        """Attributes, of a symlink itself if it is one."""
        return await self.stat(path, follow_symlinks=False)

    async def stat_many(
        self, paths: Sequence[StrPath], *, follow_symlinks: bool = True
    ) -> list[os.stat_result | OSError]:
        """Attributes of many paths in few round trips, in the order given; where it failed, the error."""
        wanted = [self._connection.path(path) for path in paths]
        found = await self.client.batch_stat(wanted, follow=follow_symlinks)
        return stat_results(paths, found)

    async def exists(self, path: StrPath) -> bool:
        """Whether something is there; a dangling symlink is nothing."""
        return await self._mode(path, True) is not None

    async def lexists(self, path: StrPath) -> bool:
        """Whether a name is there, a dangling symlink included."""
        return await self._mode(path, False) is not None

    async def isdir(self, path: StrPath) -> bool:
        """Whether it is a directory, or a symlink to one."""
        mode = await self._mode(path, True)
        return mode is not None and stat_module.S_ISDIR(mode)

    async def isfile(self, path: StrPath) -> bool:
        """Whether it is a regular file, or a symlink to one."""
        mode = await self._mode(path, True)
        return mode is not None and stat_module.S_ISREG(mode)

    async def islink(self, path: StrPath) -> bool:
        """Whether it is a symlink."""
        mode = await self._mode(path, False)
        return mode is not None and stat_module.S_ISLNK(mode)

    async def _mode(self, path: StrPath, follow: bool) -> int | None:
        try:
            return (await self.stat(path, follow_symlinks=follow)).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None

    async def chmod(self, path: StrPath, mode: int, *, follow_symlinks: bool = True) -> None:
        """Set permission and set-id bits."""
        await finished(
            self.client.setattr(self._connection.path(path), follow=follow_symlinks, mode=mode & 0o7777), path
        )

    async def chown(self, path: StrPath, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        """Set owner and group; -1 leaves one as it is."""
        owner, group = (None if number == -1 else number for number in (uid, gid))
        await finished(
            self.client.setattr(self._connection.path(path), follow=follow_symlinks, uid=owner, gid=group), path
        )

    async def utime(
        self,
        path: StrPath,
        times: tuple[float, float] | None = None,
        *,
        ns: tuple[int, int] | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        """Set times of access and modification: seconds or nanoseconds since 1970; neither: the service's now."""
        changes = time_changes(times, ns)
        await finished(self.client.setattr(self._connection.path(path), follow=follow_symlinks, **changes), path)

    async def truncate(self, path: StrPath, length: int) -> None:
        """Cut or extend (with zeros) a file to `length` bytes."""
        await finished(self.client.truncate(self._connection.path(path), length), path)

    async def getxattr(self, path: StrPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> bytes:
        """The value of an extended attribute. Raises OSError ENODATA when there is none."""
        where, name = self._connection.path(path), os.fsencode(attribute)
        return await finished(self.client.getxattr(where, name, follow=follow_symlinks), path)

    async def setxattr(
        self,
        path: StrPath,
        attribute: str | bytes,
        value: ReadableBuffer,
        flags: int = 0,
        *,
        follow_symlinks: bool = True,
    ) -> None:
        """Set an extended attribute; see :meth:`FileSystem.setxattr`."""
        where, name = self._connection.path(path), os.fsencode(attribute)
        await finished(self.client.setxattr(where, name, bytes(value), flags, follow=follow_symlinks), path)

    async def listxattr(self, path: StrPath = "/", *, follow_symlinks: bool = True) -> list[str]:
        """The names of the extended attributes, sorted by their bytes."""
        names = await finished(self.client.listxattr(self._connection.path(path), follow=follow_symlinks), path)
        return [os.fsdecode(name) for name in names]

    async def removexattr(self, path: StrPath, attribute: str | bytes, *, follow_symlinks: bool = True) -> None:
        """Remove an extended attribute. Raises OSError ENODATA when there is none."""
        where, name = self._connection.path(path), os.fsencode(attribute)
        await finished(self.client.removexattr(where, name, follow=follow_symlinks), path)

    async def statvfs(self, path: StrPath = "/") -> os.statvfs_result:
        """Capacity and use, counted as a user does (raw capacity / replicas)."""
        return statvfs_result(await finished(self.client.statfs(self._connection.path(path)), path))

    # ---- directories

    async def listdir(self, path: StrPath = "/") -> list[str]:
        """The names in a directory, sorted by their bytes."""
        return [os.fsdecode(e.name) for e in await finished(self.client.list(self._connection.path(path)), path)]

    async def scandir(self, path: StrPath = "/") -> list[DirEntry]:
        """The entries of a directory with their attributes, in few round trips.

        They answer from the listing: what a symlink points to is asked with :meth:`stat`.
        """
        entries = await finished(self.client.list(self._connection.path(path), with_attr=True), path)
        return [DirEntry(os.fsdecode(path), entry, None) for entry in entries]

    async def walk(self, top: StrPath = "/") -> AsyncIterator[tuple[str, list[str], list[str]]]:
        """Directories below `top` with the names in them, from the top down, symlinks not followed."""
        pending = [os.fsdecode(top)]
        while pending:
            directory = pending.pop()
            entries = await self.scandir(directory)
            directories = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
            yield directory, directories, [e.name for e in entries if not e.is_dir(follow_symlinks=False)]
            pending += [join(directory, name) for name in reversed(directories)]

    async def mkdir(self, path: StrPath, mode: int = 0o777, *, chunk_bytes: int = 0) -> None:
        """Make a directory. `mode` before umask; `chunk_bytes`: what new files in it get (0: as its parent)."""
        where = self._connection.path(path)
        await finished(
            self.client.mkdir(where, mode=mode & 0o7777, umask=self._connection.umask, chunk_bytes=chunk_bytes), path
        )

    async def layout(self, path: StrPath) -> native.Layout | None:
        """How a file lies on the chains, or what a directory passes on to new files (0: the cluster's default)."""
        return (await finished(self.client.stat(self._connection.path(path)), path)).layout

    async def set_layout(self, path: StrPath, *, chunk_bytes: int | None = None, stripe: int | None = None) -> None:
        """Set what files made in a directory from now on, and its new subdirectories, get; None leaves it as it is.

        `chunk_bytes`: a power of two from 64 KiB to 64 MiB. `stripe`: the number of chains that a file lies on. 0: the
        cluster's default. Files that are there keep theirs.
        """
        await finished(self.client.setattr(self._connection.path(path), chunk_bytes=chunk_bytes, stripe=stripe), path)

    async def makedirs(self, path: StrPath, mode: int = 0o777, exist_ok: bool = False) -> None:
        """Make a directory and those above it that are missing. An existing one is an error unless `exist_ok`."""
        if not exist_ok and await self.lexists(path):
            await self.mkdir(path, mode)
            return
        where = self._connection.path(path)
        await finished(self.client.mkdir(where, mode=mode & 0o7777, umask=self._connection.umask, parents=True), path)

    # ---- names

    async def remove(self, path: StrPath) -> None:
        """Remove a name that is not a directory. An open file lives on until it is closed."""
        await finished(self.client.unlink(self._connection.path(path)), path)

    unlink = remove

    async def rmdir(self, path: StrPath) -> None:
        """Remove an empty directory."""
        await finished(self.client.rmdir(self._connection.path(path)), path)

    async def rmtree(self, path: StrPath, ignore_errors: bool = False, *, skip_trash: bool = False) -> None:
        """Remove a directory and everything below it in one atomic step; see :meth:`FileSystem.rmtree`."""
        try:
            await finished(self.client.remove_all(self._connection.path(path), skip_trash=skip_trash), path)
        except OSError:
            if not ignore_errors:
                raise

    async def rename(self, source: StrPath, destination: StrPath) -> None:
        """Give a file or directory another name. Raises FileExistsError when that is taken; see :meth:`replace`."""
        await self._rename(source, destination, no_replace=True)

    async def replace(self, source: StrPath, destination: StrPath) -> None:
        """Give a file or directory another name, atomically taking it from what has it now."""
        await self._rename(source, destination)

    async def exchange(self, first: StrPath, second: StrPath) -> None:
        """Swap two names atomically."""
        await self._rename(first, second, exchange=True)

    async def _rename(
        self, source: StrPath, destination: StrPath, *, no_replace: bool = False, exchange: bool = False
    ) -> None:
        paths = (self._connection.path(source), self._connection.path(destination))
        await finished(self.client.rename(*paths, no_replace=no_replace, exchange=exchange), source, destination)

    async def link(self, source: StrPath, destination: StrPath, *, follow_symlinks: bool = False) -> None:
        """Make `destination` another name of the file `source`."""
        paths = (self._connection.path(source), self._connection.path(destination))
        await finished(self.client.link(*paths, follow=follow_symlinks), source, destination)

    async def symlink(self, target: StrPath, path: StrPath) -> None:
        """Make `path` a symlink to `target`, which is stored as it is written."""
        await finished(self.client.symlink(self._connection.path(path), os.fsencode(target)), target, path)

    async def readlink(self, path: StrPath) -> str:
        """Where a symlink points. Raises INVALID_ARGUMENT for anything else."""
        return link_target(await finished(self.client.stat(self._connection.path(path), follow=False), path), path)
