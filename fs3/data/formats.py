"""Which kind of dataset a path is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fs3.client import FileSystem
from fs3.core.errors import error
from fs3.data.dataset import Dataset
from fs3.data.ffrecord import FFRecordDataset
from fs3.data.files import FileDataset
from fs3.data.parquet import ParquetDataset
from fs3.data.records import RecordDataset
from fs3.data.store import Source, Store, locate
from fs3.data.tar import TarDataset
from fs3.v1.frame_pb2 import Code

KINDS: tuple[type[Dataset], ...] = (RecordDataset, TarDataset, ParquetDataset, FFRecordDataset)


def open_dataset(
    source: Source | Sequence[Source], *, fs: FileSystem | None = None, token: str | None = None, **options: Any
) -> Dataset:
    """The dataset of the format that the names of the shards tell; of a directory without any, that of its files.

    `options` are those of the format's class. Raises INVALID_ARGUMENT for a name that tells none, or several formats.
    """
    store, paths = locate(source, fs, token)
    try:
        kind = kind_of(store, paths)
    finally:
        store.close()
    return kind(source, fs=fs, token=token, **options)


def kind_of(store: Store, paths: Sequence[str]) -> type[Dataset]:
    """The class for shards at these paths."""
    names: list[str] = []
    directories = False
    for path in paths:
        if store.is_directory(path):
            directories = True
            names += store.names(path)
        else:
            names.append(path)
    kinds = [kind for kind in KINDS if any(name.endswith(kind.suffixes) for name in names)]
    if len(kinds) > 1:
        found = " and ".join(kind.suffixes[0] for kind in kinds)
        raise error(Code.CODE_INVALID_ARGUMENT, f"{', '.join(paths)} has {found}: give a pattern, such as DIR/*.tar")
    if not kinds and not directories:
        known = ", ".join(suffix for kind in KINDS for suffix in kind.suffixes)
        raise error(Code.CODE_INVALID_ARGUMENT, f"{', '.join(paths)} is no shard: its name should end in {known}")
    return kinds[0] if kinds else FileDataset
