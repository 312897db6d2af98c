"""POSIX access control lists in the form that Linux' ``system.posix_acl_*`` attributes have. Pure.

A list is (tag, permissions, id) entries in the order of their tags. An access list agrees with the mode bits: the
owner's and others' entries are those of the mode; the mode's group bits are the mask, or the group's entry where there
is none.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from fs3.core.errors import Fs3Error, error
from fs3.v1.frame_pb2 import Code

USER_OBJ: Final = 0x01
USER: Final = 0x02
GROUP_OBJ: Final = 0x04
GROUP: Final = 0x08
MASK: Final = 0x10
OTHER: Final = 0x20

# More than any other file system takes; lists are read with every inode that has one.
ENTRIES_MAX: Final = 508

_VERSION: Final = 2
_NO_ID: Final = 0xFFFF_FFFF
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
_NAMED: Final = (USER, GROUP)


@dataclass(frozen=True, slots=True)
class Entry:
    """Permissions (READ | WRITE | SEARCH of :mod:`fs3.meta.access`) of a tag; `id` is the user's or group's."""

    tag: int
    perm: int
    id: int = _NO_ID


Acl = Sequence[Entry]


def decode(value: bytes) -> list[Entry]:
    """The entries, none for an empty list. Raises INVALID_ARGUMENT for what the kernel would refuse, NO_SPACE."""
    if not value:
        return []
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise _invalid("its length is wrong")
    if _HEADER.unpack_from(value)[0] != _VERSION:
        raise error(Code.CODE_NOT_SUPPORTED, f"only version {_VERSION} of access control lists is known")
    entries = [Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]
    if len(entries) > ENTRIES_MAX:
        raise error(Code.CODE_NO_SPACE, f"an access control list has at most {ENTRIES_MAX} entries")
    if entries:
        _check(entries)
    return entries


def _check(entries: Acl) -> None:
    """An entry each for owner, group and others, in order of tags, and a mask if users or groups are named."""
    tags = [entry.tag for entry in entries]
    if tags != sorted(tags) or any(entry.perm & ~7 for entry in entries):
        raise _invalid("its entries are out of order or have unknown permissions")
    counts = {tag: tags.count(tag) for tag in tags}
    named = any(tag in counts for tag in _NAMED)
    for tag in (USER_OBJ, GROUP_OBJ, OTHER):
        if counts.pop(tag, 0) != 1:
            raise _invalid("it needs one entry each for the owner, the group and others")
    if counts.pop(MASK, 0) not in ((1,) if named else (0, 1)):
        raise _invalid("it needs a mask, once, when it names users or groups")
    if not counts.keys() <= set(_NAMED):
        raise _invalid("it has an unknown entry")
    if any(entry.id == _NO_ID for entry in entries if entry.tag in _NAMED):
        raise _invalid("a user or group has no number")


def _invalid(why: str) -> Fs3Error:
    return error(Code.CODE_INVALID_ARGUMENT, f"this is no access control list: {why}")


def encode(entries: Acl) -> bytes:
    """The attribute's value."""
    packed = (_ENTRY.pack(entry.tag, entry.perm, entry.id if entry.tag in _NAMED else _NO_ID) for entry in entries)
    return _HEADER.pack(_VERSION) + b"".join(packed)


def is_minimal(entries: Acl) -> bool:
    """Whether the mode bits say all that the list does."""
    return all(entry.tag in (USER_OBJ, GROUP_OBJ, OTHER) for entry in entries)


def _group_tag(entries: Acl) -> int:
    """The entry that the mode's group bits stand for."""
    return MASK if any(entry.tag == MASK for entry in entries) else GROUP_OBJ


def _shifts(entries: Acl) -> dict[int, int]:
    """Where the permissions of a tag are in the mode."""
    return {USER_OBJ: 6, _group_tag(entries): 3, OTHER: 0}


def mode_of(entries: Acl) -> int:
    """The nine permission bits of the mode that agrees with a list."""
    shifts = _shifts(entries)
    return sum(entry.perm << shifts[entry.tag] for entry in entries if entry.tag in shifts)


def with_mode(entries: Acl, mode: int) -> list[Entry]:
    """The list after a chmod."""
    shifts = _shifts(entries)
    return [replace(e, perm=mode >> shifts[e.tag] & 7) if e.tag in shifts else e for e in entries]


def inherited(default: Acl, mode: int) -> tuple[list[Entry], int]:
    """(access list, permission bits) of what is made with `mode` in a directory with this default list.

    The creator's mode takes permissions away and gives none; there is no umask.
    """
    shifts = _shifts(default)
    entries = [replace(e, perm=e.perm & mode >> shifts[e.tag]) if e.tag in shifts else e for e in default]
    return entries, mode_of(entries)


def allowed(entries: Acl, *, owner: bool, group: bool, uid: int, groups: set[int], want: int) -> bool:
    """Whether a list grants all of `want` to a user with `uid`, in `groups`.

    `owner`, `group`: whether the user owns the inode, and belongs to its group. The first class that fits decides:
    owner, named users, any of the groups, others. The mask bounds named users and all groups.
    """
    mask = next((entry.perm for entry in entries if entry.tag == MASK), 7)
    by_group = False
    for entry in entries:
        if entry.tag == USER_OBJ and owner:
            return entry.perm & want == want
        if entry.tag == USER and entry.id == uid:
            return entry.perm & mask & want == want
        if (entry.tag == GROUP_OBJ and group) or (entry.tag == GROUP and entry.id in groups):
            by_group = True
            if entry.perm & mask & want == want:
                return True
        if entry.tag == OTHER:
            return not by_group and entry.perm & want == want
    return False
