"""Keys of the metadata service in the key-value store. Pure.

Every key begins with ``F`` and a letter for its table. Numbers are big-endian, so that byte order is numeric
order. An inode's own keys lie next to each other: one range read over a run of inode ids brings the records
and, of directories, the times and subdirectory counts.

Inode ids: 51 bits of block number, reversed bit by bit so that blocks spread over the key space, then 12 bits
within the block. Blocks with even numbers are handed out whole; those with odd numbers in 64 pieces of 64 ids.
"""

from __future__ import annotations

import struct
from typing import Final

ROOT_INODE: Final = 1
# The directory of what was removed and is kept. No entry names it.
TRASH_INODE: Final = 2
TOP_INODES: Final = (ROOT_INODE, TRASH_INODE)
NO_INODE: Final = 0
BLOCK_IDS: Final = 4096
PIECE_IDS: Final = 64
PIECES_PER_BLOCK: Final = BLOCK_IDS // PIECE_IDS
# One less than there is room for, so that ids stay positive where software takes them for signed numbers.
_BLOCK_BITS: Final = 51

# Shards of the counter of inodes in use.
COUNTER_SHARDS: Final = 16

_U64 = struct.Struct(">Q")
_PREFIXED = struct.Struct(">2sQ")
_PREFIXED_PAIR = struct.Struct(">2sQQ")

INODE: Final = b"Fi"
DIRENT: Final = b"Fe"
SESSION: Final = b"Fs"
KEEPALIVE: Final = b"Fk"
IDEMPOTENCY: Final = b"Fo"
GC: Final = b"FG"
# What is queued up to this time may have lost chunks already: it is not taken off the queue any more.
GC_HORIZON: Final = b"FH"
# The queue of versions that did not keep it in the order of time.
UNORDERED_GC: Final = b"Fg"
TRUNCATION: Final = b"Ft"
ALLOCATOR: Final = b"Fa"
COUNTER: Final = b"Fc"
XATTR: Final = b"Fx"
TRASH: Final = b"FT"
QUOTA: Final = b"Fq"
QUOTA_COUNTER: Final = b"Fu"
QUOTA_WALK: Final = b"Fw"
LOCK: Final = b"Fl"
HOLD: Final = b"Fh"

TIMES_SUFFIX: Final = b"t"
SUBDIRS_SUFFIX: Final = b"s"
INODE_KEY_BYTES: Final = 10
TRASH_NAME_BYTES: Final = 48


def inode(ino: int) -> bytes:
    """The InodeRecord."""
    return _PREFIXED.pack(INODE, ino)


def directory_times(ino: int) -> bytes:
    """Modification and change time of a directory; written blindly by operations inside it."""
    return _PREFIXED.pack(INODE, ino) + TIMES_SUFFIX


def directory_subdirs(ino: int) -> bytes:
    """Number of subdirectories of a directory, an atomic counter."""
    return _PREFIXED.pack(INODE, ino) + SUBDIRS_SUFFIX


def inode_range(first: int, last: int) -> tuple[bytes, bytes]:
    """Every key of the inodes `first` to `last`, inclusive."""
    end = _PREFIXED.pack(INODE, last + 1) if last + 1 < 1 << 64 else b"Fj"
    return _PREFIXED.pack(INODE, first), end


def inode_of(key: bytes) -> int:
    """The inode that a key of the inode, session, hold or truncation table belongs to."""
    number: int = _U64.unpack_from(key, 2)[0]
    return number


def dirent(parent: int, name: bytes) -> bytes:
    """The directory entry `name` of `parent`."""
    return _PREFIXED.pack(DIRENT, parent) + name


def dirents(parent: int, after: bytes = b"") -> tuple[bytes, bytes]:
    """The entries of `parent` whose names are greater than `after`."""
    prefix = _PREFIXED.pack(DIRENT, parent)
    begin = prefix + after + b"\x00" if after else prefix
    # A name holds no 0xff-only tail that could reach beyond: the next parent's prefix ends the range.
    return begin, _PREFIXED.pack(DIRENT, parent + 1) if parent + 1 < 1 << 64 else b"Ff"


def dirent_name(key: bytes) -> bytes:
    """The name of a directory entry's key."""
    return key[10:]


def session(ino: int, session_id: bytes) -> bytes:
    """A write session, or a hold of an unlinked file."""
    return _PREFIXED.pack(SESSION, ino) + session_id


def sessions(ino: int) -> tuple[bytes, bytes]:
    """Every session of an inode."""
    return _PREFIXED.pack(SESSION, ino), _PREFIXED.pack(SESSION, ino + 1)


def session_id(key: bytes) -> bytes:
    """The session of a session key."""
    return key[10:]


def keepalive(client_id: bytes) -> bytes:
    """The KeepaliveRecord of a client."""
    return KEEPALIVE + client_id


def idempotency(client_id: bytes, sequence: int) -> bytes:
    """The IdempotencyRecord of an operation; one client's are in the order of its sequence numbers."""
    return IDEMPOTENCY + client_id + _U64.pack(sequence)


def gc(queued_ns: int, ino: int) -> bytes:
    """The GcRecord of an inode that waits for removal; what is queued first comes first."""
    return _PREFIXED_PAIR.pack(GC, queued_ns, ino)


def gc_parts(key: bytes) -> tuple[int, int]:
    """(queued_ns, inode) of a gc key."""
    _, queued_ns, ino = _PREFIXED_PAIR.unpack(key)
    return queued_ns, ino


def gc_split(queued_ns: int) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    """The entries queued up to `queued_ns`, with those at 0, and those queued later."""
    begin, end = table(GC)
    middle = _PREFIXED_PAIR.pack(GC, max(0, queued_ns) + 1, 0)
    return (begin, middle), (middle, end)


def truncation(ino: int) -> bytes:
    """The PendingTruncation of an inode."""
    return _PREFIXED.pack(TRUNCATION, ino)


def xattr(ino: int, name: bytes) -> bytes:
    """The value of an extended attribute. A table of its own, so that listings of directories do not read them."""
    return _PREFIXED.pack(XATTR, ino) + name


def xattrs(ino: int) -> tuple[bytes, bytes]:
    """Every extended attribute of an inode that is kept under a key."""
    return _PREFIXED.pack(XATTR, ino), _PREFIXED.pack(XATTR, ino + 1)


def xattr_name(key: bytes) -> bytes:
    """The name of an extended attribute's key."""
    return key[10:]


def trash_name(expires_ns: int, parent: int, ino: int) -> bytes:
    """The name that `ino`, removed from `parent`, has in the trash directory: in the order of expiry."""
    return b"%016x%016x%016x" % (expires_ns, parent, ino)


def trash_parts(name: bytes) -> tuple[int, int, int]:
    """(expires_ns, parent, inode) of a name in the trash directory. Raises ValueError."""
    if len(name) != TRASH_NAME_BYTES:
        raise ValueError(f"a name in the trash has {TRASH_NAME_BYTES} bytes")
    return int(name[:16], 16), int(name[16:32], 16), int(name[32:], 16)


def trash(name: bytes) -> bytes:
    """The TrashRecord of an entry of the trash directory; those from one directory lie together."""
    return _PREFIXED.pack(TRASH, trash_parts(name)[1]) + name


def trash_from(parent: int, after: bytes = b"") -> tuple[bytes, bytes]:
    """Records of what was removed from `parent`, behind the name `after`."""
    prefix = _PREFIXED.pack(TRASH, parent)
    return prefix + after + b"\x00" if after else prefix, _PREFIXED.pack(TRASH, parent + 1)


def trash_entry_name(key: bytes) -> bytes:
    """The name in the trash directory, of a TrashRecord's key."""
    return key[10:]


def lock(ino: int, client_id: bytes) -> bytes:
    """The LockRecord of a client for an inode."""
    return _PREFIXED.pack(LOCK, ino) + client_id


def locks(ino: int) -> tuple[bytes, bytes]:
    """The LockRecords of an inode."""
    return _PREFIXED.pack(LOCK, ino), _PREFIXED.pack(LOCK, ino + 1)


def hold(ino: int, client_id: bytes) -> bytes:
    """The HoldRecord of a client for an inode."""
    return _PREFIXED.pack(HOLD, ino) + client_id


def holds(ino: int) -> tuple[bytes, bytes]:
    """The HoldRecords of an inode."""
    return _PREFIXED.pack(HOLD, ino), _PREFIXED.pack(HOLD, ino + 1)


def hold_client(key: bytes) -> bytes:
    """The client of a hold key."""
    return key[10:]


def lock_client(key: bytes) -> bytes:
    """The client of a lock key."""
    return key[10:]


def allocator(kind: bytes) -> bytes:
    """Next block number (`b"b"`) or piece number (`b"p"`) that nobody has."""
    return ALLOCATOR + kind


def counter(shard: int) -> bytes:
    """One shard of the number of inodes in use."""
    return COUNTER + bytes([shard])


def quota(quota_id: int) -> bytes:
    """The QuotaRecord."""
    return _PREFIXED.pack(QUOTA, quota_id)


def quota_counter(quota_id: int, epoch: int, kind: int, shard: int) -> bytes:
    """One shard of what a quota counts: inodes (`kind` 0) or bytes (1)."""
    return _PREFIXED_PAIR.pack(QUOTA_COUNTER, quota_id, epoch) + bytes([kind, shard])


def quota_counter_kind(key: bytes) -> int:
    """The kind of a quota counter's key."""
    return key[18]


def quota_counters(quota_id: int) -> tuple[bytes, bytes]:
    """Everything that a quota counts."""
    return _PREFIXED.pack(QUOTA_COUNTER, quota_id), _PREFIXED.pack(QUOTA_COUNTER, quota_id + 1)


def quota_epoch(quota_id: int, epoch: int) -> tuple[bytes, bytes]:
    """What a quota counted in one epoch."""
    begin = _PREFIXED_PAIR.pack(QUOTA_COUNTER, quota_id, epoch)
    return begin, _PREFIXED_PAIR.pack(QUOTA_COUNTER, quota_id, epoch + 1)


def quota_walk(job: int, directory: int) -> bytes:
    """The QuotaWalk of a directory on behalf of the quota `job`; of NO_INODE that of the quota's record itself."""
    return _PREFIXED_PAIR.pack(QUOTA_WALK, job, directory)


def quota_walk_of(key: bytes) -> tuple[int, int]:
    """(job, directory) of a quota walk's key."""
    _, job, directory = _PREFIXED_PAIR.unpack(key)
    return job, directory


def quota_walks(job: int) -> tuple[bytes, bytes]:
    """Every directory that is to be walked on behalf of a quota."""
    return _PREFIXED_PAIR.pack(QUOTA_WALK, job, NO_INODE + 1), _PREFIXED.pack(QUOTA_WALK, job + 1)


def table(prefix: bytes) -> tuple[bytes, bytes]:
    """Everything of one table."""
    return prefix, prefix[:-1] + bytes([prefix[-1] + 1])


def _reverse(number: int) -> int:
    return int(format(number, f"0{_BLOCK_BITS}b")[::-1], 2)


def block_ids(number: int) -> range:
    """Inode ids of the whole block `number`, counted from 0. Raises ValueError when ids have run out."""
    block = 2 * (number + 1)
    if block >= 1 << _BLOCK_BITS:
        raise ValueError("the inode id blocks are used up")
    first = _reverse(block) * BLOCK_IDS
    return range(first, first + BLOCK_IDS)


def piece_ids(number: int) -> range:
    """Inode ids of piece `number`, counted from 0: a 64th of a block. Raises ValueError when ids have run out."""
    block = 2 * (number // PIECES_PER_BLOCK) + 1
    if block >= 1 << _BLOCK_BITS:
        raise ValueError("the inode id pieces are used up")
    first = _reverse(block) * BLOCK_IDS + number % PIECES_PER_BLOCK * PIECE_IDS
    return range(first, first + PIECE_IDS)


def allocation_of(ino: int) -> tuple[bytes, int]:
    """Allocator and number of the block or piece that an inode id, not the root's, belongs to."""
    block = _reverse(ino // BLOCK_IDS)
    if block % 2:
        return b"p", block // 2 * PIECES_PER_BLOCK + ino % BLOCK_IDS // PIECE_IDS
    return b"b", block // 2 - 1


def is_handed_out(ino: int, blocks: int, pieces: int) -> bool:
    """Whether an id may be in use; `blocks` and `pieces` are the next numbers of the allocators."""
    if ino in TOP_INODES:
        return True
    kind, number = allocation_of(ino)
    return number < (pieces if kind == b"p" else blocks)
