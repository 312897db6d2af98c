"""Extended attributes: their names, who may touch them, and where they are kept. The rules are those of Linux.

``security.capability`` and access control lists lie in the inode's record, because writes drop the one and permission
checks need the other; everything else lies under keys of its own.
"""

from __future__ import annotations

from typing import Final

from fs3.core.errors import Fs3Error, error
from fs3.kv.api import Transaction
from fs3.meta import access, acl, keys, model, tree
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Attr, Caller, XattrBit

# XATTR_NAME_MAX, XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux.
NAME_BYTES_MAX: Final = 255
VALUE_BYTES_MAX: Final = 64 << 10
LIST_BYTES_MAX: Final = 64 << 10
# Names and values of one inode.
INODE_BYTES_MAX: Final = 1 << 20

USER: Final = b"user."
TRUSTED: Final = b"trusted."
SECURITY: Final = b"security."
CAPABILITY: Final = b"security.capability"
ACCESS_ACL: Final = b"system.posix_acl_access"
DEFAULT_ACL: Final = b"system.posix_acl_default"
ACLS: Final = (ACCESS_ACL, DEFAULT_ACL)
# Those that lie in the record.
RECORD: Final = (CAPABILITY, ACCESS_ACL, DEFAULT_ACL)
# What the kernel stores, in its second and third version.
CAPABILITY_BYTES: Final = (20, 24)


def check_name(name: bytes) -> None:
    """Raise OUT_OF_RANGE, NOT_SUPPORTED (unknown prefix) or INVALID_ARGUMENT for what is no name of an attribute."""
    if not 0 < len(name) <= NAME_BYTES_MAX:
        message = f"the name of an extended attribute has 1 to {NAME_BYTES_MAX} bytes, not {len(name)}"
        raise error(Code.CODE_OUT_OF_RANGE, message)
    if name in ACLS:
        return
    if not name.startswith((USER, TRUSTED, SECURITY)):
        raise error(Code.CODE_NOT_SUPPORTED, "there are user.*, trusted.*, security.* and access control lists")
    if name in (USER, TRUSTED, SECURITY) or b"\0" in name:
        raise error(Code.CODE_INVALID_ARGUMENT, "a name goes on behind its prefix and has no zero bytes")


def missing(name: bytes) -> Fs3Error:
    """ENODATA."""
    return error(Code.CODE_NO_DATA, f"there is no extended attribute {name.decode(errors='backslashreplace')!r}")


def listed(name: bytes, caller: Caller) -> bool:
    """Whether the caller is told of an attribute that is there."""
    return caller.uid == 0 or not name.startswith(TRUSTED)


def require_read(attr: Attr, caller: Caller, name: bytes) -> None:
    """Raise NO_DATA for what the inode cannot have or the caller may not know of, ACCESS."""
    if not listed(name, caller):
        raise missing(name)
    if name.startswith(USER):
        if attr.type not in (model.FILE, model.DIRECTORY):
            raise missing(name)
        access.require(attr, caller, access.READ)


def require_write(attr: Attr, caller: Caller, name: bytes) -> None:
    """Raise NOT_PERMITTED or ACCESS unless the caller may set and remove the attribute."""
    if name in ACLS:
        if attr.type == model.SYMLINK:
            raise error(Code.CODE_NOT_SUPPORTED, "symbolic links have no access control lists")
        access.require_owner(attr, caller)
        return
    if not name.startswith(USER):
        if caller.uid != 0:
            raise error(Code.CODE_NOT_PERMITTED, "only root changes extended attributes other than user.*")
        return
    if attr.type not in (model.FILE, model.DIRECTORY):
        raise error(Code.CODE_NOT_PERMITTED, "only files and directories have extended attributes user.*")
    if attr.type == model.DIRECTORY and attr.mode & model.STICKY:
        access.require_owner(attr, caller)
    access.require(attr, caller, access.WRITE)


def check_value(name: bytes, value: bytes) -> None:
    """Raise TOO_LARGE or, for a capability that no kernel wrote, INVALID_ARGUMENT."""
    if len(value) > VALUE_BYTES_MAX:
        message = f"the value of an extended attribute has at most {VALUE_BYTES_MAX} bytes, not {len(value)}"
        raise error(Code.CODE_TOO_LARGE, message)
    if name == CAPABILITY and len(value) not in CAPABILITY_BYTES:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{CAPABILITY.decode()} has 20 or 24 bytes, not {len(value)}")


async def load(tr: Transaction, record: InodeRecord, name: bytes) -> bytes | None:
    """The value of an attribute, None when it is not there."""
    if not record.attr.xattrs:
        return None
    if name in RECORD:
        return _kept(record).get(name)
    stored = await tr.get(keys.xattr(record.attr.inode, name))
    return None if stored is None else model.decode_xattr(stored)


async def names(tr: Transaction, record: InodeRecord) -> list[bytes]:
    """The names of all attributes, in byte order."""
    if not record.attr.xattrs:
        return []
    rows = await tr.get_range(*keys.xattrs(record.attr.inode))
    found = [keys.xattr_name(key) for key, _ in rows]
    return sorted([*found, *_kept(record)])


def _kept(record: InodeRecord) -> dict[bytes, bytes]:
    """What lies in the record."""
    values = {CAPABILITY: record.capability, ACCESS_ACL: record.attr.access_acl, DEFAULT_ACL: record.default_acl}
    return {name: value for name, value in values.items() if value}


def set_acl(tr: Transaction, record: InodeRecord, name: bytes, value: bytes, caller: Caller) -> None:
    """Set or, with an empty list, remove an access control list; the caller stores the record.

    What the mode bits can say is kept in them alone. Raises INVALID_ARGUMENT, ACCESS (a default list of what is no
    directory), NO_SPACE.
    """
    attr = record.attr
    entries = acl.decode(value)
    if name == DEFAULT_ACL:
        if entries and attr.type != model.DIRECTORY:
            raise error(Code.CODE_ACCESS, "only directories have a default access control list")
        put(tr, record, name, record.default_acl or None, acl.encode(entries) if entries else None)
        return
    if entries:
        attr.mode = attr.mode & ~0o777 | acl.mode_of(entries)
        if caller.uid != 0 and not access.in_group(caller, attr.gid):
            attr.mode &= ~model.SET_GID
    kept = None if acl.is_minimal(entries) else acl.encode(entries)
    put(tr, record, name, attr.access_acl or None, kept)


def chmod_acl(record: InodeRecord) -> None:
    """The mode was changed: the access list follows."""
    if record.attr.access_acl:
        record.attr.access_acl = acl.encode(acl.with_mode(acl.decode(record.attr.access_acl), record.attr.mode))


def inherit_acl(record: InodeRecord, default: bytes) -> None:
    """Give a new inode, made with its creator's mode, what a directory with the default list `default` passes on."""
    attr = record.attr
    entries, bits = acl.inherited(acl.decode(default), attr.mode)
    attr.mode = attr.mode & ~0o777 | bits
    if not acl.is_minimal(entries):
        attr.access_acl = acl.encode(entries)
        _count(record, ACCESS_ACL, None, attr.access_acl)
    if attr.type == model.DIRECTORY:
        record.default_acl = default
        _count(record, DEFAULT_ACL, None, default)
    _mark(record)


def put(tr: Transaction, record: InodeRecord, name: bytes, old: bytes | None, new: bytes | None) -> None:
    """Change an attribute from `old`, its value now, to `new`; None is none. The caller stores the record.

    Raises NO_SPACE when the inode would have more than LIST_BYTES_MAX of names or INODE_BYTES_MAX in all.
    """
    _count(record, name, old, new)
    if name == CAPABILITY:
        record.capability = new or b""
    elif name == ACCESS_ACL:
        record.attr.access_acl = new or b""
    elif name == DEFAULT_ACL:
        record.default_acl = new or b""
    elif new is None:
        tr.clear(keys.xattr(record.attr.inode, name))
    else:
        tr.set(keys.xattr(record.attr.inode, name), model.encode_xattr(new))
    _mark(record)


def _count(record: InodeRecord, name: bytes, old: bytes | None, new: bytes | None) -> None:
    if old is not None:
        record.xattr_name_bytes -= len(name) + 1
        record.xattr_bytes -= len(name) + len(old)
    if new is None:
        return
    record.xattr_name_bytes += len(name) + 1
    record.xattr_bytes += len(name) + len(new)
    if record.xattr_name_bytes > LIST_BYTES_MAX or record.xattr_bytes > INODE_BYTES_MAX:
        message = f"an inode has at most {INODE_BYTES_MAX} bytes of extended attributes, {LIST_BYTES_MAX} of names"
        raise error(Code.CODE_NO_SPACE, message)


async def recount(tr: Transaction, record: InodeRecord) -> bool:
    """Count what there is and let the record tell it; returns whether it told something else. The caller stores it."""
    before = (record.xattr_name_bytes, record.xattr_bytes, record.attr.xattrs)
    found = {
        keys.xattr_name(key): model.decode_xattr(v) for key, v in await tr.get_range(*keys.xattrs(record.attr.inode))
    }
    found |= _kept(record)
    record.xattr_name_bytes = sum(len(name) + 1 for name in found)
    record.xattr_bytes = sum(len(name) + len(value) for name, value in found.items())
    _mark(record)
    return before != (record.xattr_name_bytes, record.xattr_bytes, record.attr.xattrs)


def _mark(record: InodeRecord) -> None:
    """Let the attributes tell which extended ones there are."""
    bits = 0
    if record.xattr_name_bytes:
        bits |= XattrBit.XATTR_BIT_ANY
    if record.capability:
        bits |= XattrBit.XATTR_BIT_CAPABILITY
    if record.attr.access_acl:
        bits |= XattrBit.XATTR_BIT_ACCESS_ACL
    if record.default_acl:
        bits |= XattrBit.XATTR_BIT_DEFAULT_ACL
    record.attr.xattrs = bits


def drop_capability(record: InodeRecord) -> None:
    """The content or the owner of a file changed; the caller stores the record."""
    if record.capability:
        _count(record, CAPABILITY, record.capability, None)
        record.capability = b""
        _mark(record)


async def changed(tr: Transaction, record: InodeRecord, now_ns: int) -> Attr:
    """Store the record of an inode whose attributes changed now; returns it as callers see it."""
    attr = await tree.complete(tr, record)
    tree.store_changed(tr, record, now_ns)
    return attr
