"""Tar shards as WebDataset writes them: members with the same name up to the first dot are one sample."""

from __future__ import annotations

import io
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fs3.client import FileSystem
from fs3.data.dataset import IndexedDataset
from fs3.data.index import (
    FLAG_BESIDE,
    FLAG_UNCHECKED,
    HEADER_BYTES,
    MISSING,
    RECORD_BYTES_MAX,
    Index,
    make_keys,
    pack_index,
    wrong,
)
from fs3.data.records import read_headers, read_indexes
from fs3.data.store import Source, Status, Store, present, published

# Beside a shard: shard.tar.fs3i.
INDEX_SUFFIX = ".fs3i"
# Shards that are scanned at a time, and what one read of a scan brings.
SCANS = 8
SCAN_BYTES = 256 << 10
# Kinds of members (extensions) in a shard. More is not what WebDataset writes, and an index has a place for each.
FIELDS_MAX = 256
# Directory and name up to its first dot; the rest is the field.
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class TarDataset(IndexedDataset):
    """The samples of WebDataset shards (uncompressed tar files), by number: dictionaries of the fields of each.

    Arguments are those of :class:`SpanDataset`. A shard is scanned when the dataset is opened, header by header, unless
    `fs3 data index` (or :func:`build_index`) left an index beside it that fits its size and time of modification.
    ``save_index``: leave one. Fields are the extensions, in lower case ("jpg", "seg.png"). The key is the name without
    it. Tar files have no checksums of data.
    """

    suffixes = (".tar",)

    def __init__(
        self,
        source: Source | Sequence[Source],
        *,
        save_index: bool = False,
        fs: FileSystem | None = None,
        token: str | None = None,
        **options: Any,
    ) -> None:
        self._save_index = save_index
        super().__init__(source, fs=fs, token=token, **options)

    def _scan(self) -> Sequence[int]:
        self._reset()
        statuses = present(self._store, self._paths)
        beside = [path + INDEX_SUFFIX for path in self._paths]
        stored = [n for n, status in enumerate(self._store.statuses(beside)) if status is not None]
        headers = read_headers(self._store, [beside[n] for n in stored])
        self._headers = dict(zip(stored, headers, strict=True))
        self._statuses = statuses
        # Indexes without a file: kept, also in pickles.
        self._scanned: dict[int, Index] = {}
        # Whether they fit is in the indexes; so all are read at once, of which most are needed soon anyway.
        for n, index in zip(stored, self._read(stored), strict=True):
            if index.metadata.get("source") == _source(statuses[n]):
                self._indexes[n] = index
        missing = [n for n in range(len(self._paths)) if n not in self._indexes]
        for n, index in zip(missing, scan(self._store, [self._paths[n] for n in missing]), strict=True):
            self._scanned[n] = self._indexes[n] = index
            if self._save_index:
                save(self._store, self._paths[n], statuses[n], index)
        return [len(self._indexes[n]) for n in range(len(self._paths))]

    def _read(self, shards: Sequence[int]) -> list[Index]:
        paths = [self._paths[n] + INDEX_SUFFIX for n in shards]
        return read_indexes(self._store, paths, [self._headers[n] for n in shards])

    def _load(self, shards: list[int]) -> list[Index]:
        stored = [n for n in shards if n not in self._scanned]
        found = dict(zip(stored, self._read(stored), strict=True)) | self._scanned
        return [found[n] for n in shards]

    def fields(self) -> tuple[str, ...]:
        """The fields of all shards, in the order in which they come first."""
        self.load_indexes()
        return tuple(dict.fromkeys(name for n in range(len(self._paths)) for name in self._indexes[n].fields))

    def _has_fields(self, shard: int) -> bool:
        return True

    def _fields(self, shard: int, row: int) -> list[tuple[str, int, int]] | None:
        index = self._indexes[shard]
        return super()._fields(shard, row) or [(index.fields[0], 0, int(index.lengths[row]))]


def build_index(store: Store, path: str) -> Index:
    """Scan a shard and leave its index beside it, replacing one that is there."""
    (status,) = present(store, [path])
    (index,) = scan(store, [path])
    save(store, path, status, index)
    return index


def index_shards(
    store: Store,
    paths: Sequence[str],
    *,
    jobs: int = SCANS,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Leave indexes beside shards that have none that fits (`force`: beside all); which got one.

    `progress` is called with the number of shards done.
    """

    def work(path: str) -> str | None:
        if not force and is_indexed(store, path):
            return None
        build_index(store, path)
        return path

    made = []
    with ThreadPoolExecutor(jobs, thread_name_prefix="fs3-tar") as pool:
        for number, path in enumerate(pool.map(work, paths), 1):
            if path is not None:
                made.append(path)
            if progress is not None:
                progress(number)
    return made


def is_indexed(store: Store, path: str) -> bool:
    """Whether an index lies beside a shard that fits it."""
    shard, beside = store.statuses([path, path + INDEX_SUFFIX])
    if shard is None or beside is None:
        return False
    paths = [path + INDEX_SUFFIX]
    (index,) = read_indexes(store, paths, read_headers(store, paths))
    return bool(index.metadata.get("source") == _source(shard))


def save(store: Store, path: str, status: Status, index: Index) -> None:
    """Leave an index beside a shard. `status`: of the shard, before it was scanned."""
    stored = Index(
        index.starts,
        index.lengths,
        None,
        index.fields,
        index.places,
        index.keys,
        {"source": _source(status)},
    )
    header, block = pack_index(stored, HEADER_BYTES, flags=FLAG_BESIDE | FLAG_UNCHECKED)
    with published(store, path + INDEX_SUFFIX) as output:
        output.pwrite(header.pack() + block, 0)


def _source(status: Status) -> list[int]:
    """What tells whether a shard is still the one that was scanned."""
    return [status.bytes, status.mtime_ns]


def scan(store: Store, paths: Sequence[str]) -> list[Index]:
    """The indexes of shards, found from their headers; several shards at a time."""
    if not paths:
        return []
    with ThreadPoolExecutor(min(SCANS, len(paths)), thread_name_prefix="fs3-tar") as pool:
        return list(pool.map(lambda path: _scan_shard(store, path), paths))


def _scan_shard(store: Store, path: str) -> Index:
    try:
        return _Samples(path, _members(store, path)).index()
    except tarfile.TarError as e:
        raise wrong(path, f"it is no tar file without compression, or damaged: {e}") from e


def _members(store: Store, path: str) -> Iterator[tarfile.TarInfo]:
    (status,) = present(store, [path])
    buffered = io.BufferedReader(_Reader(store, path, status.bytes), SCAN_BYTES)
    with tarfile.open(fileobj=buffered, mode="r:") as tar:
        while (member := tar.next()) is not None:
            # Sparse ones are stored in pieces.
            if member.isreg() and not member.issparse():
                yield member
            # It would keep every member.
            tar.members.clear()  # type: ignore[attr-defined]


class _Samples:
    """The samples of a shard, from its members in their order."""

    def __init__(self, path: str, members: Iterator[tarfile.TarInfo]) -> None:
        self._path = path
        self._fields: dict[str, int] = {}
        self._keys: list[str] = []
        self._starts, self._lengths = array("Q"), array("I")
        # (sample, field, offset, length) of every member.
        self._places = array("Q")
        for member in members:
            found = _MEMBER.fullmatch(member.name)
            if found and not found[1].rpartition("/")[2].startswith("__"):
                self._add(found[1].removeprefix("./"), found[2].lower(), member)

    def _add(self, key: str, field: str, member: tarfile.TarInfo) -> None:
        if not self._keys or self._keys[-1] != key:
            self._keys.append(key)
            self._starts.append(member.offset_data)
            self._lengths.append(0)
            self._seen: set[str] = set()
        if field in self._seen:
            raise wrong(self._path, f"it has two members {key}.{field} in one sample")
        self._seen.add(field)
        number = self._fields.setdefault(field, len(self._fields))
        if number == FIELDS_MAX:
            raise wrong(self._path, f"its members have more than {FIELDS_MAX} different extensions")
        offset = member.offset_data - self._starts[-1]
        if offset + member.size > RECORD_BYTES_MAX:
            raise wrong(self._path, f"the sample {key} has more than {RECORD_BYTES_MAX} bytes")
        self._lengths[-1] = offset + member.size
        self._places.extend((len(self._keys) - 1, number, offset, member.size))

    def index(self) -> Index:
        """All of them."""
        count, fields = len(self._keys), tuple(self._fields) or ("data",)
        places = np.zeros((count, len(fields), 2), np.uint32)
        places[:, :, 1] = MISSING
        sample, field, offset, length = np.array(self._places, np.int64).reshape(-1, 4).T
        places[sample, field, 0], places[sample, field, 1] = offset, length
        return Index(
            np.array(self._starts, np.uint64),
            np.array(self._lengths, np.uint32),
            None,
            fields,
            places if len(fields) > 1 else None,
            make_keys(self._keys),
        )


class _Reader(io.RawIOBase):
    """A file of a store, for reading in order with skips."""

    def __init__(self, store: Store, path: str, size: int) -> None:
        super().__init__()
        self._store, self._path, self._size, self._position = store, path, size, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """From the position on."""
        view = memoryview(buffer).cast("B")
        (count,) = self._store.read([(self._path, self._position, view)])
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position
