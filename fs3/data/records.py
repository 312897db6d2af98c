"""Record files (``.fs3r``): any number of records in one file, with an index and a checksum of each (docs/data.md)."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from fs3 import native
from fs3.client import FileSystem
from fs3.client.buffers import exported
from fs3.core.errors import error
from fs3.data.dataset import BLOCK_BYTES, IndexedDataset
from fs3.data.index import (
    FIELD,
    HEADER_BYTES,
    MISSING,
    RECORD_BYTES_MAX,
    Header,
    Index,
    make_keys,
    pack_index,
    unpack_index,
    wrong,
)
from fs3.data.store import Store, locate, published, read_whole
from fs3.v1.frame_pb2 import Code

if TYPE_CHECKING:
    from types import TracebackType

SUFFIX = ".fs3r"
# Written at once.
BUFFER_BYTES = 8 << 20
# Records of this size and more begin at a block of the cluster's checksums: they are read without copying any part.
ALIGNED_BYTES = 32 << 10
SMALL_ALIGNMENT = 8
# A shard of a directory that was packed: part-00003-of-00012.fs3r
_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d+)-of-(?P<total>\d+)" + re.escape(SUFFIX))


class RecordWriter:
    """Writes one record file, which appears under its name when it is closed, and only then. Not thread-safe.

    ``path`` is a URL, a path on ``fs``, or local; its directory must exist. What was there is replaced. Closing returns
    after the file is on stable storage (``sync=False``: after every replica has it). ``fields``: records of several
    named parts, given as dictionaries; ``metadata``: anything JSON can say, kept in the file. A context manager: an
    exception inside leaves nothing behind. Memory: 8 MiB and about 20 bytes per record.
    """

    def __init__(
        self,
        path: str,
        *,
        fs: FileSystem | None = None,
        token: str | None = None,
        fields: Sequence[str] = (FIELD,),
        metadata: Mapping[str, Any] | None = None,
        sync: bool = True,
    ) -> None:
        if not fields or len(set(fields)) != len(fields):
            raise error(Code.CODE_INVALID_ARGUMENT, f"the names of fields must differ: {list(fields)}")
        self._fields = tuple(fields)
        self._metadata = dict(metadata or {})
        self._stack = ExitStack()
        with ExitStack() as stack:
            store, (where,) = locate(path, fs, token)
            stack.callback(store.close)
            self._output = stack.enter_context(published(store, where, sync=sync))
            self._stack = stack.pop_all()
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        # Bytes in the buffer, and the place of its first in the file.
        self._filled, self._at = HEADER_BYTES, 0
        self._starts, self._lengths, self._crcs, self._places = array("Q"), array("I"), array("I"), array("I")
        self._keys: list[str] = []
        self._open = True

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._open = False
            self._stack.__exit__(kind, value, trace)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def bytes(self) -> int:
        """Written so far, without the index."""
        return self._at + self._filled

    def write(self, record: Any, key: str | None = None) -> int:
        """Add a record: any contiguous memory, or a dictionary of them where there are several fields; its number.

        Fields that a dictionary lacks are missing in the sample. `key` names it; either all records have one or none.
        """
        if not self._open:
            raise ValueError("the writer is closed")
        if (key is not None) != bool(self._keys) and self._starts:
            raise ValueError("either all records have a key or none")
        parts = self._parts(record)
        length = sum(len(part) for part in parts if part is not None)
        if length > RECORD_BYTES_MAX:
            raise error(Code.CODE_TOO_LARGE, f"a record of {length} bytes; there may be {RECORD_BYTES_MAX}")
        self._pad(BLOCK_BYTES if length >= ALIGNED_BYTES else SMALL_ALIGNMENT)
        self._starts.append(self._at + self._filled)
        self._lengths.append(length)
        self._crcs.append(_crc([part for part in parts if part is not None]))
        if key is not None:
            self._keys.append(key)
        offset = 0
        for part in parts:
            if len(parts) > 1:
                self._places.extend((offset, MISSING if part is None else len(part)))
            if part is not None:
                self._append(part)
                offset += len(part)
        return len(self) - 1

    def _parts(self, record: Any) -> list[memoryview | None]:
        if len(self._fields) == 1 and not isinstance(record, Mapping):
            return [_bytes(record)]
        if not isinstance(record, Mapping):
            raise TypeError(f"a record here is a dictionary of {list(self._fields)}, not {type(record).__name__}")
        unknown = sorted(set(record) - set(self._fields))
        if unknown:
            raise ValueError(f"the file has no field {unknown[0]!r}, only {list(self._fields)}")
        if len(self._fields) == 1 and not record:
            raise ValueError(f"the record lacks the field {self._fields[0]!r}")
        return [_bytes(record[name]) if name in record else None for name in self._fields]

    def _pad(self, alignment: int) -> None:
        gap = -(self._at + self._filled) % alignment
        if gap:
            self._append(memoryview(bytes(gap)))

    def _append(self, data: memoryview) -> None:
        while len(data):
            room = min(len(data), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + room] = data[:room]
            self._filled += room
            data = data[room:]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        self._output.pwrite(self._buffer[: self._filled], self._at)
        self._at, self._filled = self._at + self._filled, 0

    def close(self) -> None:
        """Write the index and publish the file. Closing again does nothing."""
        if not self._open:
            return
        self._open = False
        with self._stack:
            self._pad(BLOCK_BYTES)
            header, block = pack_index(self._index(), self.bytes)
            self._append(memoryview(block))
            self._flush()
            self._output.pwrite(header.pack(), 0)

    def _index(self) -> Index:
        count = len(self)
        places = np.array(self._places, np.uint32).reshape(count, len(self._fields), 2) if self._places else None
        if len(self._fields) > 1 and places is None:
            places = np.empty((0, len(self._fields), 2), np.uint32)
        return Index(
            np.array(self._starts, np.uint64),
            np.array(self._lengths, np.uint32),
            np.array(self._crcs, np.uint32),
            self._fields,
            places,
            make_keys(self._keys) if self._keys else None,
            self._metadata,
        )


def _bytes(data: Any) -> memoryview:
    view = memoryview(exported(data))
    if not view.c_contiguous:
        raise BufferError("the memory of a record must be contiguous")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _crc(parts: list[memoryview]) -> int:
    return native.crc32c(parts[0] if len(parts) == 1 else b"".join(parts))


def read_headers(store: Store, paths: Sequence[str]) -> list[Header]:
    """The headers of record files or stored indexes, in one submission."""
    views = [memoryview(bytearray(HEADER_BYTES)) for _ in paths]
    counts = store.read([(path, 0, view) for path, view in zip(paths, views, strict=True)])
    found = zip(paths, views, counts, strict=True)
    return [Header.unpack(bytes(view[:count]), path) for path, view, count in found]


def read_indexes(store: Store, paths: Sequence[str], headers: Sequence[Header]) -> list[Index]:
    """The indexes that headers tell of, in one submission."""
    places = [(path, header.index_offset, header.index_bytes) for path, header in zip(paths, headers, strict=True)]
    blocks = read_whole(store, places)
    return [unpack_index(*one) for one in zip(headers, blocks, paths, strict=True)]


class RecordDataset(IndexedDataset):
    """The records of record files, by number. Arguments are those of :class:`SpanDataset`.

    A sample is the record, or, where the file has several fields, a dictionary of those that the record has.
    """

    suffixes = (SUFFIX,)

    def _expand(self, given: list[str]) -> list[str]:
        for path in given:
            missing = missing_shards(self._store.names(path)) if self._store.is_directory(path) else []
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                why = f"{missing[0]}{more} is missing: run `fs3 data pack` again until it ends, or name the shards"
                raise wrong(path, why)
        return super()._expand(given)

    def _scan(self) -> Sequence[int]:
        self._reset()
        self._headers = read_headers(self._store, self._paths)
        return [header.records for header in self._headers]

    def _load(self, shards: list[int]) -> list[Index]:
        return read_indexes(self._store, [self._paths[s] for s in shards], [self._headers[s] for s in shards])

    def metadata(self, shard: int = 0) -> dict[str, Any]:
        """What the writer of a shard kept with it."""
        return self.index(shard).metadata


def missing_shards(names: Sequence[str]) -> list[str]:
    """The shards that packing has not finished, by the names of those that are there."""
    there: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if found := _NAME.fullmatch(name):
            there.setdefault((found["prefix"], found["total"]), set()).add(int(found["number"]))
    return [
        shard_name(prefix, number, int(total))
        for (prefix, total), numbers in sorted(there.items())
        for number in range(int(total))
        if number not in numbers
    ]


def shard_name(prefix: str, number: int, total: int) -> str:
    """The name of one of `total` shards."""
    return f"{prefix}-{number:05d}-of-{total:05d}{SUFFIX}"
