"""System calls as data: how one is drawn, done, and written down. Paths are relative to the working directory.

An operation is a list, so that it can be sent to a process and pasted into a test: the user, the call, arguments.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import hashlib
import itertools
import os
import random
import stat
from collections.abc import Callable
from typing import Any, Final

Operation = list[Any]
# Errno, 0 for success, and what the call returned.
Outcome = list[Any]

# The working directory's name in the directory that belongs to a run.
WORK: Final = "work"
NAMES: Final = ("a", "b", "c", "d")
DEPTH_MAX: Final = 3
# How often a path is one that exists.
EXISTING: Final = 0.7
MODES: Final = (0o777, 0o755, 0o700, 0o644, 0o600, 0o444, 0o000, 0o1777, 0o2775, 0o4755, 0o6777, 0o2644)
LENGTHS: Final = (0, 1, 100, 4095, 4096, 4097, 70_000, 200_000)
XATTRS: Final = ("user.a", "user.b", "trusted.c")
TARGETS: Final = ("a", "b/c", "../a", "..", ".", "d/../b", "missing", "a/b/c/d")
# Without (-1, -1), which takes set-id bits away: the kernel does not tell a file system in user space of it.
OWNERS_AND_GROUPS: Final = tuple(itertools.product((-1, 0, 12345, 12346), (-1, 0, 12345, 23456)))[1:]

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
AT_FDCWD: Final = -100

# Times before this are set by the test and have to be exact; later ones are the clock's.
EXPLICIT_NS_MAX: Final = 10**18

_libc = ctypes.CDLL(None, use_errno=True)


def perform(operation: Operation) -> Outcome:
    """Do it, as the user that this process is."""
    _, name, *arguments = operation
    try:
        return [0, _CALLS[name](*arguments)]
    except OSError as exc:
        return [exc.errno, None]


def describe(operation: Operation) -> str:
    """As a line for people."""
    user, name, *arguments = operation
    shown = [oct(a) if isinstance(a, int) and name in ("chmod", "mkdir", "create") else repr(a) for a in arguments]
    return f"{user:5} {name}({', '.join(shown)})"


# ---- the calls


def _create(path: str, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def _open(path: str, flags: int) -> None:
    os.close(os.open(path, flags, 0o644))


def _write(path: str, flags: int, offset: int, length: int, seed: int) -> int:
    descriptor = os.open(path, os.O_WRONLY | flags, 0o666)
    try:
        return os.pwrite(descriptor, random.Random(seed).randbytes(length), offset)
    finally:
        os.close(descriptor)


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        data = os.read(descriptor, 1 << 20)
        return f"{len(data)} {hash_of(data)}"
    finally:
        os.close(descriptor)


def _rename(path: str, to: str, flags: int) -> None:
    if _libc.renameat2(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(to), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def _utimens(path: str, atime_ns: int, mtime_ns: int) -> list[int]:
    os.utime(path, ns=(atime_ns, mtime_ns))
    found = os.stat(path)
    return [found.st_atime_ns, found.st_mtime_ns]


def _setxattr(path: str, name: str, value: str, flags: int, follow: bool) -> None:
    os.setxattr(path, name, value.encode(), flags, follow_symlinks=follow)


def _getxattr(path: str, name: str) -> str:
    return os.getxattr(path, name).decode()


def _stat(path: str) -> list[Any]:
    return seen(os.stat(path))


def _link(path: str, to: str, follow: bool) -> None:
    os.link(path, to, follow_symlinks=follow)


def _fifo(path: str, mode: int) -> None:
    os.mknod(path, mode | stat.S_IFIFO)


def _unlinked_use(path: str, length: int) -> list[Any]:
    """Unlink an open file, and use it on."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.unlink(path)
        os.pwrite(descriptor, b"x" * length, 10)
        os.ftruncate(descriptor, length)
        found = os.fstat(descriptor)
        return [found.st_nlink, found.st_size, hash_of(os.pread(descriptor, length, 0))]
    finally:
        os.close(descriptor)


_CALLS: Final[dict[str, Callable[..., Any]]] = {
    "create": _create,
    "open": _open,
    "mkdir": os.mkdir,
    "fifo": _fifo,
    "symlink": lambda path, target: os.symlink(target, path),
    "link": _link,
    "unlink": os.unlink,
    "unlinked_use": _unlinked_use,
    "rmdir": os.rmdir,
    "rename": _rename,
    "chmod": os.chmod,
    "chown": lambda path, uid, gid, follow: os.chown(path, uid, gid, follow_symlinks=follow),
    "truncate": os.truncate,
    "write": _write,
    "read": _read,
    "readdir": lambda path: sorted(os.listdir(path)),
    "stat": _stat,
    "access": os.access,
    "utimens": _utimens,
    "setxattr": _setxattr,
    "getxattr": _getxattr,
    "listxattr": lambda path: sorted(os.listxattr(path)),
    "removexattr": os.removexattr,
}


# ---- what can be seen


def hash_of(data: bytes) -> str:
    """Short and sure enough."""
    return base64.b64encode(hashlib.sha256(data).digest()[:9]).decode()


def _time(ns: int) -> int | str:
    return ns if ns < EXPLICIT_NS_MAX else "now"


def seen(found: os.stat_result) -> list[Any]:
    """Attributes that have to be equal; the length of a directory is its file system's own business."""
    length = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    kind = stat.filemode(found.st_mode)
    return [kind, found.st_uid, found.st_gid, found.st_nlink, length, _time(found.st_mtime_ns)]


def snapshot() -> dict[str, list[Any]]:
    """Everything below the directory above, where symbolic links may lead; to be called by root.

    By path: attributes, the first path of the same inode, extended attributes, content; last the exact times of
    modification and change.
    """
    paths: list[str] = [".."]
    for directory, names, files in os.walk(".."):
        paths += [os.path.join(directory, name) for name in (*names, *files)]
    inodes: dict[int, str] = {}
    found: dict[str, list[Any]] = {}
    for path in sorted(paths):
        attributes = os.lstat(path)
        first = inodes.setdefault(attributes.st_ino, path)
        times = [attributes.st_mtime_ns, attributes.st_ctime_ns]
        found[path] = [*seen(attributes), first, _xattrs(path), _content(path, attributes), times]
    return found


def _xattrs(path: str) -> dict[str, str]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return {name: os.getxattr(path, name, follow_symlinks=False).decode() for name in names if name in XATTRS}


def _content(path: str, attributes: os.stat_result) -> str:
    if stat.S_ISLNK(attributes.st_mode):
        return os.readlink(path)
    return _read(path) if stat.S_ISREG(attributes.st_mode) else ""


# ---- drawing


class Drawer:
    """Draws operations, most of which have something to do."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.known: list[str] = ["."]

    def learn(self, tree: dict[str, list[Any]]) -> None:
        """Take what a snapshot shows in the working directory."""
        top = f"../{WORK}"
        self.known = [".", *(f".{path.removeprefix(top)}" for path in tree if path.startswith(f"{top}/"))]

    def path(self, existing: float = EXISTING) -> str:
        """A path, often one that is there."""
        rng = self._rng
        if rng.random() < existing and len(self.known) > 1:
            return rng.choice(self.known[1:])
        parents = [path for path in self.known if path.count("/") < DEPTH_MAX]
        return os.path.join(rng.choice(parents), rng.choice(NAMES))

    def operation(self) -> Operation:
        """The next one."""
        rng = self._rng
        name = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))[0]
        user = rng.choice(("root", "root", "user"))
        return [user, name, *self._arguments(name)]

    def _arguments(self, name: str) -> list[Any]:
        rng = self._rng
        match name:
            case "create" | "mkdir" | "fifo":
                return [self.path(0.15), rng.choice(MODES)]
            case "symlink":
                return [self.path(0.15), rng.choice(TARGETS)]
            case "link":
                return [self.path(), self.path(0.2), rng.random() < 0.3]
            case "rename":
                flags = rng.choice((0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE))
                return [self.path(), self.path(0.5), flags]
            case "chmod":
                return [self.path(), rng.choice(MODES)]
            case "chown":
                return [self.path(), *rng.choice(OWNERS_AND_GROUPS), rng.random() < 0.7]
            case "truncate":
                return [self.path(), rng.choice(LENGTHS)]
            case "unlinked_use":
                return [self.path(), rng.choice(LENGTHS)]
            case "open":
                flags = (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT, os.O_RDONLY)
                extra = rng.choice((0, 0, os.O_NOFOLLOW, os.O_DIRECTORY))
                return [self.path(), rng.choice(flags) | extra | os.O_NONBLOCK]
            case "write":
                flags = rng.choice((0, 0, os.O_CREAT, os.O_TRUNC, os.O_APPEND)) | os.O_NONBLOCK
                return [self.path(), flags, rng.choice(LENGTHS), rng.choice(LENGTHS), rng.randrange(1000)]
            case "utimens":
                return [self.path(), rng.randrange(10**18), rng.randrange(10**18)]
            case "access":
                return [self.path(), rng.randrange(8)]
            case "setxattr":
                flags = rng.choice((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE))
                # Never the same value twice, which ext4 takes for no change.
                value = f"{rng.randrange(10**9)}" * rng.choice((1, 10))
                return [self.path(), rng.choice(XATTRS), value, flags, rng.random() < 0.8]
            case "getxattr" | "removexattr":
                return [self.path(), rng.choice(XATTRS)]
            case _:
                return [self.path()]


_WEIGHTS: Final = {
    "create": 10,
    "mkdir": 12,
    "fifo": 2,
    "symlink": 6,
    "link": 8,
    "unlink": 6,
    "unlinked_use": 2,
    "rmdir": 5,
    "rename": 16,
    "chmod": 8,
    "chown": 8,
    "truncate": 5,
    "open": 6,
    "write": 10,
    "read": 3,
    "readdir": 3,
    "stat": 3,
    "access": 3,
    "utimens": 4,
    "setxattr": 6,
    "getxattr": 3,
    "listxattr": 2,
    "removexattr": 3,
}

# Two file systems may give different reasons where several hold, and POSIX leaves it to them.
EQUIVALENT: Final[tuple[frozenset[int], ...]] = (frozenset({errno.EEXIST, errno.ENOTEMPTY}),)


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes are the same to a program."""
    return one == other or {one[0], other[0]} in EQUIVALENT
