"""Copy everything from one store into another, in transactions inside the limits, and compare the two.

Neither store may be in use. While a copy is not complete the target holds a marker, written in the same transaction as
each batch, that says where it goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction
from fs3.kv.buffer import KEYS_END

MARKER: Final = b"\x00fs3/migration"
MARKER_FORMAT: Final = 1
READ_ROWS_MAX: Final = 1_000
# FoundationDB asks for transactions well below its limit of 10 MB.
BATCH_BYTES_MAX: Final = 1 << 20
DEADLINE_MS: Final = 60_000
_FIRST: Final = MARKER + b"\x00"

Row = tuple[bytes, bytes]
# Called with the number of records and their bytes so far.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Contents:
    """What a store holds: records, bytes of keys and values, and a digest of all of them in order, in hexadecimal."""

    records: int
    content_bytes: int
    sha256: str


async def copy(source: KvStore, target: KvStore, *, source_name: str, report: Report) -> bool:
    """Copy every record; returns whether an earlier copy was continued. Durable when it returns.

    Raises KvError when the source is empty or incomplete, or the target holds anything but an earlier, unfinished
    copy from `source_name`.
    """
    await _check_source(source)
    begin = await _place(target, source_name)
    resumed = begin is not None
    begin = begin or _FIRST
    records = content_bytes = 0
    while rows := await _read(source, begin):
        for batch in _batches(rows):
            begin = batch[-1][0] + b"\x00"
            await _write(target, batch, _marker(source_name, begin))
            records += len(batch)
            content_bytes += _bytes_of(batch)
            report(records, content_bytes)
    return resumed


async def compare(source: KvStore, target: KvStore, *, report: Report) -> Contents:
    """Read both stores; returns what they hold. Raises KvError that names the first key where they differ."""
    digest = hashlib.sha256()
    records = content_bytes = 0
    begin = _FIRST
    while True:
        ours, theirs = await _read(source, begin), await _read(target, begin)
        if ours != theirs:
            raise KvError(
                f"the stores differ at key {_first_difference(ours, theirs).hex()}: something wrote to one of them "
                "meanwhile; stop it, empty the target and begin again"
            )
        if not ours:
            return Contents(records, content_bytes, digest.hexdigest())
        for part in (part for row in ours for part in row):
            digest.update(len(part).to_bytes(4, "little") + part)
        records += len(ours)
        content_bytes += _bytes_of(ours)
        begin = ours[-1][0] + b"\x00"
        report(records, content_bytes)


async def finish(target: KvStore) -> None:
    """Remove the marker: the copy is complete."""

    async def clear(txn: Transaction) -> None:
        txn.clear(MARKER)

    await retry.run(target, clear, idempotent=True, deadline_ms=DEADLINE_MS)


async def _check_source(source: KvStore) -> None:
    first = await _read(source, b"", limit=1)
    if not first:
        raise KvError("the store to copy from is empty: is its URL right?")
    if first[0][0] == MARKER:
        raise KvError("the store to copy from is an unfinished copy itself")
    if first[0][0] < MARKER:
        raise KvError(f"the store to copy from is not one of fs3: it has a key {first[0][0].hex()}")


async def _place(target: KvStore, source_name: str) -> bytes | None:
    """Where an earlier copy goes on; None for an empty store."""
    first = await _read(target, b"", limit=1)
    if not first:
        return None
    key, value = first[0]
    if key != MARKER:
        raise KvError("the store to copy to is not empty")
    marker = json.loads(value)
    if marker["format"] != MARKER_FORMAT or marker["from"] != source_name:
        raise KvError(
            f"the store to copy to holds an unfinished copy of {marker['from']}: go on with that, or empty it"
        )
    return bytes.fromhex(marker["next"])


def _marker(source_name: str, begin: bytes) -> bytes:
    return json.dumps({"format": MARKER_FORMAT, "from": source_name, "next": begin.hex()}).encode()


async def _read(store: KvStore, begin: bytes, limit: int = READ_ROWS_MAX) -> list[Row]:
    async def read(txn: Transaction) -> list[Row]:
        return await txn.get_range(begin, KEYS_END, limit=limit, snapshot=True)

    return await retry.run(store, read, deadline_ms=DEADLINE_MS)


async def _write(target: KvStore, batch: Sequence[Row], marker: bytes) -> None:
    async def write(txn: Transaction) -> None:
        for key, value in batch:
            txn.set(key, value)
        txn.set(MARKER, marker)

    await retry.run(target, write, idempotent=True, deadline_ms=DEADLINE_MS)


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    batch_bytes = 0
    for row in rows:
        row_bytes = len(row[0]) + len(row[1])
        if batch and batch_bytes + row_bytes > BATCH_BYTES_MAX:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(row)
        batch_bytes += row_bytes
    if batch:
        yield batch


def _bytes_of(rows: Sequence[Row]) -> int:
    return sum(len(key) + len(value) for key, value in rows)


def _first_difference(ours: Sequence[Row], theirs: Sequence[Row]) -> bytes:
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return min(mine[0], other[0])
    longer = max(ours, theirs, key=len)
    return longer[min(len(ours), len(theirs))][0]
