"""Dataloaders: random access to samples on a cluster, in batches, without a copy (docs/data.md). Needs NumPy."""

from __future__ import annotations

try:
    import numpy as _numpy  # noqa: F401
except ImportError as e:
    raise ImportError("fs3.data needs NumPy: pip install numpy") from e

from fs3.data.dataset import Batch, Dataset
from fs3.data.ffrecord import FFRecordDataset
from fs3.data.files import FileDataset
from fs3.data.formats import open_dataset
from fs3.data.packing import pack
from fs3.data.parquet import ParquetDataset
from fs3.data.records import RecordDataset, RecordWriter
from fs3.data.sampler import StatefulDistributedSampler
from fs3.data.tar import TarDataset

__all__ = [
    "Batch",
    "Dataset",
    "FFRecordDataset",
    "FileDataset",
    "ParquetDataset",
    "RecordDataset",
    "RecordWriter",
    "StatefulDistributedSampler",
    "TarDataset",
    "open_dataset",
    "pack",
]
