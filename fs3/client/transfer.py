"""Copying trees between local directories and a cluster, several files and pieces of large files at a time."""

from __future__ import annotations

import os
import stat as stat_module
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from fs3.client.file import RawFile
from fs3.client.filesystem import FileSystem
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

JOBS = 8
# A file is copied in pieces of this size, each by whichever worker is free, through one reused buffer per worker.
PIECE_BYTES = 16 << 20
# Work that is planned ahead of the workers, at most.
PLANNED_MAX = 256


@dataclass(frozen=True)
class Progress:
    """What a transfer has done so far, for its callback. ``path``: what was finished last, relative to the source."""

    files: int
    directories: int
    symlinks: int
    bytes: int
    path: str


Callback = Callable[[Progress], None]


def upload(
    fs: FileSystem,
    source: str | os.PathLike[str],
    destination: str,
    *,
    jobs: int = JOBS,
    preserve: bool = True,
    overwrite: bool = True,
    progress: Callback | None = None,
) -> Progress:
    """Copy a local file or tree to `destination` on a cluster, which names the copy itself.

    Regular files, directories and symlinks (as such) are copied; anything else raises NOT_SUPPORTED. Directories are
    made as needed, the parent of `destination` must exist. `preserve` keeps permission bits and times of modification.
    An existing file is replaced, or raises FileExistsError without `overwrite`. `progress` is called after every piece,
    from worker threads, one call at a time. Returns the totals. At the first error the rest is given up and the error
    raised; what was copied stays. Copied data is on every serving replica, but not synced to disks.
    """
    return _transfer(LocalSide(), os.fspath(source), RemoteSide(fs), destination, jobs, preserve, overwrite, progress)


def download(
    fs: FileSystem,
    source: str,
    destination: str | os.PathLike[str],
    *,
    jobs: int = JOBS,
    preserve: bool = True,
    overwrite: bool = True,
    progress: Callback | None = None,
) -> Progress:
    """Copy a file or tree of a cluster to the local `destination`; otherwise like :func:`upload`."""
    return _transfer(RemoteSide(fs), source, LocalSide(), os.fspath(destination), jobs, preserve, overwrite, progress)


def copy(
    source_fs: FileSystem,
    source: str,
    destination_fs: FileSystem,
    destination: str,
    *,
    jobs: int = JOBS,
    preserve: bool = True,
    overwrite: bool = True,
    progress: Callback | None = None,
) -> Progress:
    """Copy a file or tree within a cluster or between two; otherwise like :func:`upload`."""
    sides = RemoteSide(source_fs), RemoteSide(destination_fs)
    return _transfer(sides[0], source, sides[1], destination, jobs, preserve, overwrite, progress)


class Handle(Protocol):
    """An open file of either side."""

    def pread_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; the count."""

    def pwrite(self, data: memoryview, offset: int) -> int:
        """Write at `offset`; the count."""

    def close(self) -> None:
        """Close it."""


class Side(Protocol):
    """What a transfer needs of a file system."""

    def lstat(self, path: str) -> os.stat_result:
        """Attributes, symlinks not followed."""

    def entries(self, path: str) -> list[tuple[str, os.stat_result]]:
        """Names of a directory with their attributes, symlinks not followed."""

    def readlink(self, path: str) -> str:
        """Where a symlink points."""

    def symlink(self, target: str, path: str) -> None:
        """Make a symlink."""

    def remove(self, path: str) -> None:
        """Remove a name."""

    def mkdir(self, path: str) -> None:
        """Make a directory unless it is there."""

    def open_read(self, path: str) -> Handle:
        """Open for reading."""

    def open_write(self, path: str, overwrite: bool) -> Handle:
        """Create, or cut to nothing."""

    def preserve(self, path: str, st: os.stat_result) -> None:
        """Give permission bits and time of modification."""


class LocalHandle:
    """A local file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def pread_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; short only at the end of the file."""
        count = 0
        while count < len(buffer):
            got = os.preadv(self._descriptor, [buffer[count:]], offset + count)
            if got == 0:
                break
            count += got
        return count

    def pwrite(self, data: memoryview, offset: int) -> int:
        """Write all of `data` at `offset`."""
        count = 0
        while count < len(data):
            count += os.pwrite(self._descriptor, data[count:], offset + count)
        return count

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


class LocalSide:
    """The local file system."""

    def lstat(self, path: str) -> os.stat_result:
        """Attributes, symlinks not followed."""
        return os.lstat(path)

    def entries(self, path: str) -> list[tuple[str, os.stat_result]]:
        """Names of a directory with their attributes."""
        with os.scandir(path) as scan:
            return [(entry.name, entry.stat(follow_symlinks=False)) for entry in scan]

    def readlink(self, path: str) -> str:
        """Where a symlink points."""
        return os.readlink(path)

    def symlink(self, target: str, path: str) -> None:
        """Make a symlink."""
        os.symlink(target, path)

    def remove(self, path: str) -> None:
        """Remove a name."""
        os.remove(path)

    def mkdir(self, path: str) -> None:
        """Make a directory unless it is there."""
        try:
            os.mkdir(path)
        except FileExistsError:
            if not os.path.isdir(path):
                raise

    def open_read(self, path: str) -> LocalHandle:
        """Open for reading."""
        return LocalHandle(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW))

    def open_write(self, path: str, overwrite: bool) -> LocalHandle:
        """Create, or cut to nothing."""
        how = os.O_TRUNC if overwrite else os.O_EXCL
        return LocalHandle(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o666))

    def preserve(self, path: str, st: os.stat_result) -> None:
        """Give permission bits and time of modification."""
        os.chmod(path, stat_module.S_IMODE(st.st_mode))
        os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


class RemoteSide:
    """A cluster."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs

    def lstat(self, path: str) -> os.stat_result:
        """Attributes, symlinks not followed."""
        return self._fs.lstat(path)

    def entries(self, path: str) -> list[tuple[str, os.stat_result]]:
        """Names of a directory with their attributes."""
        return [(entry.name, entry.stat(follow_symlinks=False)) for entry in self._fs.scandir(path)]

    def readlink(self, path: str) -> str:
        """Where a symlink points."""
        return self._fs.readlink(path)

    def symlink(self, target: str, path: str) -> None:
        """Make a symlink."""
        self._fs.symlink(target, path)

    def remove(self, path: str) -> None:
        """Remove a name."""
        self._fs.remove(path)

    def mkdir(self, path: str) -> None:
        """Make a directory unless it is there."""
        try:
            self._fs.mkdir(path)
        except FileExistsError:
            if not self._fs.isdir(path):
                raise

    def open_read(self, path: str) -> RawFile:
        """Open for reading."""
        return self._fs.open(path, "rb", buffering=0)

    def open_write(self, path: str, overwrite: bool) -> RawFile:
        """Create, or cut to nothing."""
        return self._fs.open(path, "wb" if overwrite else "xb", buffering=0)

    def preserve(self, path: str, st: os.stat_result) -> None:
        """Give permission bits and time of modification."""
        self._fs.chmod(path, stat_module.S_IMODE(st.st_mode))
        self._fs.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns))


class _Copier:
    """The state of one transfer."""

    def __init__(self, source: Side, target: Side, preserve: bool, overwrite: bool, progress: Callback | None) -> None:
        self.source = source
        self.target = target
        self.preserve = preserve
        self.overwrite = overwrite
        self._progress = progress
        self._turn = threading.Lock()
        self._buffers = threading.local()
        self.done = Progress(0, 0, 0, 0, "")
        # Files that are open now.
        self.started: set[_FileCopy] = set()

    def account(self, path: str, *, files: int = 0, directories: int = 0, symlinks: int = 0, bytes_: int = 0) -> None:
        """Add to the totals and tell the callback."""
        with self._turn:
            done = self.done
            self.done = Progress(
                done.files + files,
                done.directories + directories,
                done.symlinks + symlinks,
                done.bytes + bytes_,
                path,
            )
            if self._progress is not None:
                self._progress(self.done)

    def buffer(self) -> memoryview:
        """The buffer of this worker."""
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(bytearray(PIECE_BYTES))
        view: memoryview = self._buffers.view
        return view

    def copy_symlink(self, origin: str, goal: str, name: str) -> None:
        """Make the same symlink."""
        text = self.source.readlink(origin)
        try:
            self.target.symlink(text, goal)
        except FileExistsError:
            if not self.overwrite:
                raise
            self.target.remove(goal)
            self.target.symlink(text, goal)
        self.account(name, symlinks=1)


class _FileCopy:
    """One file on its way. The worker that ends the last piece closes it."""

    def __init__(self, copier: _Copier, origin: str, goal: str, name: str, st: os.stat_result) -> None:
        self._copier = copier
        self._paths = (origin, goal)
        self._name = name
        self._st = st
        self._turn = threading.Lock()
        self._left = max(1, -(-st.st_size // PIECE_BYTES))
        self._failed = False
        self._stack: ExitStack | None = None
        self._handles: tuple[Handle, Handle] | None = None

    def pieces(self) -> Iterator[Callable[[], None]]:
        """The work, in parts that may run at the same time."""
        for offset in range(0, max(1, self._st.st_size), PIECE_BYTES):
            yield lambda offset=offset: self._piece(offset)  # type: ignore[misc]

    def _piece(self, offset: int) -> None:
        try:
            source, target = self._open()
            buffer = self._copier.buffer()
            # The last piece goes on to wherever the file ends by now.
            last = offset + PIECE_BYTES >= self._st.st_size
            while True:
                count = source.pread_into(buffer, offset)
                if count:
                    target.pwrite(buffer[:count], offset)
                    self._copier.account(self._name, bytes_=count)
                if not last or count < len(buffer):
                    break
                offset += count
        except BaseException:
            self._finish(failed=True)
            raise
        self._finish(failed=False)

    def _open(self) -> tuple[Handle, Handle]:
        with self._turn:
            if self._handles is None:
                with ExitStack() as stack:
                    source = self._copier.source.open_read(self._paths[0])
                    stack.callback(source.close)
                    target = self._copier.target.open_write(self._paths[1], self._copier.overwrite)
                    stack.callback(target.close)
                    self._handles = (source, target)
                    self._stack = stack.pop_all()
                    self._copier.started.add(self)
            return self._handles

    def _finish(self, failed: bool) -> None:
        with self._turn:
            self._left -= 1
            self._failed |= failed
            if self._left:
                return
        self.close()
        if not self._failed:
            if self._copier.preserve:
                self._copier.target.preserve(self._paths[1], self._st)
            self._copier.account(self._name, files=1)

    def close(self) -> None:
        """Close what is open."""
        stack, self._stack = self._stack, None
        self._copier.started.discard(self)
        if stack is not None:
            stack.close()


def _transfer(
    source: Side,
    origin: str,
    target: Side,
    goal: str,
    jobs: int,
    preserve: bool,
    overwrite: bool,
    progress: Callback | None,
) -> Progress:
    copier = _Copier(source, target, preserve, overwrite, progress)
    finished_directories: list[tuple[str, os.stat_result]] = []
    running: set[Future[None]] = set()
    try:
        with ThreadPoolExecutor(jobs, thread_name_prefix="fs3-transfer") as pool:
            try:
                for work in _plan(copier, origin, goal, finished_directories):
                    if len(running) >= PLANNED_MAX:
                        running = _reap(running, FIRST_COMPLETED)
                    running.add(pool.submit(work))
                while running:
                    running = _reap(running, FIRST_COMPLETED)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        for file in list(copier.started):
            file.close()
    if preserve:
        # From the inside out: making entries changes a directory's time, and a mode may forbid making them.
        for path, st in reversed(finished_directories):
            target.preserve(path, st)
    return copier.done


def _reap(running: set[Future[None]], when: str) -> set[Future[None]]:
    done, left = wait(running, return_when=when)
    for future in done:
        future.result()
    return left


def _plan(
    copier: _Copier, origin: str, goal: str, directories: list[tuple[str, os.stat_result]]
) -> Iterator[Callable[[], None]]:
    """The work of copying `origin`, directories made on the way, parents first."""
    pending = [(origin, goal, "", copier.source.lstat(origin))]
    while pending:
        origin, goal, name, st = pending.pop()
        if stat_module.S_ISDIR(st.st_mode):
            copier.target.mkdir(goal)
            directories.append((goal, st))
            copier.account(name, directories=1)
            for child, child_st in sorted(copier.source.entries(origin), reverse=True):
                below = f"{name}/{child}" if name else child
                pending.append((_join(origin, child), _join(goal, child), below, child_st))
        elif stat_module.S_ISLNK(st.st_mode):
            yield lambda o=origin, g=goal, n=name: copier.copy_symlink(o, g, n)  # type: ignore[misc]
        elif stat_module.S_ISREG(st.st_mode):
            yield from _FileCopy(copier, origin, goal, name, st).pieces()
        else:
            raise error(
                Code.CODE_NOT_SUPPORTED, f"{origin} is neither file, directory nor symlink; it cannot be copied"
            )


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"
