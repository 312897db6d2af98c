"""Who is writing a checkpoint: a lock that ends with its process, so that what a killed job leaves can be told."""

from __future__ import annotations

import contextlib
import os
from types import TracebackType

from fs3.client import FileSystem
from fs3.v1.meta_pb2 import LockKind, LockType

# Owners among those of one client; any numbers do. Who asks is another one, so that this client's claims count, too.
_OWNER, _ASKING = 0x66733363, 0x66733364
_END = (1 << 63) - 1


class Claim:
    """A lock of a file that is being written, or stands for a directory that is; also a context manager.

    It ends with :meth:`release`, or some time after its client. It does not keep anybody out by itself: temporary names
    are never used twice. It tells those who clean up that somebody is at work.
    """

    def __init__(self, fs: FileSystem, inode: int) -> None:
        self._inode = inode
        self._pid = os.getpid()
        self._locks = fs.client.locks()
        self._locks.keep(True)
        self._locks.set(inode, _lock(LockType.LOCK_TYPE_WRITE), False).wait()

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.release()

    def release(self) -> None:
        """Let go. In a forked child it does nothing: the lock is the parent's."""
        if self._pid != os.getpid():
            return
        try:
            self._locks.unlock(self._inode, _lock(LockType.LOCK_TYPE_UNLOCK)).wait()
        finally:
            self._locks.keep(False)


def claimed(fs: FileSystem, inode: int) -> bool:
    """Whether somebody has a claim on the file."""
    return fs.client.locks().get(inode, _lock(LockType.LOCK_TYPE_WRITE, _ASKING)).wait() is not None


def _lock(kind: int, owner: int = _OWNER) -> tuple[int, int, int, int, int, int]:
    return int(LockKind.LOCK_KIND_FLOCK), kind, owner, 0, _END, os.getpid()
