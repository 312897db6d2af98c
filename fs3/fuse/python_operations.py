"""What a mount of the fusepy engine does for each request of the kernel, on the native client; no FUSE in here.

The rules are those of the native engine (crate fs3-fuse): the kernel checks permissions where it is told to, the
service checks them again in the caller's name. Unlike there nothing is kept back: a write returns when every serving
replica has it. All methods block, raise OSError, and may be called from any thread.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from fs3.fuse.options import MountOptions
from fs3.fuse.python_handles import (
    DIRECTORY_PAGE,
    FIRST_ENTRY,
    SET_ID_BITS,
    TELL_CLOSE,
    TELL_SYNC,
    TELL_WRITE,
    Directories,
    Handle,
    OpenFiles,
    Recent,
    Version,
)
from fs3.fuse.python_locks import Lock, Locks
from fs3.native import Attr, Client, File, Operation, Statfs
from fs3.v1.meta_pb2 import FileType, XattrBit

log = logging.getLogger(__name__)
T = TypeVar("T")

TOLD_MAX = 1 << 14
CALLERS_MAX = 256
PUBLISH_AGE_S = 3.0
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 1, 2, 16
# Set by the kernel in the flags of an open for execution; read permission is not needed then.
FMODE_EXEC = 0x20

_KINDS = {
    stat.S_IFIFO: FileType.FILE_TYPE_FIFO,
    stat.S_IFSOCK: FileType.FILE_TYPE_SOCKET,
    stat.S_IFCHR: FileType.FILE_TYPE_CHAR_DEVICE,
    stat.S_IFBLK: FileType.FILE_TYPE_BLOCK_DEVICE,
}
_ACLS = {
    b"system.posix_acl_access": XattrBit.XATTR_BIT_ACCESS_ACL,
    b"system.posix_acl_default": XattrBit.XATTR_BIT_DEFAULT_ACL,
}
_BITS = {b"security.capability": XattrBit.XATTR_BIT_CAPABILITY, **_ACLS}


class Who(NamedTuple):
    """The process behind a request."""

    uid: int
    gid: int
    pid: int
    umask: int


class Shown(NamedTuple):
    """What is remembered of attributes that the kernel was told."""

    length: int
    mtime_ns: int
    xattrs: int


@dataclass(frozen=True, slots=True)
class Opened:
    """What an open answers."""

    handle: int
    keep_cache: bool
    direct_io: bool


class Listed(NamedTuple):
    """One entry of a listing: the offset behind it, name, inode, type, attributes if asked for."""

    next: int
    name: bytes
    inode: int
    type: int
    attr: Attr | None


def fail(number: int) -> OSError:
    """An error that is nothing but its number."""
    return OSError(number, os.strerror(number))


def groups_of(pid: int) -> list[int]:
    """The supplementary groups of a process; none when it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
            line = next((line for line in status if line.startswith("Groups:")), "Groups:")
    except OSError:
        return []
    return [int(word) for word in line.split()[1:]]


def without_set_id(mode: int) -> int:
    """The mode of a file after a write: no set-user-id, and no set-group-id where the group executes."""
    return mode & ~SET_ID_BITS if mode & 0o010 else mode & ~0o4000


class Operations:
    """The state of one mount. `invalidate` makes the kernel ask for the attributes of an inode."""

    def __init__(self, client: Client, options: MountOptions, invalidate: Callable[[int], None]) -> None:
        self._client = client
        self._checked = options.default_permissions
        self._uncached = options.cache == "none"
        self._invalidate = invalidate
        self._root = client.acting_as(0, 0, [])
        self._acting = functools.lru_cache(CALLERS_MAX)(self._act)
        self._told: Recent[int, Shown] = Recent(TOLD_MAX, options.attr_timeout_s)
        self.files = OpenFiles()
        self._directories = Directories()
        self.locks = Locks(client)

    def _act(self, uid: int, gid: int, groups: tuple[int, ...]) -> Client:
        return self._client.acting_as(uid, gid, list(groups))

    def _with_groups(self, who: Who) -> Client:
        return self._acting(who.uid, who.gid, tuple(groups_of(who.pid)))

    def _run(self, who: Who, operation: Callable[[Client], Operation[T]]) -> T:
        """First without the supplementary groups; when it is refused, which has no effect, again with them."""
        try:
            return operation(self._acting(who.uid, who.gid, ())).wait()
        except PermissionError:
            groups = groups_of(who.pid) if who.uid != 0 else []
            if not groups:
                raise
            return operation(self._acting(who.uid, who.gid, tuple(groups))).wait()

    def _tell(self, attr: Attr) -> Attr:
        self._told.put(attr.inode, Shown(attr.length, attr.mtime_ns, attr.xattrs))
        node = self.files.node(attr.inode)
        if node is not None:
            node.set_id = bool(attr.mode & SET_ID_BITS)
        return attr

    def _refresh_kernel(self, attr: Attr) -> None:
        """If the kernel's attributes may not be these, it is made to ask: its reads end where it believes the end."""
        if self._told.get(attr.inode) != Shown(attr.length, attr.mtime_ns, attr.xattrs):
            self._invalidate(attr.inode)

    # Names and attributes

    def lookup(self, who: Who, parent: int, name: bytes) -> Attr:
        """Attributes of an entry."""
        return self._tell(self._run(who, lambda c: c.stat(name, inode=parent, follow=False)))

    def getattr(self, inode: int) -> Attr:
        """Attributes of an inode."""
        return self._tell(self._root.stat(b"", inode=inode).wait())

    def setattr(self, who: Who, inode: int, length: int | None, handle: Handle | None, change: dict[str, Any]) -> Attr:
        """Change the length and then what `change` names, as :meth:`Client.setattr` does."""
        attr = None
        node = self.files.node(inode)
        if node is not None and node.writers:
            # The time of what was written before must not overtake the change.
            node.writers[-1].publish().wait()
        if length is not None:
            self.files.truncated(inode)
            if handle is not None and handle.write:
                attr = handle.file.truncate(length).wait()
            else:
                attr = self._run(who, lambda c: c.truncate(b"", length, inode=inode))
            self.files.truncated(inode)
        if change:
            attr = self._change(who, inode, change)
        return self._tell(attr) if attr is not None else self.getattr(inode)

    def _change(self, who: Who, inode: int, change: dict[str, Any]) -> Attr:
        # Without its groups the service would take a set-group-id bit away from a member of the group.
        groups_matter = "gid" in change or change.get("mode", 0) & 0o2000
        try:
            if who.uid != 0 and groups_matter:
                return self._with_groups(who).setattr(b"", inode=inode, **change).wait()
            return self._run(who, lambda c: c.setattr(b"", inode=inode, **change))
        except PermissionError:
            if self._only_drops_set_id(inode, change):
                return self._root.setattr(b"", inode=inode, **change).wait()
            raise

    def _only_drops_set_id(self, inode: int, change: dict[str, Any]) -> bool:
        """A write by somebody who is not the owner takes set-id bits away; the kernel asks in the writer's name."""
        if set(change) != {"mode"}:
            return False
        mode, now = change["mode"], self._root.stat(b"", inode=inode).wait().mode & 0o7777
        return bool(mode & ~SET_ID_BITS == now & ~SET_ID_BITS and not mode & SET_ID_BITS & ~now)

    def _drop_set_id(self, inode: int) -> None:
        now = self._root.stat(b"", inode=inode).wait()
        mode = without_set_id(now.mode)
        if mode != now.mode:
            self._tell(self._root.setattr(b"", inode=inode, mode=mode).wait())
            self._invalidate(inode)

    def readlink(self, inode: int) -> bytes:
        """Where a symlink points."""
        attr = self._root.stat(b"", inode=inode).wait()
        if attr.type != FileType.FILE_TYPE_SYMLINK:
            raise fail(errno.EINVAL)
        return attr.symlink_target

    def mknod(self, who: Who, parent: int, name: bytes, mode: int, rdev: int) -> Attr:
        """Make a file, fifo, socket or device."""
        new: dict[str, Any] = {"mode": mode & 0o7777, "umask": who.umask, "rdev": rdev}
        kind = _KINDS.get(stat.S_IFMT(mode), FileType.FILE_TYPE_FILE)
        return self._tell(self._run(who, lambda c: c.mknod(name, inode=parent, kind=kind, **new)))

    def mkdir(self, who: Who, parent: int, name: bytes, mode: int) -> Attr:
        """Make a directory."""
        bits = mode & 0o7777
        return self._tell(self._run(who, lambda c: c.mkdir(name, inode=parent, mode=bits, umask=who.umask)))

    def symlink(self, who: Who, parent: int, name: bytes, target: bytes) -> Attr:
        """Make a symlink."""
        return self._tell(self._run(who, lambda c: c.symlink(name, target, inode=parent)))

    def link(self, who: Who, inode: int, parent: int, name: bytes) -> Attr:
        """Give an inode another name."""
        return self._tell(self._run(who, lambda c: c.link(b"", name, inode=inode, to_inode=parent)))

    def unlink(self, who: Who, parent: int, name: bytes) -> None:
        """Remove a name that is not a directory."""
        self._run(who, lambda c: c.unlink(name, inode=parent))

    def rmdir(self, who: Who, parent: int, name: bytes) -> None:
        """Remove an empty directory."""
        self._run(who, lambda c: c.rmdir(name, inode=parent))

    def rename(self, who: Who, source: tuple[int, bytes], target: tuple[int, bytes], flags: int) -> None:
        """Rename; both are (directory, name)."""
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise fail(errno.EINVAL)
        how = {"no_replace": bool(flags & RENAME_NOREPLACE), "exchange": bool(flags & RENAME_EXCHANGE)}
        (parent, name), (to, new_name) = source, target
        self._run(who, lambda c: c.rename(name, new_name, inode=parent, to_inode=to, **how))

    def statfs(self, inode: int) -> Statfs:
        """Space as a user of this directory has it."""
        return self._root.statfs(inode=inode).wait()

    # Open files

    def open(self, who: Who, inode: int, flags: int) -> Opened:
        """Open a file."""
        access = flags & os.O_ACCMODE
        read, write = access != os.O_WRONLY and not flags & FMODE_EXEC, access != os.O_RDONLY
        truncate = write and bool(flags & os.O_TRUNC)
        if truncate:
            self.files.truncated(inode)
        how = {"read": read, "write": write, "truncate": truncate}
        return self._opened(self._run(who, lambda c: c.open(b"", inode=inode, **how)), flags, how)

    def create(self, who: Who, parent: int, name: bytes, mode: int, flags: int) -> tuple[Attr, Opened]:
        """Make and open a file; without O_EXCL one that another client has made meanwhile is opened."""
        access = flags & os.O_ACCMODE
        read, write = access != os.O_WRONLY, access != os.O_RDONLY
        how = {"read": read, "write": write, "truncate": write and bool(flags & os.O_TRUNC)}
        new: dict[str, Any] = {"mode": mode & 0o7777, "umask": who.umask, "exclusive": bool(flags & os.O_EXCL)}
        file = self._run(who, lambda c: c.create(name, inode=parent, follow=False, **new, **how))
        attr = self._tell(file.attr())
        return attr, self._opened(file, flags, how)

    def _opened(self, file: File, flags: int, how: dict[str, bool]) -> Opened:
        attr, write = file.attr(), how["write"]
        if how["truncate"]:
            self.files.truncated(attr.inode)
        keep = self.files.keep_cache(attr.inode, Version.of(attr))
        if flags & os.O_NOATIME:
            file.keep_atime()
        elif keep and how["read"] and attr.length > 0:
            # What the kernel reads from its cache it does not tell.
            file.note_read()
        self._refresh_kernel(attr)
        # The kernel caches what it appends where it believes the end to be; so its page cache is left out.
        direct = self._uncached or bool(flags & os.O_DIRECT) or (write and bool(flags & os.O_APPEND))
        number = self.files.add(file, write=write, sync=direct and bool(flags & os.O_DSYNC))
        node = self.files.node(attr.inode)
        if node is not None:
            node.set_id = bool(attr.mode & SET_ID_BITS)
        return Opened(number, keep, direct)

    def handle(self, number: int) -> Handle:
        """The handle that a request names. Raises EBADF; EIO when locks it had are lost."""
        handle = self.files.get(number)
        if handle is None:
            raise fail(errno.EBADF)
        self.locks.check(handle)
        return handle

    def read(self, number: int, buffer: memoryview, offset: int) -> int:
        """Read into `buffer`; how many bytes came."""
        file = self.handle(number).file
        if self._uncached and offset + len(buffer) > file.length:
            file.refresh().wait()
        return file.pread_into(buffer, offset).wait()

    def write(self, who: Who, number: int, data: bytes, offset: int, *, append: bool) -> int:
        """Write `data` at `offset`, or with `append` at the end, wherever that is; where its first byte is now."""
        handle = self.handle(number)
        if who.uid != 0 and handle.node.set_id:
            self._drop_set_id(handle.node.inode)
        failure = handle.new_failure(TELL_WRITE)
        if failure is not None:
            raise failure
        try:
            with self.files.writing(handle):
                if append:
                    offset = handle.file.append(data).wait() - len(data)
                else:
                    handle.file.pwrite(data, offset).wait()
        except OSError:
            handle.new_failure(TELL_WRITE)
            raise
        if handle.sync:
            self.fsync(number)
        elif self._uncached:
            self._publish(handle.node.inode, handle.file)
        return offset

    def flush(self, number: int, owner: int) -> None:
        """A descriptor is closed by `owner` of locks: others shall see what was written. Raises what is untold."""
        handle = self.files.get(number)
        if handle is None:
            raise fail(errno.EBADF)
        try:
            if handle.write:
                self._publish(handle.node.inode, handle.file)
        finally:
            self.locks.closed_by(handle.node.inode, owner)
        self.locks.check(handle)
        failure = handle.new_failure(TELL_CLOSE)
        if failure is not None:
            raise failure

    def _publish(self, inode: int, file: File) -> None:
        before_s = time.monotonic()
        file.publish().wait()
        node = self.files.node(inode)
        if node is not None:
            self.files.published(node, before_s)

    def fsync(self, number: int) -> None:
        """Make everything written to the file survive power loss."""
        handle = self.handle(number)
        failure = handle.new_failure(TELL_SYNC)
        if failure is not None:
            raise failure
        # A handle that only reads has no session to publish a length with.
        writers = handle.node.writers
        before_s = time.monotonic()
        (handle.file if handle.write or not writers else writers[-1]).sync().wait()
        self.files.published(handle.node, before_s)

    def release(self, number: int) -> None:
        """The kernel's last reference to a handle is gone."""
        handle = self.files.remove(number)
        if handle is None:
            return
        try:
            handle.file.close().wait()
        except OSError as e:
            log.warning("closing inode %d failed: %s", handle.node.inode, e)
        # After what was written under them is there for all to see.
        self.locks.released(handle)

    def fallocate(self, who: Who, number: int, mode: int, offset: int, length: int) -> None:
        """Make files longer, holes, zeros. Space is not reserved; a cluster that has less free refuses."""
        handle = self.handle(number)
        keep, what = mode & FALLOC_KEEP_SIZE, mode & ~FALLOC_KEEP_SIZE
        clears = what == FALLOC_ZERO_RANGE or (what == FALLOC_PUNCH_HOLE and bool(keep))
        if what and not clears:
            raise fail(errno.EOPNOTSUPP)
        if not what and self._root.statfs().wait().free_bytes < length:
            raise fail(errno.ENOSPC)
        if keep and not clears:
            return
        if who.uid != 0 and handle.node.set_id:
            self._drop_set_id(handle.node.inode)
        with self.files.writing(handle):
            if clears:
                handle.file.punch(offset, length).wait()
            if not keep:
                handle.file.extend(offset + length).wait()

    def seek(self, number: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise fail(errno.EINVAL)
        handle = self.handle(number)
        self.getattr(handle.node.inode)
        found = handle.file.seek_sparse(offset, whence == os.SEEK_HOLE).wait() if offset >= 0 else None
        if found is None:
            raise fail(errno.ENXIO)
        return found

    # Locks

    def unlock(self, number: int, lock: Lock) -> None:
        """End locks of an owner, after what was written under them is there for all to see."""
        handle = self.handle(number)

        def publish() -> None:
            if handle.node.writers:
                self._publish(handle.node.inode, handle.node.writers[-1])

        self.locks.unlock(handle, lock, publish)

    def catch_up(self, attr: Attr) -> bool:
        """A lock was granted, and who had it may have written: whether what the kernel has cached is still the file."""
        keep = self.files.keep_cache(attr.inode, Version.of(attr))
        self._refresh_kernel(attr)
        return keep

    # Directories

    def opendir(self, inode: int) -> int:
        """Open a directory; its number."""
        return self._directories.add(inode)

    def releasedir(self, number: int) -> None:
        """The kernel closed a directory."""
        self._directories.remove(number)

    def list(self, who: Who, number: int, offset: int, *, with_attr: bool) -> Generator[Listed]:
        """Entries from `offset` on, of one page at most once there was one; the caller stops when it has enough."""
        directory = self._directories.get(number)
        if directory is None:
            raise fail(errno.EBADF)
        client = self._root if self._checked else self._with_groups(who)
        with directory.lock:
            if offset == 0:
                directory.rewind()
            fetched = False
            while True:
                there = directory.at(max(offset, FIRST_ENTRY), with_attr)
                if isinstance(there, tuple):
                    if fetched and offset > FIRST_ENTRY:
                        return
                    first, after = there
                    page = client.list_page(b"", after, DIRECTORY_PAGE, inode=directory.inode, with_attr=with_attr)
                    entries, end, directory.parent = page.wait()
                    directory.fill(first, after, entries, end, with_attr)
                    fetched = True
                    continue
                dots = [(b".", directory.inode), (b"..", directory.parent)]
                for name, inode in dots[offset:]:
                    offset += 1
                    yield Listed(offset, name, inode, FileType.FILE_TYPE_DIRECTORY, None)
                if not there:
                    return
                for entry in there:
                    offset += 1
                    attr = self._tell(entry.attr) if entry.attr is not None else None
                    yield Listed(offset, entry.name, entry.inode, entry.type, attr)

    # Extended attributes

    def _check_kind(self, name: bytes) -> None:
        if name not in _ACLS and not name.startswith((b"user.", b"trusted.", b"security.")):
            raise fail(errno.EOPNOTSUPP)

    def _has_xattr(self, inode: int, bit: int) -> bool:
        """As attributes tell: programs ask for some on every file, and the kernel for one before it writes."""
        shown = self._told.get(inode)
        return bool((shown.xattrs if shown is not None else self.getattr(inode).xattrs) & bit)

    def getxattr(self, who: Who, inode: int, name: bytes) -> bytes:
        """The value of an extended attribute."""
        self._check_kind(name)
        if not self._has_xattr(inode, _BITS.get(name, XattrBit.XATTR_BIT_ANY)):
            raise fail(errno.ENODATA)
        if name.startswith(b"user."):
            return self._run(who, lambda c: c.getxattr(b"", name, inode=inode))
        # The kernel has checked the caller's capabilities; where it asks for itself, in anybody's name, there are none.
        return self._root.getxattr(b"", name, inode=inode).wait()

    def listxattr(self, who: Who, inode: int) -> bytes:
        """The names that the caller may know of, a zero byte behind each."""
        if not self._has_xattr(inode, XattrBit.XATTR_BIT_ANY):
            return b""
        names = self._acting(who.uid, who.gid, ()).listxattr(b"", inode=inode).wait()
        return b"".join(name + b"\0" for name in names)

    def setxattr(self, who: Who, inode: int, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute."""
        self._check_kind(name)
        node = self.files.node(inode)
        if name == b"security.capability" and node is not None and node.writers:
            # What was written before must not take it away when it is published.
            self._publish(inode, node.writers[-1])
        if name.startswith(b"user."):
            attr = self._run(who, lambda c: c.setxattr(b"", name, value, flags, inode=inode))
        else:
            client = self._with_groups(who) if name in _ACLS else self._root
            attr = client.setxattr(b"", name, value, flags, inode=inode).wait()
        self._tell(attr)

    def removexattr(self, who: Who, inode: int, name: bytes) -> None:
        """Remove an extended attribute."""
        self._check_kind(name)
        if name.startswith(b"user.") or name in _ACLS:
            self._tell(self._run(who, lambda c: c.removexattr(b"", name, inode=inode)))
        else:
            # The kernel removes capabilities before a write, in the name of who writes.
            self._tell(self._root.removexattr(b"", name, inode=inode).wait())

    # The mount as a whole

    def publish_aged(self, age_s: float = PUBLISH_AGE_S) -> None:
        """Tell the service of what was written `age_s` seconds ago to files that are still open."""
        for node, file in self.files.unpublished(age_s):
            try:
                self._publish(node.inode, file)
            except OSError as e:
                log.warning("publishing inode %d failed: %s", node.inode, e)

    def end(self) -> None:
        """The kernel is gone: close what is open, and leave the cluster."""
        for number in self.files.numbers():
            self.release(number)
        self._client.close().wait()
