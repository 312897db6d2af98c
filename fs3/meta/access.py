"""POSIX permission rules. Pure. uid 0 passes every check except execution of what nobody may execute."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import Fs3Error, error
from fs3.meta import acl, model
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Attr, Caller

READ: Final = 4
WRITE: Final = 2
SEARCH: Final = 1


def in_group(caller: Caller, gid: int) -> bool:
    """Whether `gid` is the caller's group or one of the supplementary ones."""
    return caller.gid == gid or gid in caller.groups


def allowed(attr: Attr, caller: Caller, want: int) -> bool:
    """Whether the permission bits or the access control list grant all of `want` (READ | WRITE | SEARCH)."""
    uid = caller.uid
    if uid == 0:
        return True
    if attr.access_acl:
        return acl.allowed(
            acl.decode(attr.access_acl),
            owner=uid == attr.uid,
            group=in_group(caller, attr.gid),
            uid=uid,
            groups={caller.gid, *caller.groups},
            want=want,
        )
    mode = attr.mode
    if uid == attr.uid:
        mode >>= 6
    elif in_group(caller, attr.gid):
        mode >>= 3
    return mode & want == want


def require(attr: Attr, caller: Caller, want: int) -> None:
    """Raise ACCESS unless :func:`allowed`."""
    if not allowed(attr, caller, want):
        raise denied(attr)


def denied(attr: Attr) -> Fs3Error:
    """EACCES."""
    return error(Code.CODE_ACCESS, f"the permission bits {attr.mode:04o} of inode {attr.inode:#x} forbid it")


def require_owner(attr: Attr, caller: Caller) -> None:
    """Raise NOT_PERMITTED unless the caller owns the inode or is root."""
    if caller.uid not in (0, attr.uid):
        raise error(Code.CODE_NOT_PERMITTED, f"only the owner of inode {attr.inode:#x} may do it")


def require_sticky(parent: Attr, child: Attr, caller: Caller) -> None:
    """Raise NOT_PERMITTED when the sticky bit of `parent` keeps the caller from removing or renaming `child`."""
    if parent.mode & model.STICKY and caller.uid not in (0, child.uid, parent.uid):
        raise error(Code.CODE_NOT_PERMITTED, "the directory is sticky and the entry belongs to somebody else")


def without_set_id(mode: int) -> int:
    """Mode of a file after its content or owner changed: no set-uid, and no set-gid where the group executes."""
    mode &= ~model.SET_UID
    if mode & 0o010:
        mode &= ~model.SET_GID
    return mode


def inherited(parent: Attr, caller: Caller, mode: int, *, directory: bool) -> tuple[int, int]:
    """(gid, mode) of a new inode in `parent`: a set-gid directory passes on its group, and the bit to directories."""
    mode &= model.MODE_BITS
    gid = caller.gid
    if parent.mode & model.SET_GID:
        gid = parent.gid
        if directory:
            return gid, mode | model.SET_GID
    if mode & model.SET_GID and mode & 0o010 and caller.uid != 0 and not in_group(caller, gid):
        mode &= ~model.SET_GID
    return gid, mode
