"""Shared memory, rings and reading of whole files through the ring of an fs3 mount. See docs/usrbio.md."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import hf3fs_py_usrbio
from hf3fs_py_usrbio import deregister_fd, extract_mount_point, force_fsync, hardlink, punch_hole, register_fd

__all__ = [
    "IorPriority",
    "deregister_fd",
    "extract_mount_point",
    "force_fsync",
    "hardlink",
    "ioring",
    "iovec",
    "make_ioring",
    "make_iovec",
    "punch_hole",
    "read_file",
    "register_fd",
]


class IorPriority:
    """Priorities of rings. Accepted, without effect."""

    HIGH = -1
    NORMAL = 0
    LOW = 1


class iovec:
    """Shared memory that is announced to a mount as long as this lives. A slice of it is what an I/O takes."""

    def __init__(self, iov: hf3fs_py_usrbio.iovec, link: str) -> None:
        self.iov = iov
        self.link = link
        self._process = os.getpid()

    def withdraw(self) -> None:
        """Have the mount let go of it; what it is made of stays."""
        # The mount may be gone, or have withdrawn it already.
        with contextlib.suppress(OSError):
            os.unlink(self.link)

    def __del__(self) -> None:
        # It is the parent's in a forked child.
        if self._process == os.getpid():
            self.withdraw()

    def __getitem__(self, part: slice) -> hf3fs_py_usrbio.iovec:
        return self.iov[part]

    def __setitem__(self, part: slice, value: Any) -> None:
        memoryview(self.iov)[part] = value


class ioring:
    """A queue of reads or of writes to the mount daemon; see :func:`make_ioring`."""

    def __init__(self, ior: hf3fs_py_usrbio.ioring) -> None:
        self.ior = ior

    @staticmethod
    def size_for_entries(entries: int) -> int:
        """Bytes of shared memory of a ring for `entries` I/Os."""
        return hf3fs_py_usrbio.ioring.size_for_entries(entries)

    def prepare(self, iov: iovec | hf3fs_py_usrbio.iovec, *args: Any, **keywords: Any) -> hf3fs_py_usrbio.ioring:
        """As the native ring's, also for the whole of an :class:`iovec`."""
        return self.ior.prepare(iov.iov if isinstance(iov, iovec) else iov, *args, **keywords)

    def submit(self) -> hf3fs_py_usrbio.ioring:
        """Have what is prepared begin."""
        return self.ior.submit()

    def wait(
        self, *, max_results: int = 0, min_results: int = 0, timeout: timedelta | None = None
    ) -> list[hf3fs_py_usrbio.iovec]:
        """Results, as the native ring's."""
        return self.ior.wait(max_results=max_results, min_results=min_results, timeout=timeout)


def _buffer(shm: SharedMemory) -> memoryview:
    buffer = shm.buf
    if buffer is None:
        raise ValueError("the shared memory is closed")
    return buffer


def make_iovec(shm: SharedMemory, hf3fs_mount_point: str, block_size: int = 0, numa: int = -1) -> iovec:
    """Announce shared memory to the mount; its name may be unlinked after that.

    With `block_size` (bytes) an I/O must lie within one block of the memory. Raises OSError when the mount refuses it.
    """
    name = str(uuid.uuid4())
    suffix = f".b{block_size}" if block_size > 0 else ""
    link = f"{hf3fs_mount_point}/3fs-virt/iovs/{name}{suffix}"
    os.symlink(os.path.normpath(f"/dev/shm/{shm.name}"), link)
    return iovec(hf3fs_py_usrbio.iovec(_buffer(shm), name, hf3fs_mount_point, block_size, numa), link)


def make_ioring(
    hf3fs_mount_point: str,
    entries: int,
    for_read: bool = True,
    io_depth: int = 0,
    priority: int | None = None,
    timeout: int | None = None,
    numa: int = -1,
    flags: int = 0,
) -> ioring:
    """Make a ring for `entries` outstanding reads (or writes).

    `io_depth` above 0: exactly so many begin together (fewer wait); 0: all that are prepared; below 0: at most so
    many, and with `timeout` (milliseconds) a batch that is not full waits so long. `flags`: 2 has a read that meets a
    hole fail with ENODATA. Raises OSError.
    """
    return ioring(
        hf3fs_py_usrbio.ioring(hf3fs_mount_point, entries, for_read, io_depth, priority, timeout, numa, flags)
    )


def read_file(
    fn: str,
    hf3fs_mount_point: str | None = None,
    block_size: int = 1 << 30,
    off: int = 0,
    priority: int | None = None,
    cb: Callable[[memoryview, int], Any] | None = None,
) -> bytes | None:
    """Read a file from `off` to its end, in pieces of `block_size` bytes of shared memory, and return the bytes.

    With `cb` each piece goes to `cb(data, offset)` instead, and None is returned: an int that it returns is where to go
    on, anything else that is true ends it. Raises OSError, EINVAL when the file is on no mount with rings.
    """
    mount = hf3fs_mount_point or extract_mount_point(fn)
    if mount is None:
        raise OSError(22, "the file is on no mount with rings", fn)
    with contextlib.ExitStack() as undo:
        fd = os.open(fn, os.O_RDONLY)
        undo.callback(os.close, fd)
        register_fd(fd)
        undo.callback(deregister_fd, fd)
        # More memory than there are bytes is of no use.
        room = max(1, min(block_size, os.fstat(fd).st_size - off))
        shm = SharedMemory(size=room, create=True)
        undo.callback(shm.close)
        undo.callback(shm.unlink)
        memory = make_iovec(shm, mount)
        undo.callback(memory.withdraw)
        ring = make_ioring(mount, 1, priority=priority)
        pieces = _pieces(ring, memory, fd, shm, room, off, cb)
    return None if cb is not None else b"".join(pieces)


def _pieces(
    ring: ioring,
    memory: iovec,
    fd: int,
    shm: SharedMemory,
    room: int,
    off: int,
    cb: Callable[[memoryview, int], Any] | None,
) -> list[bytes]:
    pieces: list[bytes] = []
    while True:
        ring.prepare(memory[:room], True, fd, off)
        done = ring.submit().wait(min_results=1)[0].result
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        if done == 0:
            return pieces
        if cb is None:
            pieces.append(bytes(_buffer(shm)[:done]))
        else:
            with _buffer(shm)[:done] as part:
                answer = cb(part, off)
            if type(answer) is int:
                off = answer
                continue
            if answer:
                return pieces
        if done < room:
            return pieces
        off += done
