"""Packing files, tar shards and lines into record files: several shards at a time, each whole or absent."""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fs3.client import FileSystem
from fs3.core.errors import error
from fs3.data.index import FIELD, wrong
from fs3.data.records import SUFFIX, RecordWriter, read_headers, read_indexes, shard_name
from fs3.data.store import ClusterStore, Source, Status, Store, join, locate, matching, present, short, split
from fs3.data.tar import TarDataset
from fs3.v1.frame_pb2 import Code

SHARD_BYTES = 256 << 20
JOBS = 4
PREFIX = "part"
# What a worker reads of its source at a time, at most, unless a record is larger.
BATCH_BYTES = 16 << 20
BATCH_RECORDS = 512
LINES = (".jsonl", ".ndjson")
TARS = (".tar",)


@dataclass(frozen=True)
class Progress:
    """What packing has done so far. ``skipped``: shards that an earlier run had finished, counted in ``shards`` too."""

    shards: int
    shards_total: int
    skipped: int
    records: int
    bytes: int
    path: str
    """The shard that got on last."""


class Piece(ABC):
    """What one shard is made of."""

    def field_names(self) -> tuple[str, ...]:
        """Of its records."""
        return (FIELD,)

    @abstractmethod
    def describe(self) -> Any:
        """What, if it is the same, makes the same shard; JSON can say it."""

    @abstractmethod
    def batches(self) -> Iterator[list[tuple[Any, str | None]]]:
        """(record, key) in batches; records are valid until the next batch."""

    def close(self) -> None:
        """Let go of what is open."""
        return


@dataclass(frozen=True)
class FilesPiece(Piece):
    """Whole files, their names as keys."""

    store: Store
    files: Sequence[tuple[str, str, Status]]
    """Path, key and status of each."""

    def describe(self) -> Any:
        """Names, sizes and times."""
        return ["files", [[key, status.bytes, status.mtime_ns] for _, key, status in self.files]]

    def batches(self) -> Iterator[list[tuple[Any, str | None]]]:
        """Files, read many at a time into one buffer."""
        buffer = memoryview(bytearray())
        for batch in _cut(self.files, lambda file: file[2].bytes, BATCH_BYTES, BATCH_RECORDS):
            total = sum(status.bytes for _, _, status in batch)
            if len(buffer) < total:
                buffer = memoryview(bytearray(total))
            views, at = [], 0
            for _, _, status in batch:
                views.append(buffer[at : at + status.bytes])
                at += status.bytes
            counts = self.store.read([(file[0], 0, view) for file, view in zip(batch, views, strict=True)])
            for (path, _, status), count in zip(batch, counts, strict=True):
                if count < status.bytes:
                    raise short(path, status.bytes)
            yield [(view, key) for (_, key, _), view in zip(batch, views, strict=True)]


@dataclass(frozen=True)
class LinesPiece(Piece):
    """The lines of a file that begin from byte `start` on and before byte `end`; without their ends, empty ones not."""

    store: Store
    path: str
    status: Status
    start: int
    end: int

    def describe(self) -> Any:
        """Name, size, time and range."""
        return ["lines", split(self.path)[1], self.status.bytes, self.status.mtime_ns, self.start, self.end]

    def batches(self) -> Iterator[list[tuple[Any, str | None]]]:
        """Lines, a block of the file at a time."""
        # From the byte before: only its being the end of a line tells that one begins at `start`.
        at = max(0, self.start - 1)
        skipping = self.start > 0
        rest = b""
        while True:
            block = bytearray(min(BATCH_BYTES, self.status.bytes - at))
            (count,) = self.store.read([(self.path, at, memoryview(block))])
            if count < len(block):
                raise short(self.path, at + len(block))
            begin = at - len(rest)
            lines = (rest + bytes(block)).split(b"\n")
            at += count
            last = at >= self.status.bytes
            rest = b"" if last else lines.pop()
            found: list[tuple[Any, str | None]] = []
            for line in lines:
                if skipping:
                    skipping = False
                elif begin >= self.end:
                    yield found
                    return
                elif text := line.removesuffix(b"\r"):
                    found.append((text, None))
                begin += len(line) + 1
            yield found
            if last:
                return


@dataclass(frozen=True)
class TarPiece(Piece):
    """Samples of tar shards, from number `start` to before `end`."""

    dataset: TarDataset
    sources: Sequence[tuple[str, Status]]
    lengths: NDArray[np.int64]
    fields: tuple[str, ...]
    start: int
    end: int

    def field_names(self) -> tuple[str, ...]:
        """Those of all shards."""
        return self.fields

    def describe(self) -> Any:
        """All shards, and the range."""
        about = [[split(path)[1], status.bytes, status.mtime_ns] for path, status in self.sources]
        return ["tar", about, list(self.fields), self.start, self.end]

    def batches(self) -> Iterator[list[tuple[Any, str | None]]]:
        """Samples, read many at a time."""
        for batch in _cut(range(self.start, self.end), self.lengths.item, BATCH_BYTES, BATCH_RECORDS):
            samples = self.dataset.__getitems__(batch)
            found = []
            for sample in samples:
                key = sample.pop("__key__")
                found.append((sample if len(self.fields) > 1 else sample[self.fields[0]], key))
            yield found

    def close(self) -> None:
        """Close the shards; several pieces share them."""
        self.dataset.close()


def pack(
    sources: Source | Sequence[Source],
    destination: str,
    *,
    source_fs: FileSystem | None = None,
    fs: FileSystem | None = None,
    token: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int = JOBS,
    prefix: str = PREFIX,
    progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Pack `sources` into record files ``PREFIX-00000-of-00012.fs3r`` in the directory `destination`, made if need be.

    Sources, of one kind: files and directories (every file below is a record, its path the key), tar shards (every
    sample, its members the fields), or files of lines (``.jsonl``: every line). They lie on `source_fs`, at URLs of one
    cluster, or locally; the destination on `fs`, at a URL, or locally. A shard is closed once it has `shard_bytes`;
    `jobs` of them are written at a time. The order of the records is that of the sources.

    Each shard appears whole, on stable storage. At the first error the rest is given up; the same call made again
    skips the shards that are finished, and a dataset refuses the directory until it has them all. Raises
    FileExistsError when the directory has other record files. `progress` is called after every batch, from worker
    threads, one call at a time. Returns the totals.
    """
    if shard_bytes < 1 or jobs < 1:
        raise error(Code.CODE_INVALID_ARGUMENT, "the size of shards and the number of jobs must be at least 1")
    source, paths = locate(sources, source_fs, token)
    try:
        target, (directory,) = locate(destination, fs, token)
        try:
            pieces = _plan(source, paths, shard_bytes)
            try:
                return _Packing(target, directory, prefix, pieces, progress).run(jobs)
            finally:
                for piece in pieces:
                    piece.close()
        finally:
            target.close()
    finally:
        source.close()


class _Packing:
    """The state of one call."""

    def __init__(
        self,
        store: Store,
        directory: str,
        prefix: str,
        pieces: list[Piece],
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._store, self._directory, self._progress = store, directory, progress
        self._pieces = {shard_name(prefix, number, len(pieces)): piece for number, piece in enumerate(pieces)}
        self._turn = threading.Lock()
        self._stopped = False
        self._done = Progress(0, len(pieces), 0, 0, 0, "")

    def run(self, jobs: int) -> Progress:
        """Write what is not there yet."""
        self._store.makedirs(self._directory)
        names = self._store.names(self._directory)
        strange = [n for n in names if n.endswith(SUFFIX) and n not in self._pieces]
        if strange:
            raise error(
                Code.CODE_EXISTS,
                f"{self._directory} has record files of something else, as {strange[0]}: pack into another directory",
            )
        with ThreadPoolExecutor(jobs, thread_name_prefix="fs3-pack") as pool:
            running = [pool.submit(self._shard, name, name in names) for name in self._pieces]
            try:
                for one in as_completed(running):
                    one.result()
            except BaseException:
                self._stopped = True
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        self._sweep(names)
        return self._done

    def _sweep(self, names: list[str]) -> None:
        """Remove what a run that was killed left of the shards that are finished now."""
        for name in names:
            if name.endswith(".tmp") and any(name.startswith(f".{shard}.") for shard in self._pieces):
                with suppress(FileNotFoundError):
                    self._store.remove(join(self._directory, name))

    def _shard(self, name: str, there: bool) -> None:
        piece, path = self._pieces[name], join(self._directory, name)
        digest = hashlib.sha256(json.dumps(piece.describe()).encode()).hexdigest()
        if there:
            self._check(path, digest)
            self._account(name, shards=1, skipped=1)
            return
        fs = self._store.fs if isinstance(self._store, ClusterStore) else None
        with RecordWriter(path, fs=fs, fields=piece.field_names(), metadata={"pack": digest}) as writer:
            for batch in piece.batches():
                if self._stopped:
                    raise error(Code.CODE_UNAVAILABLE, "given up after an error elsewhere")
                before = writer.bytes
                for record, key in batch:
                    writer.write(record, key)
                self._account(name, records=len(batch), bytes_=writer.bytes - before)
        self._account(name, shards=1)

    def _check(self, path: str, digest: str) -> None:
        """Raise unless a shard that is there is the one that would be written."""
        (index,) = read_indexes(self._store, [path], read_headers(self._store, [path]))
        if index.metadata.get("pack") != digest:
            why = "it was packed from something else, or the sources changed: remove it, or pack into another directory"
            raise wrong(path, why, Code.CODE_EXISTS)

    def _account(self, name: str, *, shards: int = 0, skipped: int = 0, records: int = 0, bytes_: int = 0) -> None:
        with self._turn:
            done = self._done
            self._done = replace(
                done,
                shards=done.shards + shards,
                skipped=done.skipped + skipped,
                records=done.records + records,
                bytes=done.bytes + bytes_,
                path=name,
            )
            if self._progress is not None:
                self._progress(self._done)


def _plan(store: Store, paths: list[str], shard_bytes: int) -> list[Piece]:
    """The pieces of all sources. Raises INVALID_ARGUMENT for sources of several kinds, or without any record."""
    paths = [found for path in paths for found in matching(store, path)]
    tars = [path for path in paths if path.endswith(TARS)]
    lines = [path for path in paths if path.endswith(LINES)]
    kinds = [bool(tars), bool(lines), len(tars) + len(lines) < len(paths)]
    if sum(kinds) > 1:
        raise error(Code.CODE_INVALID_ARGUMENT, "pack tar shards, lines and other files into directories of their own")
    if tars:
        pieces = _tar_pieces(store, tars, shard_bytes)
    elif lines:
        pieces = _line_pieces(store, lines, shard_bytes)
    else:
        pieces = _file_pieces(store, paths, shard_bytes)
    if not pieces:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{', '.join(paths)} has nothing to pack")
    return pieces


def _file_pieces(store: Store, paths: list[str], shard_bytes: int) -> list[Piece]:
    files = []
    for path in paths:
        if not store.is_directory(path):
            files.append((path, split(path)[1], present(store, [path])[0]))
            continue
        for below, status in store.walk(path):
            key = below[len(path.rstrip("/")) + 1 :]
            if key.endswith(TARS + LINES):
                pattern = join(path, "*" + key[key.rindex(".") :])
                raise wrong(path, f"it has {key}: name such shards, as {pattern}, to pack their samples")
            files.append((below, key, status))
    return [FilesPiece(store, part) for part in _cut(files, lambda file: file[2].bytes, shard_bytes)]


def _line_pieces(store: Store, paths: list[str], shard_bytes: int) -> list[Piece]:
    pieces: list[Piece] = []
    for path, status in zip(paths, present(store, paths), strict=True):
        for start in range(0, status.bytes, shard_bytes):
            pieces.append(LinesPiece(store, path, status, start, min(start + shard_bytes, status.bytes)))
    return pieces


def _tar_pieces(store: Store, paths: list[str], shard_bytes: int) -> list[Piece]:
    fs = store.fs if isinstance(store, ClusterStore) else None
    dataset = TarDataset(paths, fs=fs, format="memoryview", keys=True, reuse=True)
    sources = list(zip(paths, present(store, paths), strict=True))
    lengths, fields = dataset.lengths().astype(np.int64), dataset.fields()
    return [
        TarPiece(dataset, sources, lengths, fields, part[0], part[-1] + 1)
        for part in _cut(range(len(dataset)), lengths.item, shard_bytes)
    ]


def _cut(items: Sequence[Any], size: Callable[[Any], int], most_bytes: int, most: int | None = None) -> Iterator[Any]:
    """Runs of items, each ended once it has `most_bytes` or `most` items."""
    begin = total = 0
    for number, item in enumerate(items, 1):
        total += size(item)
        if total >= most_bytes or number - begin == most or number == len(items):
            yield items[begin:number]
            begin, total = number, 0
