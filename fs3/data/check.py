"""What a dataset holds, and whether it is whole: what `fs3 data info` and `fs3 data verify` print."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fs3.client import FileSystem
from fs3.data.dataset import Dataset, IndexedDataset, SpanDataset
from fs3.data.files import FileDataset
from fs3.data.formats import kind_of
from fs3.data.parquet import ParquetDataset
from fs3.data.records import RecordDataset, missing_shards
from fs3.data.store import ClusterStore, Source, Store, expand, join, locate, present

JOBS = 4
BATCH_SAMPLES = 64


@dataclass(frozen=True)
class ShardInfo:
    """A shard, or a file: samples and bytes in it; fields or columns, empty where samples are one piece."""

    path: str
    samples: int
    bytes: int
    fields: list[str]
    checksums: bool


@dataclass(frozen=True)
class Problem:
    """What is wrong with a shard; ``sample``: the number in it, None when it cannot be opened."""

    path: str
    sample: int | None
    message: str


def shards_of(dataset: Dataset) -> list[ShardInfo]:
    """The shards of a dataset."""
    sizes = present(dataset.store, dataset.paths)
    found = []
    for number, (path, status, samples) in enumerate(zip(dataset.paths, sizes, dataset.counts(), strict=True)):
        fields: list[str] = []
        checksums = False
        if isinstance(dataset, IndexedDataset):
            index = dataset.index(number)
            fields, checksums = list(index.fields), index.crcs is not None
        elif isinstance(dataset, ParquetDataset):
            fields = dataset.column_names(number)
        found.append(ShardInfo(path, samples, status.bytes, fields, checksums))
    return found


def verify(
    source: Source | Sequence[Source],
    *,
    fs: FileSystem | None = None,
    token: str | None = None,
    jobs: int = JOBS,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, list[Problem]]:
    """Read every sample and compare the checksums of those that have one; the samples read, and all problems found.

    Shards that cannot be opened, and those that packing has not finished, are problems. Raises what keeps the shards
    from being found. `progress` is called with samples and problems so far, from worker threads, one call at a time.
    """
    store, given = locate(source, fs, token)
    checking = _Checking(store, kind_of(store, given), progress)
    try:
        with ThreadPoolExecutor(jobs, thread_name_prefix="fs3-verify") as pool:
            for one in [pool.submit(checking.shard, path) for path in checking.shards(given)]:
                one.result()
    finally:
        store.close()
    return checking.samples, sorted(checking.problems, key=lambda p: (p.path, -1 if p.sample is None else p.sample))


class _Checking:
    """The state of one call of :func:`verify`."""

    def __init__(self, store: Store, kind: type[Dataset], progress: Callable[[int, int], None] | None) -> None:
        self._store, self._kind, self._progress = store, kind, progress
        self._turn = threading.Lock()
        self.samples = 0
        self.problems: list[Problem] = []

    def shards(self, given: list[str]) -> list[str]:
        """The paths to open one by one."""
        if self._kind is FileDataset:
            return given
        for path in given:
            if self._kind is RecordDataset and self._store.is_directory(path):
                for name in missing_shards(self._store.names(path)):
                    self.problems.append(Problem(join(path, name), None, "the shard is missing"))
        return expand(self._store, given, self._kind.suffixes)

    def shard(self, path: str) -> None:
        """Read all samples of a shard."""
        fs = self._store.fs if isinstance(self._store, ClusterStore) else None
        try:
            with self._kind(path, fs=fs) as dataset:  # type: ignore[call-arg]
                if isinstance(dataset, IndexedDataset):
                    dataset.load_indexes()
                for start in range(0, len(dataset), BATCH_SAMPLES):
                    self._batch(dataset, path, range(start, min(start + BATCH_SAMPLES, len(dataset))))
        except OSError as e:
            self._account(0, [Problem(path, None, e.strerror or str(e))])

    def _batch(self, dataset: Dataset, path: str, numbers: range) -> None:
        """Read samples together; one by one if any of them is wrong."""
        found: list[Problem] = []
        try:
            dataset.__getitems__(numbers)
        except OSError:
            for number in numbers:
                try:
                    dataset[number]
                except OSError as e:
                    found.append(Problem(os.fsdecode(e.filename or path), number, e.strerror or str(e)))
        self._account(len(numbers), found)

    def _account(self, samples: int, problems: list[Problem]) -> None:
        with self._turn:
            self.samples += samples
            self.problems += problems
            if self._progress is not None:
                self._progress(self.samples, len(self.problems))


def describe(dataset: Dataset) -> dict[str, Any]:
    """Totals, for JSON."""
    shards = shards_of(dataset)
    return {
        "kind": type(dataset).__name__,
        "samples": len(dataset),
        "bytes": sum(shard.bytes for shard in shards),
        "keys": isinstance(dataset, SpanDataset) and _has_keys(dataset),
        "shards": [shard.__dict__ for shard in shards],
    }


def _has_keys(dataset: SpanDataset) -> bool:
    try:
        dataset.key(0)
    except LookupError:
        return False
    return True
