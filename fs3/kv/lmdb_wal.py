"""What makes commits of the LMDB engine survive a power loss: a write-ahead log beside the tree, and snapshots.

LMDB's own durable commit waits for the disk twice, for its pages and for the page that names their root. Here the tree
is written without waiting, and the changes of each commit go to a log with one wait. After a power loss the tree is not
trusted: it is made anew from the last snapshot and the log behind it. Processes of one boot share the page cache, so
the end of a process needs none of this.

Files beside LMDB's own: ``wal.<number>`` (segments), ``snapshot.mdb`` (a copy of the tree; its POSITION_KEY says where
the log goes on), ``boot`` (the boot that the tree belongs to), ``users`` (locked by every process that has the store
open, exclusively by the one that prepares it). A record is u32 magic, u32 CRC32 of the rest, u32 bytes, u64 version,
then the changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from fs3.kv import lmdb_records as records
from fs3.kv.api import KvError
from fs3.kv.conflicts import KeyRange

POSITION_KEY: Final = b"\xff/wal"
SEGMENT_BYTES: Final = 32 << 20
# A segment grows by so many zeros at a time: overwriting them needs no write of the file system's own journal.
EXTEND_BYTES: Final = 1 << 20
# A snapshot is taken when the log is longer than the tree and than this.
LOG_BYTES_MIN: Final = 64 << 20
# How long opening waits for another process that prepares the store.
PREPARE_S_MAX: Final = 600.0
REPLAY_BYTES_MAX: Final = 8 << 20

_MAGIC: Final = 0x77337366
_HEAD = struct.Struct("<IIIQ")
_CRC_FROM: Final = 8
_COUNTS = struct.Struct("<II")  # range removals, changes
_POSITION = struct.Struct(">QQ")
_ABSENT: Final = 0xFFFF_FFFF

_log = logging.getLogger(__name__)

Changes = Mapping[bytes, bytes | None]


class Position(NamedTuple):
    """A place in the log."""

    segment: int
    offset: int


class Record(NamedTuple):
    """One commit: `ranges` are removed first, then `changes` applied (None removes)."""

    version: int
    ranges: Sequence[KeyRange]
    changes: Changes


def boot_id() -> str:
    """What names this boot of the machine. Raises OSError."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


# -- records ------------------------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """The bytes of a record."""
    parts: list[bytes] = []
    for begin, end in record.ranges:
        parts += (begin, end)
    values: list[int] = []
    for key, value in record.changes.items():
        parts.append(key)
        values.append(_ABSENT if value is None else len(value))
        parts.append(value or b"")
    lengths = struct.pack(f"<{len(parts)}I", *map(len, parts))
    marks = struct.pack(f"<{len(values)}I", *values)
    payload = b"".join((_COUNTS.pack(len(record.ranges), len(values)), lengths, marks, *parts))
    rest = _HEAD.pack(_MAGIC, 0, len(payload), record.version)[_CRC_FROM:] + payload
    return struct.pack("<II", _MAGIC, zlib.crc32(rest)) + rest


def decode(data: bytes, at: int) -> tuple[Record, int] | None:
    """The record at `at` and where it ends; None when there is no whole, sound record."""
    if at + _HEAD.size > len(data):
        return None
    magic, crc, payload_bytes, version = _HEAD.unpack_from(data, at)
    end = at + _HEAD.size + payload_bytes
    if magic != _MAGIC or end > len(data) or zlib.crc32(memoryview(data)[at + _CRC_FROM : end]) != crc:
        return None
    n_ranges, n_changes = _COUNTS.unpack_from(data, at + _HEAD.size)
    n_parts = 2 * (n_ranges + n_changes)
    lengths_at = at + _HEAD.size + _COUNTS.size
    lengths = struct.unpack_from(f"<{n_parts}I", data, lengths_at)
    marks = struct.unpack_from(f"<{n_changes}I", data, lengths_at + 4 * n_parts)
    part_at = lengths_at + 4 * (n_parts + n_changes)
    parts: list[bytes] = []
    for length in lengths:
        parts.append(data[part_at : part_at + length])
        part_at += length
    ranges = list(zip(parts[0 : 2 * n_ranges : 2], parts[1 : 2 * n_ranges : 2], strict=True))
    changes = {
        parts[2 * (n_ranges + i)]: None if mark == _ABSENT else parts[2 * (n_ranges + i) + 1]
        for i, mark in enumerate(marks)
    }
    return Record(version, ranges, changes), end


# -- writing ------------------------------------------------------------------------------------------------------


def _segment_path(directory: Path, number: int) -> Path:
    return directory / f"wal.{number:016d}"


def segments(directory: Path) -> list[int]:
    """Numbers of the segments that exist, in order."""
    return sorted(int(name.suffix[1:]) for name in directory.glob("wal.*"))


def position(txn: Any) -> Position | None:
    """Where the log goes on behind what `txn` sees; None for a tree without a log."""
    value = txn.get(POSITION_KEY)
    return None if value is None else Position(*_POSITION.unpack(value))


def set_position(txn: Any, where: Position) -> None:
    """Write where the log goes on."""
    txn.put(POSITION_KEY, _POSITION.pack(*where))


class Wal:
    """Appends commits to the log. Used within an LMDB write transaction, which keeps out all other writers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._segment = -1
        self._fd = -1
        self._bytes = 0
        self._offset = 0

    def append(self, txn: Any, record: Record) -> bool:
        """Write the new position into `txn` and make the record survive power loss; returns whether a segment began.

        Raises OSError: with ENOSPC nothing counts as written; after any other the record may or may not be there.
        """
        where = position(txn)
        if where is None:
            raise KvError("another process uses the store without durability: stop it, then open the store again")
        data = encode(record)
        begun = where.offset > 0 and where.offset + len(data) > SEGMENT_BYTES
        if begun:
            where = Position(where.segment + 1, 0)
        set_position(txn, Position(where.segment, where.offset + len(data)))
        self._open(where.segment)
        self._extend(where.offset + len(data))
        self._offset = where.offset
        _write_all(self._fd, data, where.offset)
        return begun

    def retract(self) -> None:
        """Take back the record written last: its commit failed. Raises OSError."""
        _write_all(self._fd, bytes(_HEAD.size), self._offset)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = self._segment = -1

    def _open(self, number: int) -> None:
        if self._segment == number:
            return
        self.close()
        path = _segment_path(self._directory, number)
        new = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DSYNC | os.O_CLOEXEC, 0o600)
        self._segment, self._bytes = number, os.fstat(self._fd).st_size
        if new:
            sync_directory(self._directory)

    def _extend(self, end: int) -> None:
        while self._bytes < end:
            # Another process may have done it.
            self._bytes = max(self._bytes, os.fstat(self._fd).st_size)
            if self._bytes < end:
                try:
                    _write_all(self._fd, bytes(EXTEND_BYTES), self._bytes)
                except OSError:
                    os.ftruncate(self._fd, self._bytes)
                    raise
                self._bytes += EXTEND_BYTES


def _write_all(fd: int, data: bytes, offset: int) -> None:
    left = memoryview(data)
    while left:
        written = os.pwrite(fd, left, offset)
        left, offset = left[written:], offset + written


def sync_directory(directory: Path) -> None:
    """Make names in the directory survive a power loss. Raises OSError."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- snapshots ----------------------------------------------------------------------------------------------------


def take_snapshot(directory: Path, env: Any) -> None:
    """Copy the tree while it is in use, then drop the segments it makes unnecessary. Raises OSError, lmdb.Error."""
    with env.begin() as txn:
        needed = position(txn)
    temporary = directory / "snapshot.tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        env.copyfd(fd)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, directory / "snapshot.mdb")
    sync_directory(directory)
    for number in segments(directory):
        if needed is not None and number < needed.segment:
            _segment_path(directory, number).unlink(missing_ok=True)


class Snapshots:
    """Takes snapshots in a thread of its own when the log has grown; of several processes one at a time does."""

    def __init__(self, directory: Path, env: Any) -> None:
        self._directory = directory
        self._env = env
        self._thread: threading.Thread | None = None

    def consider(self) -> None:
        """Begin a snapshot if it is worth it and none is under way. Called when a segment begins."""
        if self._thread is not None and self._thread.is_alive():
            return
        log_bytes = SEGMENT_BYTES * (len(segments(self._directory)) - 1)
        tree_bytes = (self._directory / "data.mdb").stat().st_size
        if log_bytes >= max(LOG_BYTES_MIN, tree_bytes):
            self._thread = threading.Thread(target=self._take, name="fs3-kv-snapshot", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when no snapshot is under way."""
        if self._thread is not None:
            self._thread.join()

    def _take(self) -> None:
        try:
            with open(self._directory / "snapshot.lock", "ab") as turn:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                take_snapshot(self._directory, self._env)
        except BlockingIOError:
            return
        except Exception as error:
            # The log stays as long as it is; the next segment tries again.
            _log.warning("no snapshot of the store %s was taken: %s", self._directory, error)


# -- opening ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _exclusively(users: int) -> Iterator[bool]:
    """Say whether nobody else has the store open; shared with others at the end either way."""
    deadline_s = time.monotonic() + PREPARE_S_MAX
    while True:
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
            break
        except BlockingIOError:
            pass
        try:
            fcntl.flock(users, fcntl.LOCK_SH | fcntl.LOCK_NB)
            alone = False
            break
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise KvError("another process has been preparing the store for long: is it hanging?") from None
            time.sleep(0.02)
    yield alone
    if alone:
        fcntl.flock(users, fcntl.LOCK_SH)


OpenTree = Callable[[Path, bool], Any]


def prepare(directory: Path, durable: bool, open_tree: OpenTree) -> int:
    """Bring the store into the state in which it may be opened; returns a descriptor to keep open as long as it is.

    ``open_tree(directory, sync)`` opens an LMDB environment. A store of another boot is recovered; one without a log
    (made by an earlier version, or used without durability) gets one. Raises KvError, OSError, lmdb.Error.
    """
    users = os.open(directory / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with _exclusively(users) as alone:
            if alone and durable:
                _prepare_durable(directory, open_tree)
            elif alone:
                _prepare_volatile(directory, open_tree)
    except BaseException:
        os.close(users)
        raise
    return users


def in_use(directory: Path) -> bool:
    """Whether any process has the store open."""
    try:
        users = os.open(directory / "users", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(users)
    return False


def _prepare_durable(directory: Path, open_tree: OpenTree) -> None:
    boot = directory / "boot"
    known = boot.read_text(encoding="ascii") if boot.exists() else None
    current = boot_id()
    tree_exists = (directory / "data.mdb").exists()
    if known == current and tree_exists:
        return
    if known is None and tree_exists:
        _begin_log(directory, open_tree)
    else:
        # What is not there yet is made the same way, from nothing.
        _recover(directory, open_tree)
    sync_directory(directory.parent)
    _write_boot(boot, current)


def _write_boot(boot: Path, current: str) -> None:
    temporary = boot.with_suffix(".tmp")
    with open(temporary, "w", encoding="ascii") as file:
        file.write(current)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, boot)
    sync_directory(boot.parent)


def _prepare_volatile(directory: Path, open_tree: OpenTree) -> None:
    """Commits without the log make it worthless: forget it, so that durability begins anew."""
    boot = directory / "boot"
    if not boot.exists():
        return
    if boot.read_text(encoding="ascii") != boot_id():
        _recover(directory, open_tree)
    env = open_tree(directory, True)
    with contextlib.closing(env), env.begin(write=True) as txn:
        txn.delete(POSITION_KEY)
    boot.unlink()
    sync_directory(directory)


def _begin_log(directory: Path, open_tree: OpenTree) -> None:
    """Give a tree that is whole on disk a log: a snapshot, and the position behind it."""
    first = max(segments(directory), default=-1) + 1
    env = open_tree(directory, True)
    with contextlib.closing(env):
        with env.begin(write=True) as txn:
            set_position(txn, Position(first, 0))
        take_snapshot(directory, env)


def _recover(directory: Path, open_tree: OpenTree) -> None:
    """Make the tree anew from the snapshot and the log."""
    made = directory / "recovery"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    snapshot = directory / "snapshot.mdb"
    if snapshot.exists():
        shutil.copyfile(snapshot, made / "data.mdb")
    env = open_tree(made, False)
    with contextlib.closing(env):
        replayed = _replay(directory, env)
        env.sync(True)
    os.replace(made / "data.mdb", directory / "data.mdb")
    shutil.rmtree(made)
    (directory / "lock.mdb").unlink(missing_ok=True)
    sync_directory(directory)
    if replayed or snapshot.exists():
        _log.warning("the machine had stopped: made %s anew from its snapshot and %d commits", directory, replayed)


def _replay(directory: Path, env: Any) -> int:
    with env.begin() as txn:
        where = position(txn) or Position(0, 0)
        version = int.from_bytes(txn.get(records.BASE_KEY) or b"", "big") + int(txn.id())
    first = where
    count = 0
    batch: list[Record] = []
    batch_bytes = 0
    for record, where in _records(directory, first, version):
        batch.append(record)
        batch_bytes += sum(len(key) + len(value or b"") for key, value in record.changes.items())
        count += 1
        if batch_bytes > REPLAY_BYTES_MAX:
            _apply(env, batch, where)
            batch, batch_bytes = [], 0
    _apply(env, batch, where)
    return count


def _apply(env: Any, batch: Sequence[Record], where: Position) -> None:
    with env.begin(write=True) as txn:
        txn.put(records.FORMAT_KEY, records.encode_format(records.FORMAT))
        for record in batch:
            for begin, end in record.ranges:
                records.delete_range(txn, begin, end)
            for key, value in record.changes.items():
                records.put(txn, key, value)
        set_position(txn, where)
        if batch:
            # Versions go on from where they were.
            txn.put(records.BASE_KEY, max(0, batch[-1].version - int(txn.id())).to_bytes(8, "big"))


def _records(directory: Path, start: Position, version: int) -> Iterator[tuple[Record, Position]]:
    """The records behind `start` with versions above `version`, each with the position behind it.

    The log ends with the first place where no sound record of a later version is. Raises KvError when there is one
    further on: then what lies between was damaged, not cut off by the power loss.
    """
    number, offset = start
    while True:
        path = _segment_path(directory, number)
        data = path.read_bytes() if path.exists() else b""
        while (found := decode(data, offset)) is not None and found[0].version > version:
            record, offset = found
            version = record.version
            yield record, Position(number, offset)
        following = _segment_path(directory, number + 1)
        beyond = decode(following.read_bytes(), 0) if following.exists() else None
        if beyond is None or beyond[0].version <= version:
            break
        if _sound_record_in(data, offset, version):
            break
        number, offset = number + 1, 0
    if _sound_record_in(data, offset + 1, version):
        raise KvError(
            f"{path} is damaged at byte {offset}, before records that are sound: restore the store from a backup, or "
            f"move the file away to go on without what was committed since"
        )


def _sound_record_in(data: bytes, start: int, version: int) -> bool:
    mark = struct.pack("<I", _MAGIC)
    at = data.find(mark, start)
    while at >= 0:
        found = decode(data, at)
        if found is not None and found[0].version > version:
            return True
        at = data.find(mark, at + 1)
    return False
