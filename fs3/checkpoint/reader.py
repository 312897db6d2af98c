"""DCP's storage reader for fs3: what is wanted of a checkpoint, straight into tensors where they lie in one piece."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import posixpath
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from fs3.checkpoint.location import located
from fs3.checkpoint.manifest import METADATA, StoredItem
from fs3.checkpoint.pytorch import torch
from fs3.checkpoint.reads import STAGE_BYTES, Range, Reads
from fs3.client import FileSystem

# Parts of a tensor that lie apart are read one by one from this length on; shorter ones with what is between them.
RUN_BYTES_MIN = 16 << 10
# Tensors shorter than this are read with their neighbours, and then copied.
DIRECT_BYTES_MIN = 16 << 10


class Fs3Reader(StorageReader):  # type: ignore[misc]
    """Reads checkpoints of ``torch.distributed.checkpoint`` from fs3, of any number of ranks into any other.

    `path`: ``/directory/name`` on `fs`, or an ``fs3://`` URL. Each rank reads what it needs in batches: into the
    tensors' memory where both sides are contiguous, on the CPU and of one type, else through a buffer of 64 MiB. Every
    byte is verified by the client on its way. Reads what :class:`Fs3Writer` wrote, and also checkpoints of DCP's
    ``FileSystemWriter`` that were copied to fs3, those with a copy. DCP's metadata is a pickle: load only checkpoints
    that you trust.
    """

    def __init__(self, path: str | os.PathLike[str], fs: FileSystem | None = None) -> None:
        super().__init__()
        self._fs, self._path = located(path, fs)
        self._items: dict[Any, Any] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, of another path if one is given."""
        self._items = {}
        if checkpoint_id is not None:
            self._fs, self._path = located(checkpoint_id, self._fs)

    def read_metadata(self) -> Metadata:
        """DCP's metadata. Raises FileNotFoundError when there is no checkpoint."""
        with self._fs.open(posixpath.join(self._path, METADATA), "rb") as file:
            metadata = pickle.load(file)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Remember where the items are. Raises ValueError for metadata without that."""
        if metadata.storage_data is None:
            raise ValueError(f"the metadata of {self._path} does not say where its items are")
        self._items = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read everything that is planned. Raises OSError."""
        targets = []
        with Reads(self._fs, self._path) as reads:
            for item in plan.items:
                stored = self._items[item.storage_index]
                if item.type == LoadItemType.BYTE_IO:
                    reads.staged(_serialized(item, stored, planner))
                    continue
                target = planner.resolve_tensor(item).detach()
                _check_size(item, target)
                targets.append((item, target))
                if isinstance(stored, StoredItem):
                    _read_tensor(reads, item, stored, target)
                else:
                    reads.staged(_saved_by_torch(item, stored, target))
            reads.flush()
        for item, target in targets:
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint is."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is an URL of fs3."""
        return os.fspath(checkpoint_id).startswith("fs3://")


def _check_size(item: ReadItem, target: torch.Tensor) -> None:
    if tuple(target.shape) != tuple(item.lengths):
        name, wanted, found = item.storage_index.fqn, tuple(item.lengths), tuple(target.shape)
        raise ValueError(f"{name}: a part of shape {wanted} does not fit into a tensor of shape {found}")


def _serialized(item: ReadItem, stored: Any, planner: LoadPlanner) -> Range:
    def consume(data: torch.Tensor) -> None:
        planner.load_bytes(item, io.BytesIO(data.numpy().tobytes()))

    return Range(stored.relative_path, stored.offset, stored.length, consume)


def _saved_by_torch(item: ReadItem, stored: Any, target: torch.Tensor) -> Range:
    """A tensor that DCP's own writer serialized with ``torch.save``."""
    if getattr(stored, "transform_descriptors", None):
        raise ValueError(f"{item.storage_index.fqn} was written with {stored.transform_descriptors}: use DCP's reader")

    def consume(data: torch.Tensor) -> None:
        saved = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
        for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            saved = saved.narrow(dimension, start, length)
        target.copy_(saved)

    return Range(stored.relative_path, stored.offset, stored.length, consume)


def _read_tensor(reads: Reads, item: ReadItem, stored: StoredItem, target: torch.Tensor) -> None:
    """Plan the reads of a box of a stored tensor into `target`, which has the shape of the box."""
    if target.numel() == 0:
        return
    box = Box(stored, tuple(item.storage_offsets), tuple(item.lengths))
    fits = target.dtype == stored.dtype and target.device.type == "cpu" and not target.is_conj() and not target.is_neg()
    runs = [target[index] for index in box.outer()] if fits and box.run_bytes >= RUN_BYTES_MIN else []
    if fits and box.outer_count == 1 and target.is_contiguous() and target.nbytes >= DIRECT_BYTES_MIN:
        reads.direct(stored.relative_path, box.offset(()), target)
    elif runs and runs[0].is_contiguous():
        for index, run in zip(box.outer(), runs, strict=True):
            reads.direct(stored.relative_path, box.offset(index), run)
    else:
        for slab in box.slabs(target):
            reads.staged(slab)


class Box:
    """A part of a stored tensor: `lengths` elements from `offsets` on, in each dimension."""

    def __init__(self, stored: StoredItem, offsets: tuple[int, ...], lengths: tuple[int, ...]) -> None:
        assert stored.shape is not None
        self._stored = stored
        self._offsets = offsets
        self._lengths = lengths
        self._element = int(stored.dtype.itemsize)
        self._strides = _strides(stored.shape)
        # Dimensions from here on lie in one piece: all but the first of them are whole.
        self._inner = len(lengths)
        whole = True
        while self._inner and whole:
            self._inner -= 1
            whole = lengths[self._inner] == stored.shape[self._inner]

    @property
    def run_bytes(self) -> int:
        """The length of the pieces that it consists of."""
        return math.prod(self._lengths[self._inner :]) * self._element

    @property
    def outer_count(self) -> int:
        """How many pieces there are."""
        return math.prod(self._lengths[: self._inner])

    def outer(self) -> Any:
        """The indices of the pieces within the box."""
        return itertools.product(*(range(length) for length in self._lengths[: self._inner]))

    def offset(self, index: tuple[int, ...]) -> int:
        """Where an element of the box is in the file; `index` may be of fewer dimensions."""
        places = [start + at for start, at in itertools.zip_longest(self._offsets, index, fillvalue=0)]
        elements = sum(place * stride for place, stride in zip(places, self._strides, strict=True))
        return self._stored.offset + elements * self._element

    def slabs(self, target: torch.Tensor) -> list[Range]:
        """Ranges that hold it, with what lies between; cut along the first dimension where they are long."""
        if not self._lengths:
            return [Range(self._stored.relative_path, self.offset(()), self._element, self._copy(target, ()))]
        row_bytes = self._strides[0] * self._element
        rows = max(1, STAGE_BYTES // 4 // row_bytes) if row_bytes else self._lengths[0]
        found = []
        for first in range(0, self._lengths[0], rows):
            count = min(rows, self._lengths[0] - first)
            lengths = (count, *self._lengths[1:])
            last = (first + count - 1, *(length - 1 for length in self._lengths[1:]))
            start, end = self.offset((first,)), self.offset(last) + self._element
            part = target.narrow(0, first, count)
            found.append(Range(self._stored.relative_path, start, end - start, self._copy(part, lengths)))
        return found

    def _copy(self, target: torch.Tensor, lengths: tuple[int, ...]) -> Any:
        strides = self._strides[: len(lengths)]

        def consume(data: torch.Tensor) -> None:
            target.copy_(_typed(data, self._stored.dtype).as_strided(lengths, strides))

        return consume


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor in C order, in elements."""
    found = [1] * len(shape)
    for dimension in range(len(shape) - 2, -1, -1):
        found[dimension] = found[dimension + 1] * shape[dimension + 1]
    return tuple(found)


def _typed(data: torch.Tensor, dtype: Any) -> torch.Tensor:
    """Bytes as elements; a copy where they are not aligned."""
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype)
