"""Attributes as Python programs expect them."""

from __future__ import annotations

import os
import stat as stat_module
from collections.abc import Callable

from fs3 import native
from fs3.v1.meta_pb2 import FileType

BLOCK_BYTES = 512

FORMATS = {
    FileType.FILE_TYPE_FILE: stat_module.S_IFREG,
    FileType.FILE_TYPE_DIRECTORY: stat_module.S_IFDIR,
    FileType.FILE_TYPE_SYMLINK: stat_module.S_IFLNK,
    FileType.FILE_TYPE_FIFO: stat_module.S_IFIFO,
    FileType.FILE_TYPE_SOCKET: stat_module.S_IFSOCK,
    FileType.FILE_TYPE_CHAR_DEVICE: stat_module.S_IFCHR,
    FileType.FILE_TYPE_BLOCK_DEVICE: stat_module.S_IFBLK,
}
_FORMATS: dict[int, int] = {int(kind): bits for kind, bits in FORMATS.items()}


def stat_result(attr: native.Attr) -> os.stat_result:
    """Attributes in the form of :func:`os.stat`. ``st_dev`` is 0."""
    mode = _FORMATS.get(attr.type, 0) | attr.mode
    times_ns = (attr.atime_ns, attr.mtime_ns, attr.ctime_ns)
    seconds = tuple(ns // 1_000_000_000 for ns in times_ns)
    chunk_bytes = attr.layout.chunk_bytes if attr.layout is not None else 4096
    extra = {
        "st_atime": times_ns[0] / 1e9,
        "st_mtime": times_ns[1] / 1e9,
        "st_ctime": times_ns[2] / 1e9,
        "st_atime_ns": times_ns[0],
        "st_mtime_ns": times_ns[1],
        "st_ctime_ns": times_ns[2],
        "st_blksize": chunk_bytes,
        "st_blocks": -(-attr.length // BLOCK_BYTES),
        "st_rdev": attr.rdev,
    }
    values = (mode, attr.inode, 0, attr.nlink, attr.uid, attr.gid, attr.length, *seconds)
    return os.stat_result(values, extra)


def statvfs_result(statfs: native.Statfs) -> os.statvfs_result:
    """Capacity in the form of :func:`os.statvfs`, counted in blocks of 4 KiB."""
    block = 4096
    free = statfs.free_bytes // block
    # Without a quota inodes have no limit; a large number keeps programs that look at it content.
    free_inodes = 1 << 32 if statfs.free_inodes is None else statfs.free_inodes
    counts = (statfs.capacity_bytes // block, free, free, statfs.inodes + free_inodes, free_inodes, free_inodes)
    return os.statvfs_result((statfs.chunk_bytes or block, block, *counts, 0, statfs.name_bytes_max or 255))


# (path, follow_symlinks) -> attributes
Stat = Callable[[str, bool], os.stat_result]


def _no_stat(path: str, follow: bool) -> os.stat_result:
    raise TypeError(f"{path} is a symbolic link: await stat() of the file system to follow it")


class DirEntry:
    """An entry of a directory, like :class:`os.DirEntry`. Attributes are those of the listing.

    ``name`` is the name; ``path`` the path that :meth:`FileSystem.scandir` was given, joined with it. Where a symlink
    has to be followed the service is asked; entries of :class:`AsyncFileSystem` raise TypeError then.
    """

    __slots__ = ("_attr", "_kind", "_stat", "inode_number", "name", "path")

    def __init__(self, directory: str, entry: native.DirEntry, stat: Stat | None) -> None:
        self.name = os.fsdecode(entry.name)
        self.path = f"{directory.rstrip('/')}/{self.name}" if directory else self.name
        self.inode_number = entry.inode
        self._kind = entry.type
        self._attr = entry.attr
        self._stat = stat if stat is not None else _no_stat

    def __repr__(self) -> str:
        return f"<DirEntry {self.name!r}>"

    def __fspath__(self) -> str:
        return self.path

    def inode(self) -> int:
        """The inode; of the symlink itself if it is one."""
        return self.inode_number

    def is_symlink(self) -> bool:
        """Whether it is a symbolic link."""
        return self._kind == FileType.FILE_TYPE_SYMLINK

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a directory, or a symlink to one. A dangling symlink is none."""
        return self._is(FileType.FILE_TYPE_DIRECTORY, stat_module.S_ISDIR, follow_symlinks)

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        """Whether it is a regular file, or a symlink to one. A dangling symlink is none."""
        return self._is(FileType.FILE_TYPE_FILE, stat_module.S_ISREG, follow_symlinks)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Attributes as of the listing; of what a symlink points to (one round trip) unless told otherwise."""
        if self._attr is None or (follow_symlinks and self.is_symlink()):
            return self._stat(self.path, follow_symlinks)
        return stat_result(self._attr)

    def _is(self, kind: int, test: Callable[[int], bool], follow_symlinks: bool) -> bool:
        if not (follow_symlinks and self.is_symlink()):
            return self._kind == kind
        try:
            return test(self._stat(self.path, True).st_mode)
        except FileNotFoundError:
            return False
