"""How the LMDB engine lays out its tree: the store's own records, the conflict log, and long keys.

One tree holds everything. Keys of users sort below 0xff; the store's records begin with it. LMDB keys end at
511 bytes, so user keys longer than 510 bytes live in a *bucket*: one record per common prefix of 510 bytes, under
that prefix and a zero byte, holding (rest of key, value) pairs in order. A bucket sorts right behind its prefix
and before every other key, so a walk of the tree that unpacks buckets is a walk in key order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from fs3.kv.conflicts import Entry, KeyRange

FORMAT_KEY = b"\xff/format"
BASE_KEY = b"\xff/base"
LOG_PREFIX = b"\xff/log/"
LOG_END = b"\xff/log0"
# 2: the tree alone is not durable, see lmdb_wal.
FORMAT = 2
SHORT_KEY_BYTES_MAX = 510

_FORMAT_RECORD = struct.Struct("<4sI")
_FORMAT_MAGIC = b"fs3k"
_LOG_HEAD = struct.Struct("<QII")  # at_ms, number of keys, number of ranges
_PAIR_HEAD = struct.Struct("<HI")  # bytes of the rest of the key, bytes of the value

Row = tuple[bytes, bytes]


def encode_format(version: int) -> bytes:
    """Make the record that says which layout the directory has."""
    return _FORMAT_RECORD.pack(_FORMAT_MAGIC, version)


def decode_format(record: bytes) -> int:
    """Return the layout version, or 0 when the record is not ours."""
    if len(record) < _FORMAT_RECORD.size:
        return 0
    magic, version = _FORMAT_RECORD.unpack_from(record)
    return int(version) if magic == _FORMAT_MAGIC else 0


def log_key(version: int) -> bytes:
    """Return the key of the conflict log's entry of a commit."""
    return LOG_PREFIX + version.to_bytes(8, "big")


def log_version(key: bytes) -> int:
    """Return the version in a key of the conflict log."""
    return int.from_bytes(key[len(LOG_PREFIX) :], "big")


def encode_log(at_ms: int, keys: Sequence[bytes], ranges: Sequence[KeyRange]) -> bytes:
    """Make the conflict log's entry: head, lengths (16 bits each), then the keys and the range boundaries."""
    parts = [*keys]
    for key_range in ranges:
        parts += key_range
    lengths = struct.pack(f"<{len(parts)}H", *map(len, parts))
    return b"".join((_LOG_HEAD.pack(at_ms, len(keys), len(ranges)), lengths, *parts))


def log_at_ms(record: bytes) -> int:
    """Return when the entry was made, in milliseconds on the monotonic clock of this machine's boot."""
    return int.from_bytes(record[:8], "little")


def decode_log(version: int, record: bytes) -> Entry:
    """Undo encode_log."""
    at_ms, n_keys, n_ranges = _LOG_HEAD.unpack_from(record)
    n_parts = n_keys + 2 * n_ranges
    lengths = struct.unpack_from(f"<{n_parts}H", record, _LOG_HEAD.size)
    ends = list(accumulate(lengths, initial=_LOG_HEAD.size + 2 * n_parts))
    parts = [record[ends[i] : ends[i + 1]] for i in range(n_parts)]
    bounds = parts[n_keys:]
    return Entry(version, at_ms, parts[:n_keys], list(zip(bounds[::2], bounds[1::2], strict=True)))


def _bucket_key(key: bytes) -> bytes:
    return key[:SHORT_KEY_BYTES_MAX] + b"\x00"


def _unpack_bucket(record: bytes) -> list[Row]:
    rows: list[Row] = []
    at = 0
    while at < len(record):
        rest_bytes, value_bytes = _PAIR_HEAD.unpack_from(record, at)
        at += _PAIR_HEAD.size
        value_at = at + rest_bytes
        rows.append((record[at:value_at], record[value_at : value_at + value_bytes]))
        at = value_at + value_bytes
    return rows


def _write_bucket(txn: Any, bucket: bytes, rows: list[Row]) -> None:
    if not rows:
        txn.delete(bucket)
        return
    txn.put(bucket, b"".join(_PAIR_HEAD.pack(len(rest), len(value)) + rest + value for rest, value in rows))


def get(txn: Any, key: bytes) -> bytes | None:
    """Return the value of a user key of any permitted length in an LMDB transaction."""
    if len(key) <= SHORT_KEY_BYTES_MAX:
        value: bytes | None = txn.get(key)
        return value
    rest = key[SHORT_KEY_BYTES_MAX:]
    for found, value in _unpack_bucket(txn.get(_bucket_key(key)) or b""):
        if found == rest:
            return value
    return None


def put(txn: Any, key: bytes, value: bytes | None) -> None:
    """Write or (None) remove a user key of any permitted length."""
    if len(key) <= SHORT_KEY_BYTES_MAX:
        if value is None:
            txn.delete(key)
        else:
            txn.put(key, value)
        return
    bucket = _bucket_key(key)
    rest = key[SHORT_KEY_BYTES_MAX:]
    rows = [row for row in _unpack_bucket(txn.get(bucket) or b"") if row[0] != rest]
    if value is not None:
        rows.append((rest, value))
        rows.sort()
    _write_bucket(txn, bucket, rows)


def iterate(txn: Any, begin: bytes, end: bytes, reverse: bool) -> Iterator[Row]:
    """Walk the user pairs of ``[begin, end)`` in key order or the reverse; `end` is at most 0xff."""
    cursor = txn.cursor()
    if reverse:
        yield from _iterate_back(cursor, begin, end)
        return
    # A short boundary never falls inside a bucket; a long one may, so the walk starts at its prefix.
    if not (cursor.set_range(begin[:SHORT_KEY_BYTES_MAX]) if begin else cursor.first()):
        return
    for key, value in cursor.iternext():
        if key >= end:
            return
        if len(key) > SHORT_KEY_BYTES_MAX:
            prefix = key[:SHORT_KEY_BYTES_MAX]
            for rest, held in _unpack_bucket(value):
                if begin <= prefix + rest < end:
                    yield prefix + rest, held
        elif key >= begin:
            yield key, value


def _iterate_back(cursor: Any, begin: bytes, end: bytes) -> Iterator[Row]:
    first = begin[:SHORT_KEY_BYTES_MAX]
    seek = end if len(end) <= SHORT_KEY_BYTES_MAX else _bucket_key(end)
    if cursor.set_range(seek):
        inside_bucket = len(end) > SHORT_KEY_BYTES_MAX and cursor.key() == seek
        if not inside_bucket and not cursor.prev():
            return
    elif not cursor.last():
        return
    for key, value in cursor.iterprev():
        if key < first:
            return
        if len(key) > SHORT_KEY_BYTES_MAX:
            prefix = key[:SHORT_KEY_BYTES_MAX]
            for rest, held in reversed(_unpack_bucket(value)):
                if begin <= prefix + rest < end:
                    yield prefix + rest, held
        elif begin <= key < end:
            yield key, value


def delete_range(txn: Any, begin: bytes, end: bytes) -> None:
    """Remove the user pairs of ``[begin, end)``."""
    cursor = txn.cursor()
    try:
        found = cursor.set_range(begin[:SHORT_KEY_BYTES_MAX]) if begin else cursor.first()
        while found:
            key = cursor.key()
            if key >= end:
                return
            if len(key) > SHORT_KEY_BYTES_MAX:
                prefix = key[:SHORT_KEY_BYTES_MAX]
                rows = _unpack_bucket(cursor.value())
                kept = [row for row in rows if not begin <= prefix + row[0] < end]
                if kept:
                    if len(kept) < len(rows):
                        _write_bucket(txn, key, kept)
                        cursor.set_key(key)
                    found = cursor.next()
                    continue
            elif key < begin:
                found = cursor.next()
                continue
            cursor.delete()
            # LMDB leaves the cursor on the successor; past the last record its key is empty.
            found = bool(cursor.key())
    finally:
        cursor.close()
