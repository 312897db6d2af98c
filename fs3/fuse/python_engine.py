"""The fusepy engine: a mount served by Python threads, for machines where the native daemon cannot run.

It has the methods of :class:`fs3.native.Mount`, so that :mod:`fs3.fuse.serve` treats both alike.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from fs3.core.errors import error
from fs3.fuse.options import MountOptions
from fs3.fuse.python_operations import Operations
from fs3.fuse.table import detach, mount_device
from fs3.native import Client
from fs3.v1.frame_pb2 import Code

if TYPE_CHECKING:
    from fs3.fuse.python_session import Session

log = logging.getLogger(__name__)

# Each waits for one request at a time, which is why there are more of them than cores.
THREADS = 16
THREAD_BYTES = 4 << 20
END_WAIT_S = 30.0
TICK_S = 1.0


def _session_module() -> Any:
    """What needs libfuse. Raises NOT_SUPPORTED, saying what to install."""
    try:
        from fs3.fuse import python_session
    except ImportError as e:
        raise error(
            Code.CODE_NOT_SUPPORTED, f"--engine fusepy needs the package mfusepy ({e}): pip install 'fs3[fusepy]'"
        ) from e
    except (OSError, AttributeError) as e:
        raise error(
            Code.CODE_NOT_SUPPORTED,
            f"--engine fusepy needs libfuse 3 ({e}): install it, on Debian: apt-get install fuse3",
        ) from e
    return python_session


def _threads(options: MountOptions) -> int:
    """As many as wished, as far as memory allows: each has a request and its data in hand."""
    return max(2, min(options.threads or THREADS, options.max_memory_bytes // THREAD_BYTES))


def _arguments(options: MountOptions, source: str) -> list[bytes]:
    wanted = {
        "allow_other": options.allow_other,
        "default_permissions": options.default_permissions,
        "ro": options.read_only,
        "suid": options.suid,
        "dev": options.dev,
        "noexec": not options.exec,
    }
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    named = [f"fsname={escaped}", "subtype=fs3", *(name for name, on in wanted.items() if on)]
    return [b"fs3", b"-o", os.fsencode(",".join(named))]


class PythonMount:
    """Mount a cluster and serve it in the background, by threads here; `source` is its name in the mount table.

    Raises Fs3Error: NOT_SUPPORTED when mfusepy or libfuse is missing; the cluster cannot be reached, is another one or
    refuses the token; ACCESS when it may not be mounted there.
    """

    def __init__(self, metas: list[str], token: str, mountpoint: str, source: str, options: MountOptions) -> None:
        module = _session_module()
        self._mountpoint = mountpoint
        self._client = Client.connect(
            metas,
            token,
            cluster_id=options.cluster_id or None,
            op_timeout_s=options.op_timeout_s,
            read_bytes_in_flight=options.max_memory_bytes // 8,
            write_bytes_in_flight=options.max_memory_bytes // 8,
            transport=options.transport,
            rdma=options.rdma,
            shared_memory=options.shared_memory,
            noatime=options.noatime,
            description=f"mount {mountpoint}",
        ).wait()
        from fs3.fuse import libfuse

        self._library = libfuse.library
        self._buffer_type = libfuse.fuse_buf
        self._operations = Operations(self._client, options, lambda inode: self._invalidate(inode, -1))
        self._session: Session = module.Session(self._operations, options, self._invalidate)
        self._handle = self._new_session(libfuse, _arguments(options, source))
        self._failure: OSError | None = None
        self._ended = threading.Event()
        self._loops = [
            threading.Thread(target=self._serve, name=f"fs3-fuse-{n}", daemon=True) for n in range(_threads(options))
        ]
        for loop in self._loops:
            loop.start()
        threading.Thread(target=self._finish, name="fs3-fuse-end", daemon=True).start()
        threading.Thread(target=self._tick, name="fs3-fuse-tick", daemon=True).start()
        self._set_readahead(options.readahead_bytes)

    def _new_session(self, libfuse: Any, arguments: list[bytes]) -> int:
        self._argv = (ctypes.c_char_p * (len(arguments) + 1))(*arguments, None)
        args = libfuse.fuse_args(len(arguments), self._argv, 0)
        table = self._session.table
        handle: int | None = self._library.fuse_session_new(
            ctypes.byref(args), ctypes.byref(table), ctypes.sizeof(table), None
        )
        if handle is None:
            self._leave()
            raise error(Code.CODE_INVALID_ARGUMENT, f"libfuse refuses the options {arguments[2].decode()}")
        if self._library.fuse_session_mount(handle, os.fsencode(self._mountpoint)) != 0:
            self._library.fuse_session_destroy(handle)
            self._leave()
            raise error(Code.CODE_ACCESS, f"{self._mountpoint} cannot be mounted on; the log has libfuse's reason")
        return handle

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            self._client.close().wait()

    def _invalidate(self, inode: int, offset: int) -> None:
        """Make the kernel ask for the attributes of an inode, and forget its pages from `offset` on unless negative."""
        self._library.fuse_lowlevel_notify_inval_inode(self._handle, inode, offset, 0)

    def _serve(self) -> None:
        """Take requests from the kernel until the mount has ended."""
        buffer = self._buffer_type()
        while not self._library.fuse_session_exited(self._handle):
            received = self._library.fuse_session_receive_buf(self._handle, ctypes.byref(buffer))
            if received == -errno.EINTR:
                continue
            if received <= 0:
                if received < 0 and received != -errno.ENODEV:
                    self._failure = OSError(-received, f"the connection to the kernel failed: {os.strerror(-received)}")
                break
            self._library.fuse_session_process_buf(self._handle, ctypes.byref(buffer))

    def _tick(self) -> None:
        while not self._ended.wait(TICK_S):
            self._operations.publish_aged()
            self._operations.locks.end_lost()

    def _finish(self) -> None:
        """Nothing more comes from the kernel: write down what is left, and leave."""
        for loop in self._loops:
            loop.join()
        self._operations.locks.close()
        self._session.close()
        try:
            self._operations.end()
        except OSError as e:
            self._failure = self._failure or e
        self._library.fuse_session_destroy(self._handle)
        self._ended.set()

    def _set_readahead(self, count: int) -> None:
        """Best effort: only the superuser may."""
        with contextlib.suppress(OSError):
            device = mount_device(self._mountpoint)
            with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as setting:
                setting.write(str(count // 1024))

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the mount has ended; whether it has. Raises OSError when the connection to the kernel failed."""
        ended = self._ended.wait(timeout_s)
        if ended and self._failure is not None:
            raise self._failure
        return ended

    def unmount(self) -> None:
        """Publish everything, unmount, wait for the end. Raises BUSY when files are still open half a minute later."""
        if not self._ended.is_set():
            self._operations.publish_aged(0.0)
            detach(self._mountpoint, lazy=True)
        if not self.wait(END_WAIT_S):
            self._operations.publish_aged(0.0)
            raise error(Code.CODE_BUSY, f"{self._mountpoint}: files are still open")
