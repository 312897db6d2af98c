"""Path walks: from a directory inode and a path to a parent, a name and an inode."""

from __future__ import annotations

from fs3.core.errors import Fs3Error, error
from fs3.kv.api import Transaction
from fs3.meta import access, keys, model, tree
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Caller, PathAt

_DOT = b"."
_DOTDOT = b".."


class Found:
    """Where a path leads.

    `parent` and a usable `name` are there unless the path ended in "", "." or ".."; `child` is None when the last
    component does not exist. `as_directory`: the path ended in a slash.
    """

    __slots__ = ("as_directory", "child", "name", "parent")

    def __init__(self, parent: InodeRecord | None, name: bytes, child: InodeRecord | None, as_directory: bool) -> None:
        self.parent = parent
        self.name = name
        self.child = child
        self.as_directory = as_directory

    def existing(self) -> InodeRecord:
        """The inode, or NOT_FOUND."""
        if self.child is None:
            raise missing(self.name)
        return self.child


def missing(name: bytes) -> Fs3Error:
    """ENOENT."""
    return error(Code.CODE_NOT_FOUND, f"{name.decode(errors='backslashreplace')!r} does not exist")


def not_directory(record: InodeRecord) -> Fs3Error:
    """ENOTDIR."""
    return error(Code.CODE_NOT_DIRECTORY, f"inode {record.attr.inode:#x} is not a directory")


def check_name(name: bytes) -> None:
    """Raise NAME_TOO_LONG or INVALID_ARGUMENT for what cannot be one component."""
    if len(name) > model.NAME_BYTES_MAX:
        raise error(Code.CODE_NAME_TOO_LONG, f"a name has at most {model.NAME_BYTES_MAX} bytes, not {len(name)}")
    if not name or b"/" in name or b"\0" in name:
        raise error(Code.CODE_INVALID_ARGUMENT, "a name is not empty and holds neither a slash nor a zero byte")


def _split(path: bytes) -> list[bytes]:
    """Components, last first."""
    if len(path) > model.PATH_BYTES_MAX:
        raise error(Code.CODE_NAME_TOO_LONG, f"a path has at most {model.PATH_BYTES_MAX} bytes, not {len(path)}")
    if b"\0" in path:
        raise error(Code.CODE_INVALID_ARGUMENT, "a path holds no zero byte")
    if b"/" not in path:
        return [path] if path else []
    return [part for part in path.split(b"/") if part][::-1]


async def entry_of(tr: Transaction, directory: InodeRecord, name: bytes) -> InodeRecord | None:
    """The inode behind `name` in `directory`, or None. Permissions are the caller's business."""
    if len(name) > model.NAME_BYTES_MAX:
        check_name(name)
    value = await tr.get(keys.dirent(directory.attr.inode, name))
    if value is None:
        return None
    ino, _ = model.decode_dirent(value)
    child = await tree.load(tr, ino)
    if child is None:
        raise error(Code.CODE_INTERNAL, f"directory {directory.attr.inode:#x} names inode {ino:#x}, which is gone")
    return child


async def parent_of(tr: Transaction, directory: InodeRecord) -> InodeRecord:
    """What ".." names; the root is its own parent. Raises NOT_FOUND from a directory that has been removed."""
    if directory.attr.inode == keys.ROOT_INODE:
        return directory
    in_trash = directory.attr.parent == keys.TRASH_INODE
    parent = None if in_trash else await tree.load(tr, directory.attr.parent)
    if parent is None:
        raise missing(_DOTDOT)
    return parent


def enter(directory: InodeRecord, caller: Caller) -> None:
    """Raise NOT_DIRECTORY, ACCESS or NOT_FOUND unless the caller may search the directory."""
    if directory.attr.type != model.DIRECTORY:
        raise not_directory(directory)
    access.require(directory.attr, caller, access.SEARCH)


async def walk(tr: Transaction, at: PathAt, caller: Caller, *, follow: bool, entry: bool = False) -> Found:
    """Resolve `at`. Symlinks in the middle are followed; the last one if `follow`, or if a slash follows it.

    With `entry` the last component itself is meant (unlink, rename): it is never followed. Raises NOT_FOUND for a
    missing directory on the way, NOT_DIRECTORY, ACCESS, SYMLINK_LOOP, NAME_TOO_LONG, STALE_HANDLE.
    """
    path = at.path
    current = await tree.load_handle(tr, at.inode)
    parts = _split(path)
    if not parts:
        return Found(None, b"", current, False)
    as_directory = path.endswith(b"/")
    links = 0
    while True:
        name = parts.pop()
        enter(current, caller)
        if name in (_DOT, _DOTDOT):
            if name == _DOTDOT:
                current = await parent_of(tr, current)
            if not parts:
                return Found(None, name, current, True)
            continue
        child = None if tree.removed(current) else await entry_of(tr, current, name)
        if child is None:
            if parts or tree.removed(current):
                raise missing(name)
            return Found(current, name, None, as_directory)
        if child.attr.type == model.SYMLINK and (parts or (not entry and (follow or as_directory))):
            links += 1
            if links > model.SYMLINKS_MAX:
                raise error(Code.CODE_SYMLINK_LOOP, f"more than {model.SYMLINKS_MAX} symbolic links")
            target = child.attr.symlink_target
            as_directory = as_directory or (not parts and target.endswith(b"/"))
            if target.startswith(b"/"):
                current = await tree.load_handle(tr, keys.ROOT_INODE)
            parts.extend(_split(target))
            if not parts:
                return Found(None, b"/", current, True)
            continue
        if not parts:
            if as_directory and child.attr.type != model.DIRECTORY:
                raise not_directory(child)
            return Found(current, name, child, as_directory)
        current = child


async def target(tr: Transaction, at: PathAt, caller: Caller) -> InodeRecord:
    """The inode that `at` names, following as it says. Raises NOT_FOUND and what :func:`walk` raises."""
    return (await walk(tr, at, caller, follow=at.follow)).existing()


def writable_parent(found: Found, caller: Caller) -> InodeRecord:
    """The directory in which an entry is to change; raises ACCESS when the caller may not write it."""
    assert found.parent is not None
    access.require(found.parent.attr, caller, access.WRITE)
    return found.parent
