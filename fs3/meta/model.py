"""Values of the metadata service in the key-value store: encoding, decoding, format checks. Pure."""

from __future__ import annotations

import stat
import struct
from typing import Final, TypeVar

from fs3.core.errors import error
from fs3.v1.disk_meta_pb2 import (
    GcRecord,
    IdempotencyRecord,
    InodeRecord,
    KeepaliveRecord,
    LockRecord,
    PendingTruncation,
    QuotaRecord,
    QuotaWalk,
    SessionRecord,
    TrashRecord,
)
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileType

FORMAT: Final = 1

NAME_BYTES_MAX: Final = 255
PATH_BYTES_MAX: Final = 4096
SYMLINKS_MAX: Final = 40
NLINK_MAX: Final = 65_000
# 2^32 chunks of the smallest size; the chunk index is 32 bits.
CHUNK_INDEX_MAX: Final = 0xFFFF_FFFE
FILE_BYTES_MAX: Final = (1 << 63) - 1
CHUNK_BYTES_MIN: Final = 64 << 10
CHUNK_BYTES_MAX: Final = 64 << 20

SET_UID: Final = stat.S_ISUID
SET_GID: Final = stat.S_ISGID
STICKY: Final = stat.S_ISVTX
MODE_BITS: Final = 0o7777

FILE: Final = FileType.FILE_TYPE_FILE
DIRECTORY: Final = FileType.FILE_TYPE_DIRECTORY
SYMLINK: Final = FileType.FILE_TYPE_SYMLINK

_DIRENT = struct.Struct(">BBQ")
_TIMES = struct.Struct(">Bqq")
_COUNT = struct.Struct("<q")

_R = TypeVar(
    "_R",
    InodeRecord,
    SessionRecord,
    KeepaliveRecord,
    IdempotencyRecord,
    PendingTruncation,
    GcRecord,
    TrashRecord,
    QuotaRecord,
    QuotaWalk,
    LockRecord,
)


def _decode(kind: type[_R], value: bytes) -> _R:
    record = kind.FromString(value)
    if record.format != FORMAT:
        raise error(
            Code.CODE_INTERNAL,
            f"a stored {kind.__name__} has format {record.format}, this version of fs3 reads {FORMAT}: upgrade fs3",
        )
    return record


def decode_inode(value: bytes) -> InodeRecord:
    """The inode record. Raises INTERNAL for a format of a later version."""
    return _decode(InodeRecord, value)


def decode_session(value: bytes) -> SessionRecord:
    """The session record."""
    return _decode(SessionRecord, value)


def decode_keepalive(value: bytes) -> KeepaliveRecord:
    """The keepalive record."""
    return _decode(KeepaliveRecord, value)


def decode_idempotency(value: bytes) -> IdempotencyRecord:
    """The stored answer of an operation."""
    return _decode(IdempotencyRecord, value)


def decode_truncation(value: bytes) -> PendingTruncation:
    """The truncation whose chunks are not cut yet."""
    return _decode(PendingTruncation, value)


def decode_gc(value: bytes) -> GcRecord:
    """The entry of the gc queue."""
    return _decode(GcRecord, value)


def decode_trash(value: bytes) -> TrashRecord:
    """What is known of an entry of the trash."""
    return _decode(TrashRecord, value)


def decode_quota(value: bytes) -> QuotaRecord:
    """The record of a quota."""
    return _decode(QuotaRecord, value)


def decode_quota_walk(value: bytes) -> QuotaWalk:
    """How far the walk through a directory is."""
    return _decode(QuotaWalk, value)


def decode_lock(value: bytes) -> LockRecord:
    """The locks of a client."""
    return _decode(LockRecord, value)


def encode_dirent(ino: int, file_type: int) -> bytes:
    """A directory entry."""
    return _DIRENT.pack(FORMAT, file_type, ino)


def decode_dirent(value: bytes) -> tuple[int, int]:
    """(inode, file type) of a directory entry."""
    form, file_type, ino = _DIRENT.unpack_from(value)
    if form != FORMAT:
        raise error(Code.CODE_INTERNAL, f"a directory entry has format {form}: upgrade fs3")
    return ino, file_type


def encode_times(mtime_ns: int, ctime_ns: int) -> bytes:
    """Times of a directory."""
    return _TIMES.pack(FORMAT, mtime_ns, ctime_ns)


def decode_times(value: bytes) -> tuple[int, int]:
    """(mtime_ns, ctime_ns) of a directory."""
    form, mtime_ns, ctime_ns = _TIMES.unpack_from(value)
    if form != FORMAT:
        raise error(Code.CODE_INTERNAL, f"the times of a directory have format {form}: upgrade fs3")
    return mtime_ns, ctime_ns


def encode_xattr(value: bytes) -> bytes:
    """The value of an extended attribute."""
    return bytes([FORMAT]) + value


def decode_xattr(stored: bytes) -> bytes:
    """The value of an extended attribute."""
    if stored[0] != FORMAT:
        raise error(Code.CODE_INTERNAL, f"an extended attribute has format {stored[0]}: upgrade fs3")
    return stored[1:]


def encode_count(count: int) -> bytes:
    """A counter as the store's atomic add keeps it."""
    return _COUNT.pack(count)


def decode_count(value: bytes | None) -> int:
    """A counter; absent is 0."""
    if value is None:
        return 0
    count: int = _COUNT.unpack(value)[0]
    return count
