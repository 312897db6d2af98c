"""The low-level interface of libfuse 3 by ctypes: requests name inodes, as fs3 does, not paths.

Package mfusepy knows what the structures of libfuse look like on each platform and in each version; its own interface
is the high-level one, by path, in which every name of a file is a file of its own to the kernel. Importing this raises
ImportError without mfusepy, OSError or AttributeError without a usable libfuse.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_double, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

# It would prefer libfuse 2, whose low-level interface differs.
os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")

from mfusepy import (
    c_flock_t,
    c_off_t,
    c_stat,
    c_statvfs,
    fuse_buf,
    fuse_conn_info,
    fuse_file_info,
    fuse_version_major,
)

if fuse_version_major != 3:
    raise OSError(f"libfuse {fuse_version_major} was found")

ROOT = 1

# Bits of fuse_conn_info.want.
CAP_POSIX_LOCKS = 1 << 1
CAP_ATOMIC_O_TRUNC = 1 << 3
CAP_DONT_MASK = 1 << 6
CAP_FLOCK_LOCKS = 1 << 10
CAP_READDIRPLUS = 1 << 13
CAP_READDIRPLUS_AUTO = 1 << 14
CAP_ASYNC_DIO = 1 << 15
CAP_PARALLEL_DIROPS = 1 << 18
CAP_POSIX_ACL = 1 << 19
CAP_CACHE_SYMLINKS = 1 << 23

# Bits of the `to_set` of a setattr.
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME = (1 << bit for bit in range(6))
SET_ATIME_NOW, SET_MTIME_NOW = 1 << 7, 1 << 8


class fuse_args(ctypes.Structure):  # noqa: D101
    _fields_ = [("argc", c_int), ("argv", POINTER(c_char_p)), ("allocated", c_int)]


class fuse_ctx(ctypes.Structure):  # noqa: D101
    _fields_ = [("uid", c_uint), ("gid", c_uint), ("pid", c_int), ("umask", c_uint)]


class fuse_entry_param(ctypes.Structure):  # noqa: D101
    _fields_ = [
        ("ino", c_uint64),
        ("generation", c_uint64),
        ("attr", c_stat),
        ("attr_timeout", c_double),
        ("entry_timeout", c_double),
    ]


_req, _ino, _fi = c_void_p, c_uint64, POINTER(fuse_file_info)
_stat, _flock = POINTER(c_stat), POINTER(c_flock_t)

# The operations of struct fuse_lowlevel_ops up to libfuse 3.8 in their order, with arguments. Later versions append.
OPERATIONS: dict[str, tuple[object, ...]] = {
    "init": (c_void_p, POINTER(fuse_conn_info)),
    "destroy": (c_void_p,),
    "lookup": (_req, _ino, c_char_p),
    "forget": (_req, _ino, c_uint64),
    "getattr": (_req, _ino, _fi),
    "setattr": (_req, _ino, _stat, c_int, _fi),
    "readlink": (_req, _ino),
    "mknod": (_req, _ino, c_char_p, c_uint, c_uint64),
    "mkdir": (_req, _ino, c_char_p, c_uint),
    "unlink": (_req, _ino, c_char_p),
    "rmdir": (_req, _ino, c_char_p),
    "symlink": (_req, c_char_p, _ino, c_char_p),
    "rename": (_req, _ino, c_char_p, _ino, c_char_p, c_uint),
    "link": (_req, _ino, _ino, c_char_p),
    "open": (_req, _ino, _fi),
    "read": (_req, _ino, c_size_t, c_off_t, _fi),
    "write": (_req, _ino, c_void_p, c_size_t, c_off_t, _fi),
    "flush": (_req, _ino, _fi),
    "release": (_req, _ino, _fi),
    "fsync": (_req, _ino, c_int, _fi),
    "opendir": (_req, _ino, _fi),
    "readdir": (_req, _ino, c_size_t, c_off_t, _fi),
    "releasedir": (_req, _ino, _fi),
    "fsyncdir": (_req, _ino, c_int, _fi),
    "statfs": (_req, _ino),
    "setxattr": (_req, _ino, c_char_p, c_void_p, c_size_t, c_int),
    "getxattr": (_req, _ino, c_char_p, c_size_t),
    "listxattr": (_req, _ino, c_size_t),
    "removexattr": (_req, _ino, c_char_p),
    "access": (_req, _ino, c_int),
    "create": (_req, _ino, c_char_p, c_uint, _fi),
    "getlk": (_req, _ino, _fi, _flock),
    "setlk": (_req, _ino, _fi, _flock, c_int),
    "bmap": (_req, _ino, c_size_t, c_uint64),
    "ioctl": (_req, _ino, c_uint, c_void_p, _fi, c_uint, c_void_p, c_size_t, c_size_t),
    "poll": (_req, _ino, _fi, c_void_p),
    "write_buf": (_req, _ino, c_void_p, c_off_t, _fi),
    "retrieve_reply": (_req, c_void_p, _ino, c_off_t, c_void_p),
    "forget_multi": (_req, c_size_t, c_void_p),
    "flock": (_req, _ino, _fi, c_int),
    "fallocate": (_req, _ino, c_int, c_off_t, c_off_t, _fi),
    "readdirplus": (_req, _ino, c_size_t, c_off_t, _fi),
    "copy_file_range": (_req, _ino, c_off_t, _fi, _ino, c_off_t, _fi, c_size_t, c_int),
    "lseek": (_req, _ino, c_off_t, c_int, _fi),
}


def callback(arguments: tuple[object, ...]) -> Any:
    """The type of a function that libfuse calls."""
    return CFUNCTYPE(None, *arguments)  # type: ignore[arg-type]


class fuse_lowlevel_ops(ctypes.Structure):  # noqa: D101
    _fields_ = [(name, callback(arguments)) for name, arguments in OPERATIONS.items()]


interrupt_func = callback((_req, c_void_p))

# Functions with their result and arguments. The interpreter is released while they run.
_FUNCTIONS: dict[str, tuple[object, tuple[object, ...]]] = {
    "fuse_session_new": (c_void_p, (POINTER(fuse_args), POINTER(fuse_lowlevel_ops), c_size_t, c_void_p)),
    "fuse_session_mount": (c_int, (c_void_p, c_char_p)),
    "fuse_session_receive_buf": (c_int, (c_void_p, POINTER(fuse_buf))),
    "fuse_session_process_buf": (None, (c_void_p, POINTER(fuse_buf))),
    "fuse_session_exited": (c_int, (c_void_p,)),
    "fuse_session_destroy": (None, (c_void_p,)),
    "fuse_req_ctx": (POINTER(fuse_ctx), (_req,)),
    "fuse_req_interrupt_func": (None, (_req, interrupt_func, c_void_p)),
    "fuse_reply_err": (c_int, (_req, c_int)),
    "fuse_reply_entry": (c_int, (_req, POINTER(fuse_entry_param))),
    "fuse_reply_create": (c_int, (_req, POINTER(fuse_entry_param), _fi)),
    "fuse_reply_attr": (c_int, (_req, _stat, c_double)),
    "fuse_reply_readlink": (c_int, (_req, c_char_p)),
    "fuse_reply_open": (c_int, (_req, _fi)),
    "fuse_reply_write": (c_int, (_req, c_size_t)),
    "fuse_reply_buf": (c_int, (_req, c_void_p, c_size_t)),
    "fuse_reply_statfs": (c_int, (_req, POINTER(c_statvfs))),
    "fuse_reply_xattr": (c_int, (_req, c_size_t)),
    "fuse_reply_lock": (c_int, (_req, _flock)),
    "fuse_reply_lseek": (c_int, (_req, c_off_t)),
    "fuse_add_direntry": (c_size_t, (_req, c_void_p, c_size_t, c_char_p, _stat, c_off_t)),
    "fuse_add_direntry_plus": (c_size_t, (_req, c_void_p, c_size_t, c_char_p, POINTER(fuse_entry_param), c_off_t)),
    "fuse_lowlevel_notify_inval_inode": (c_int, (c_void_p, _ino, c_off_t, c_off_t)),
}


def _load() -> ctypes.CDLL:
    # The one that mfusepy found.
    name = os.environ.get("FUSE_LIBRARY_PATH") or ctypes.util.find_library(os.environ["FUSE_LIBRARY_NAME"])
    if name is None:
        raise OSError("libfuse 3 was not found")
    library = ctypes.CDLL(name, use_errno=True)
    for function, (result, arguments) in _FUNCTIONS.items():
        getattr(library, function).restype = result
        getattr(library, function).argtypes = arguments
    return library


library = _load()

__all__ = [
    "OPERATIONS",
    "ROOT",
    "c_flock_t",
    "c_stat",
    "c_statvfs",
    "fuse_args",
    "fuse_buf",
    "fuse_conn_info",
    "fuse_ctx",
    "fuse_entry_param",
    "fuse_file_info",
    "fuse_lowlevel_ops",
    "interrupt_func",
    "library",
]
