"""The files of a directory tree, a sample each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fs3.client import FileSystem
from fs3.data.dataset import Ranges, SpanDataset
from fs3.data.index import make_keys
from fs3.data.store import Source, present, split


class FileDataset(SpanDataset):
    """Files by number, in the order of their names, directory by directory. Keys are paths below the directory given.

    ``source``: directories, or files. ``suffixes``: only files whose names end so, whatever their case. The other
    arguments are those of :class:`SpanDataset`. Names and sizes are read once and kept (about 20 bytes a file and its
    path); files are opened when they are read, those of a batch together.
    """

    def __init__(
        self,
        source: Source | Sequence[Source],
        *,
        suffixes: Sequence[str] = (),
        fs: FileSystem | None = None,
        token: str | None = None,
        **options: Any,
    ) -> None:
        self._only = tuple(suffix.lower() for suffix in suffixes)
        super().__init__(source, fs=fs, token=token, **options)

    def _expand(self, given: list[str]) -> list[str]:
        return given

    def _scan(self) -> Sequence[int]:
        names: list[str] = []
        sizes: list[int] = []
        counts = []
        for root in self._paths:
            if self._store.is_directory(root):
                found = list(self._store.walk(root))
            else:
                found = [(root, present(self._store, [root])[0])]
            kept = [(path, status) for path, status in found if path.lower().endswith(self._only or ("",))]
            names += [path for path, _ in kept]
            sizes += [status.bytes for _, status in kept]
            counts.append(len(kept))
        self._names = make_keys(names)
        self._sizes = np.array(sizes, np.uint64)
        return counts

    def _number(self, shard: int, row: int) -> int:
        return row + (int(self._ends[shard - 1]) if shard else 0)

    def _ranges(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> Ranges:
        before = np.concatenate([[0], self._ends[:-1]])
        numbers = rows + before[shards]
        paths = [self._names[number] for number in numbers.tolist()]
        files = np.arange(len(rows), dtype=np.uint64)
        return Ranges(paths, files, np.zeros(len(rows), np.uint64), self._sizes[numbers], None, len)

    def _key(self, shard: int, row: int) -> str:
        path, root = self._names[self._number(shard, row)], self._paths[shard]
        return split(path)[1] if path == root else path[len(root.rstrip("/")) + 1 :]
