"""Requests of libfuse turned into calls of :class:`Operations`, and their results into replies."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from fs3.fuse import libfuse
from fs3.fuse.options import MountOptions
from fs3.fuse.python_locks import OFFSET_MAX, Lock, Wait
from fs3.fuse.python_operations import Listed, Opened, Operations, Who
from fs3.native import Attr
from fs3.v1.meta_pb2 import FileType, LockType

log = logging.getLogger(__name__)

READ_BYTES_MAX = 1 << 20
BACKGROUND_MAX = 64
STAT_BLOCK = 512
STATFS_BLOCK = 4096
# Inodes that may still be made, as shown by statfs: without a quota there is no limit short of the ids.
FREE_INODES = 1 << 40
# Large enough that standard I/O buffers gather small writes, small enough not to waste their memory.
BLKSIZE = 128 << 10

_TYPES: dict[int, int] = {
    FileType.FILE_TYPE_DIRECTORY: stat.S_IFDIR,
    FileType.FILE_TYPE_SYMLINK: stat.S_IFLNK,
    FileType.FILE_TYPE_FIFO: stat.S_IFIFO,
    FileType.FILE_TYPE_SOCKET: stat.S_IFSOCK,
    FileType.FILE_TYPE_CHAR_DEVICE: stat.S_IFCHR,
    FileType.FILE_TYPE_BLOCK_DEVICE: stat.S_IFBLK,
}


def _fill_time(time: Any, ns: int) -> None:
    time.tv_sec, time.tv_nsec = divmod(ns, 10**9)


def fill_stat(st: libfuse.c_stat, attr: Attr) -> None:
    """The kernel's attributes of an inode."""
    size = len(attr.symlink_target) if attr.type == FileType.FILE_TYPE_SYMLINK else attr.length
    layout = attr.layout
    # Programs look for holes in files that use less than their length.
    may_have_holes = layout is not None and size > layout.chunk_bytes
    st.st_ino, st.st_nlink, st.st_size, st.st_blksize = attr.inode, attr.nlink, size, BLKSIZE
    st.st_blocks = size // STAT_BLOCK - 1 if may_have_holes else -(-size // STAT_BLOCK)
    st.st_mode = _TYPES.get(attr.type, stat.S_IFREG) | attr.mode & 0o7777
    st.st_uid, st.st_gid, st.st_rdev = attr.uid, attr.gid, attr.rdev
    _fill_time(st.st_atimespec, attr.atime_ns)
    _fill_time(st.st_mtimespec, attr.mtime_ns)
    _fill_time(st.st_ctimespec, attr.ctime_ns)


class Replies:
    """Answers to one request; exactly one of them has to be sent."""

    def __init__(self, options: MountOptions) -> None:
        self._attr_s, self._entry_s = options.attr_timeout_s, options.entry_timeout_s

    def entry(self, attr: Attr, life_s: float | None = None) -> libfuse.fuse_entry_param:
        """What an inode looks like behind a name."""
        entry = libfuse.fuse_entry_param(
            ino=attr.inode,
            attr_timeout=self._attr_s if life_s is None else life_s,
            entry_timeout=self._entry_s if life_s is None else life_s,
        )
        fill_stat(entry.attr, attr)
        return entry

    def send_entry(self, request: int, attr: Attr) -> None:
        """Answer with an entry."""
        libfuse.library.fuse_reply_entry(request, ctypes.byref(self.entry(attr)))

    def send_created(self, request: int, attr: Attr, fi: Any) -> bool:
        """Answer with an entry and an open file; whether somebody took it."""
        entry = self.entry(attr, min(self._attr_s, self._entry_s))
        taken: int = libfuse.library.fuse_reply_create(request, ctypes.byref(entry), fi)
        return taken == 0

    def send_attr(self, request: int, attr: Attr) -> None:
        """Answer with attributes."""
        st = libfuse.c_stat()
        fill_stat(st, attr)
        libfuse.library.fuse_reply_attr(request, ctypes.byref(st), self._attr_s)


def send_error(request: int, number: int) -> None:
    """Answer that a request failed; 0: that it succeeded and has nothing to tell."""
    libfuse.library.fuse_reply_err(request, number)


def send_bytes(request: int, data: bytes) -> None:
    """Answer with bytes."""
    libfuse.library.fuse_reply_buf(request, data, len(data))


def send_xattr(request: int, size: int, data: bytes) -> None:
    """Answer with the value of an attribute; `size`: the caller's room, 0: it asks how much is needed."""
    if size == 0:
        libfuse.library.fuse_reply_xattr(request, len(data))
    elif len(data) > size:
        send_error(request, errno.ERANGE)
    else:
        send_bytes(request, data)


def who(request: int) -> Who:
    """The process behind a request."""
    context = libfuse.library.fuse_req_ctx(request).contents
    return Who(context.uid, context.gid, context.pid, context.umask & 0o777)


class Session:
    """The operations of a mount as libfuse calls them, from any of its threads.

    A method that ends without an error has answered, or has somebody else answer.
    """

    def __init__(self, operations: Operations, options: MountOptions, invalidate: Callable[[int, int], None]) -> None:
        self._operations = operations
        self._options = options
        self._invalidate = invalidate
        self._replies = Replies(options)
        self._buffers = threading.local()
        # What makes the kernel forget pages waits for requests that use them: it must not hold up a thread that serves.
        self._behind = ThreadPoolExecutor(1, thread_name_prefix="fs3-fuse-behind")
        self._waits: dict[int, Wait] = {}
        self._interrupted = libfuse.interrupt_func(self._interrupt)
        self.table = libfuse.fuse_lowlevel_ops()
        for name, arguments in libfuse.OPERATIONS.items():
            method = getattr(self, f"_do_{name}", None)
            # Without these the kernel keeps locks by itself, for this mount alone.
            if method is not None and not (options.local_locks and name in ("getlk", "setlk", "flock")):
                function = libfuse.callback(arguments)(method if name == "init" else _answering(name, method))
                setattr(self.table, name, function)

    def close(self) -> None:
        """No request comes any more: end what is under way."""
        self._behind.shutdown()

    def _do_init(self, _userdata: int, connection: Any) -> None:
        """Agree with the kernel on what it does itself."""
        wanted = (
            libfuse.CAP_ATOMIC_O_TRUNC
            | libfuse.CAP_PARALLEL_DIROPS
            | libfuse.CAP_READDIRPLUS
            | libfuse.CAP_READDIRPLUS_AUTO
            | libfuse.CAP_ASYNC_DIO
            | libfuse.CAP_CACHE_SYMLINKS
        )
        if self._options.default_permissions:
            # Together they let the service apply default access control lists.
            wanted |= libfuse.CAP_POSIX_ACL | libfuse.CAP_DONT_MASK
        connection = connection.contents
        connection.want |= wanted & connection.capable
        connection.max_readahead = min(connection.max_readahead, READ_BYTES_MAX)
        connection.max_background = BACKGROUND_MAX

    # Names and attributes

    def _do_lookup(self, request: int, parent: int, name: bytes) -> None:
        self._replies.send_entry(request, self._operations.lookup(who(request), parent, name))

    def _do_getattr(self, request: int, inode: int, _fi: Any) -> None:
        self._replies.send_attr(request, self._operations.getattr(inode))

    def _do_setattr(self, request: int, inode: int, st: Any, to_set: int, fi: Any) -> None:
        st = st.contents
        change: dict[str, Any] = {}
        if to_set & libfuse.SET_MODE:
            change["mode"] = st.st_mode & 0o7777
        if to_set & libfuse.SET_UID:
            change["uid"] = st.st_uid
        if to_set & libfuse.SET_GID:
            change["gid"] = st.st_gid
        for name, given, now in (
            ("atime", libfuse.SET_ATIME, libfuse.SET_ATIME_NOW),
            ("mtime", libfuse.SET_MTIME, libfuse.SET_MTIME_NOW),
        ):
            if to_set & now:
                change[f"{name}_now"] = True
            elif to_set & given:
                time = getattr(st, f"st_{name}spec")
                change[f"{name}_ns"] = time.tv_sec * 10**9 + time.tv_nsec
        length = st.st_size if to_set & libfuse.SET_SIZE else None
        handle = self._operations.files.get(fi.contents.fh) if fi else None
        attr = self._operations.setattr(who(request), inode, length, handle, change)
        self._replies.send_attr(request, attr)

    def _do_readlink(self, request: int, inode: int) -> None:
        libfuse.library.fuse_reply_readlink(request, self._operations.readlink(inode))

    def _do_mknod(self, request: int, parent: int, name: bytes, mode: int, rdev: int) -> None:
        self._replies.send_entry(request, self._operations.mknod(who(request), parent, name, mode, rdev))

    def _do_mkdir(self, request: int, parent: int, name: bytes, mode: int) -> None:
        self._replies.send_entry(request, self._operations.mkdir(who(request), parent, name, mode))

    def _do_symlink(self, request: int, target: bytes, parent: int, name: bytes) -> None:
        self._replies.send_entry(request, self._operations.symlink(who(request), parent, name, target))

    def _do_link(self, request: int, inode: int, parent: int, name: bytes) -> None:
        self._replies.send_entry(request, self._operations.link(who(request), inode, parent, name))

    def _do_unlink(self, request: int, parent: int, name: bytes) -> None:
        self._operations.unlink(who(request), parent, name)
        send_error(request, 0)

    def _do_rmdir(self, request: int, parent: int, name: bytes) -> None:
        self._operations.rmdir(who(request), parent, name)
        send_error(request, 0)

    def _do_rename(self, request: int, parent: int, name: bytes, to: int, new_name: bytes, flags: int) -> None:
        self._operations.rename(who(request), (parent, name), (to, new_name), flags)
        send_error(request, 0)

    def _do_statfs(self, request: int, inode: int) -> None:
        space = self._operations.statfs(inode)
        free_inodes = FREE_INODES if space.free_inodes is None else space.free_inodes
        free = space.free_bytes // STATFS_BLOCK
        result = libfuse.c_statvfs(
            f_bsize=STATFS_BLOCK,
            f_frsize=STATFS_BLOCK,
            f_blocks=space.capacity_bytes // STATFS_BLOCK,
            f_bfree=free,
            f_bavail=free,
            f_files=space.inodes + free_inodes,
            f_ffree=free_inodes,
            f_favail=free_inodes,
            f_namemax=space.name_bytes_max or 255,
        )
        libfuse.library.fuse_reply_statfs(request, ctypes.byref(result))

    # Open files

    def _fill(self, fi: Any, opened: Opened) -> None:
        fi = fi.contents
        fi.fh, fi.keep_cache, fi.direct_io = opened.handle, opened.keep_cache, opened.direct_io

    def _do_open(self, request: int, inode: int, fi: Any) -> None:
        opened = self._operations.open(who(request), inode, fi.contents.flags)
        self._fill(fi, opened)
        if libfuse.library.fuse_reply_open(request, fi) != 0:
            self._operations.release(opened.handle)  # the caller has gone

    def _do_create(self, request: int, parent: int, name: bytes, mode: int, fi: Any) -> None:
        attr, opened = self._operations.create(who(request), parent, name, mode, fi.contents.flags)
        self._fill(fi, opened)
        if not self._replies.send_created(request, attr, fi):
            self._operations.release(opened.handle)

    def _do_read(self, request: int, _inode: int, size: int, offset: int, fi: Any) -> None:
        buffer = getattr(self._buffers, "read", None)
        if buffer is None or len(buffer) < size:
            self._buffers.read = buffer = ctypes.create_string_buffer(max(size, READ_BYTES_MAX))
        try:
            count = self._operations.read(fi.contents.fh, memoryview(buffer).cast("B")[:size], offset)
        except OSError:
            # An answer that comes late must not land in the next reader's bytes.
            self._buffers.read = None
            raise
        libfuse.library.fuse_reply_buf(request, ctypes.addressof(buffer), count)

    def _do_write(self, request: int, inode: int, data: int, size: int, offset: int, fi: Any) -> None:
        # A copy: libfuse uses its buffer again, also while the network may still read what was given up.
        content = ctypes.string_at(data, size)
        fi = fi.contents
        # Pages of a shared mapping are written back to where they are from.
        append = bool(fi.flags & os.O_APPEND) and not fi.writepage
        at = self._operations.write(who(request), fi.fh, content, offset, append=append)
        if at == offset:
            libfuse.library.fuse_reply_write(request, size)
        else:
            # Others appended before: what the kernel has cached from where it believed the end to be on is not so.
            self._behind.submit(self._forget_pages_and_answer, request, inode, min(at, offset), size)

    def _forget_pages_and_answer(self, request: int, inode: int, offset: int, size: int) -> None:
        self._invalidate(inode, offset)
        libfuse.library.fuse_reply_write(request, size)

    def _do_flush(self, request: int, _inode: int, fi: Any) -> None:
        self._operations.flush(fi.contents.fh, fi.contents.lock_owner)
        send_error(request, 0)

    def _do_release(self, request: int, _inode: int, fi: Any) -> None:
        self._operations.release(fi.contents.fh)
        send_error(request, 0)

    def _do_fsync(self, request: int, _inode: int, _datasync: int, fi: Any) -> None:
        self._operations.fsync(fi.contents.fh)
        send_error(request, 0)

    def _do_fallocate(self, request: int, _inode: int, mode: int, offset: int, length: int, fi: Any) -> None:
        self._operations.fallocate(who(request), fi.contents.fh, mode, offset, length)
        send_error(request, 0)

    def _do_lseek(self, request: int, _inode: int, offset: int, whence: int, fi: Any) -> None:
        libfuse.library.fuse_reply_lseek(request, self._operations.seek(fi.contents.fh, offset, whence))

    def _do_ioctl(self, request: int, *_arguments: Any) -> None:
        send_error(request, errno.ENOTTY)

    # Locks

    def _do_getlk(self, request: int, _inode: int, fi: Any, lock: Any) -> None:
        handle = self._operations.handle(fi.contents.fh)
        asked = lock.contents
        wanted = Lock.posix(asked.l_type, fi.contents.lock_owner, asked.l_start, asked.l_len, asked.l_pid)
        found = self._operations.locks.find(handle.node.inode, wanted)
        answer = libfuse.c_flock_t(l_type=fcntl.F_UNLCK)
        if found is not None:
            answer.l_type = fcntl.F_RDLCK if found.type == LockType.LOCK_TYPE_READ else fcntl.F_WRLCK
            answer.l_start, answer.l_pid = found.start, found.pid
            answer.l_len = 0 if found.end == OFFSET_MAX else found.end - found.start + 1
        libfuse.library.fuse_reply_lock(request, ctypes.byref(answer))

    def _do_setlk(self, request: int, _inode: int, fi: Any, lock: Any, sleep: int) -> None:
        asked = lock.contents
        wanted = Lock.posix(asked.l_type, fi.contents.lock_owner, asked.l_start, asked.l_len, asked.l_pid)
        self._set_lock(request, fi.contents.fh, wanted, bool(sleep))

    def _do_flock(self, request: int, _inode: int, fi: Any, operation: int) -> None:
        wanted = Lock.flock(operation, fi.contents.lock_owner, who(request).pid)
        self._set_lock(request, fi.contents.fh, wanted, not operation & fcntl.LOCK_NB)

    def _set_lock(self, request: int, number: int, lock: Lock, sleep: bool) -> None:
        locks, handle = self._operations.locks, self._operations.handle(number)
        if lock.type == LockType.LOCK_TYPE_UNLOCK:
            self._operations.unlock(number, lock)
            send_error(request, 0)
        elif not sleep:
            attr = locks.try_lock(handle, lock)
            self._behind.submit(self._answer_lock, request, attr)
        else:
            wait, future = locks.wait_lock(handle, lock)
            self._waits[request] = wait
            # Only what is added after this answers the request, so it lives until then.
            libfuse.library.fuse_req_interrupt_func(request, self._interrupted, None)
            future.add_done_callback(lambda done: self._behind.submit(self._end_wait, request, done))

    def _interrupt(self, request: int, _data: int) -> None:
        wait = self._waits.get(request)
        if wait is not None:
            wait.interrupt()

    def _end_wait(self, request: int, done: Future[Attr]) -> None:
        del self._waits[request]
        try:
            attr = done.result()
        except OSError as e:
            send_error(request, e.errno or errno.EIO)
        else:
            self._answer_lock(request, attr)

    def _answer_lock(self, request: int, attr: Attr) -> None:
        if not self._operations.catch_up(attr):
            self._invalidate(attr.inode, 0)
        send_error(request, 0)

    # Directories

    def _do_opendir(self, request: int, inode: int, fi: Any) -> None:
        fi.contents.fh = self._operations.opendir(inode)
        libfuse.library.fuse_reply_open(request, fi)

    def _do_releasedir(self, request: int, _inode: int, fi: Any) -> None:
        self._operations.releasedir(fi.contents.fh)
        send_error(request, 0)

    def _do_fsyncdir(self, request: int, _inode: int, _datasync: int, _fi: Any) -> None:
        send_error(request, 0)  # an answered metadata operation is as durable as the service's store makes it

    def _do_readdir(self, request: int, _inode: int, size: int, offset: int, fi: Any) -> None:
        def add(room: int, left: int, entry: Listed) -> int:
            st = libfuse.c_stat(st_ino=entry.inode, st_mode=_TYPES.get(entry.type, stat.S_IFREG))
            return self._added(libfuse.library.fuse_add_direntry, request, room, left, entry, st)

        self._list(request, size, offset, fi.contents.fh, add, with_attr=False)

    def _do_readdirplus(self, request: int, _inode: int, size: int, offset: int, fi: Any) -> None:
        life_s = min(self._options.attr_timeout_s, self._options.entry_timeout_s)

        def add(room: int, left: int, entry: Listed) -> int:
            if entry.attr is not None:
                param = self._replies.entry(entry.attr, life_s)
            else:  # the kernel only takes the name; it asks for the rest
                param = libfuse.fuse_entry_param()
                param.attr.st_ino = entry.inode
                param.attr.st_mode = _TYPES.get(entry.type, stat.S_IFREG)
            return self._added(libfuse.library.fuse_add_direntry_plus, request, room, left, entry, param)

        self._list(request, size, offset, fi.contents.fh, add, with_attr=True)

    @staticmethod
    def _added(function: Any, request: int, room: int, left: int, entry: Listed, what: ctypes.Structure) -> int:
        needed: int = function(request, room, left, entry.name, ctypes.byref(what), entry.next)
        return needed

    def _list(
        self,
        request: int,
        size: int,
        offset: int,
        number: int,
        add: Callable[[int, int, Listed], int],
        *,
        with_attr: bool,
    ) -> None:
        buffer = ctypes.create_string_buffer(size)
        filled = 0
        with contextlib.closing(self._operations.list(who(request), number, offset, with_attr=with_attr)) as entries:
            for entry in entries:
                needed = add(ctypes.addressof(buffer) + filled, size - filled, entry)
                if needed > size - filled:
                    break
                filled += needed
        libfuse.library.fuse_reply_buf(request, ctypes.addressof(buffer), filled)

    # Extended attributes

    def _do_setxattr(self, request: int, inode: int, name: bytes, value: int, size: int, flags: int) -> None:
        data = ctypes.string_at(value, size) if size else b""
        self._operations.setxattr(who(request), inode, name, data, flags)
        send_error(request, 0)

    def _do_getxattr(self, request: int, inode: int, name: bytes, size: int) -> None:
        send_xattr(request, size, self._operations.getxattr(who(request), inode, name))

    def _do_listxattr(self, request: int, inode: int, size: int) -> None:
        send_xattr(request, size, self._operations.listxattr(who(request), inode))

    def _do_removexattr(self, request: int, inode: int, name: bytes) -> None:
        self._operations.removexattr(who(request), inode, name)
        send_error(request, 0)


def _answering(name: str, method: Callable[..., None]) -> Callable[..., None]:
    """`method`, with its failure as the answer. Methods send their answer last, so it is not sent twice."""

    def call(request: int, *arguments: Any) -> None:
        try:
            method(request, *arguments)
        except OSError as e:
            send_error(request, e.errno or errno.EIO)
        except BaseException:
            log.exception("%s failed", name)
            send_error(request, errno.EIO)

    return call
