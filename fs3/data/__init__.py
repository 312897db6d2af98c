"""Dataloaders: random access to samples on a cluster, in batches, without a copy (docs/data.md). Needs NumPy."""

from __future__ import annotations

try:
    import numpy as _numpy  # noqa: F401
except ImportError as e:
    raise ImportError("fs3.data needs NumPy: pip install numpy") from e

from fs3.data.dataset import Batch, Dataset
from fs3.data.records import RecordDataset, RecordWriter
from fs3.data.sampler import StatefulDistributedSampler

__all__ = ["Batch", "Dataset", "RecordDataset", "RecordWriter", "StatefulDistributedSampler"]
