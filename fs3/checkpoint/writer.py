"""DCP's storage writer for fs3: a checkpoint appears whole or not at all."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import posixpath
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from fs3 import native
from fs3.checkpoint import catalog
from fs3.checkpoint.claim import Claim
from fs3.checkpoint.location import located
from fs3.checkpoint.manifest import (
    CHECKSUMS,
    CRC_BYTES,
    METADATA,
    SUMMARY,
    StoredItem,
    Summary,
    dump_sums,
    split,
    sums_of,
    temporary,
)
from fs3.checkpoint.pytorch import torch
from fs3.checkpoint.stream import ChunkStream, write_file, write_small
from fs3.client import FileSystem
from fs3.client.buffers import exported
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

log = logging.getLogger(__name__)

# Items begin at multiples of this, so that what is read of them is aligned for every element type.
ALIGN_BYTES = 64


@dataclass(frozen=True)
class Place:
    """Where a rank writes its part of a checkpoint. Travels with its plan."""

    directory: str
    rank: int


class Fs3Writer(StorageWriter):  # type: ignore[misc]
    """Writes checkpoints of ``torch.distributed`` to fs3, as DCP's ``FileSystemWriter`` does to a directory.

    `path` is where the checkpoint appears: ``/directory/name`` on `fs`, or an ``fs3://`` URL. Everything is written
    into a temporary directory beside it and survives power loss before one rename publishes it. A job that is killed
    leaves nothing under that name, and what was there before stays whole.

    `overwrite`: replace a checkpoint of that name, in one step; otherwise the save raises FileExistsError.
    `keep_last`: after publishing, remove all whole checkpoints in the directory but the newest so many.

    For ``dcp.save`` and ``dcp.async_save`` in both forms; it can be pickled as a FileSystem can. Needs collectives
    (``use_collectives=False`` is refused), because ranks that do not hear of each other cannot publish one checkpoint.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fs: FileSystem | None = None,
        *,
        overwrite: bool = True,
        keep_last: int | None = None,
    ) -> None:
        super().__init__()
        catalog.check_keep(keep_last)
        self._fs, self._path = located(path, fs)
        split(self._path)
        self._overwrite = overwrite
        self._keep_last = keep_last
        self._claim: Claim | None = None
        self._directory = ""
        self._save_id = ""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_claim": None, "_directory": ""}

    # ---- what DCP calls, in this order

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, of another path if one is given. What an earlier one left is removed."""
        self.abort()
        if checkpoint_id is not None:
            self._fs, self._path = located(checkpoint_id, self._fs)
            split(self._path)

    def set_up_storage_writer(
        self, is_coordinator: bool, *args: Any, rank: int | None = None, use_collectives: bool = True, **kwargs: Any
    ) -> None:
        """Raises ValueError without collectives."""
        if not use_collectives:
            raise ValueError("use_collectives=False: ranks must hear of each other to publish one checkpoint")

    def storage_meta(self) -> StorageMeta:
        """Ids of the checkpoint and of this save."""
        return StorageMeta(checkpoint_id=self._path, save_id=self._save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: make the temporary directory, and tell every rank."""
        if not all(plan.usable for plan in plans):
            raise ValueError("a planner with enable_plan_caching=True writes to where it wrote before: turn it off")
        self._begin()
        return [replace(plan, storage_data=Place(self._directory, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """On every rank: write its part. Returns when that survives power loss of all nodes."""
        place = plan.storage_data
        assert isinstance(place, Place)
        part = Part(f"__{place.rank}_0.distcp", planner)
        try:
            if plan.items:
                path = posixpath.join(place.directory, part.name)
                write_file(self._fs, path, lambda stream: part.produce(plan.items, stream))
        except BaseException:
            self.abort()
            raise
        future: Future[list[WriteResult]] = Future()
        future.set_result(part.results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, when all have written: publish, and apply `keep_last`."""
        try:
            self._write_metadata(metadata, [result for of_rank in results for result in of_rank])
            self._publish()
        except BaseException:
            self.abort()
            raise
        self._let_go()
        if self._keep_last is not None:
            try:
                catalog.retain(self._fs, split(self._path)[0], self._keep_last)
            except OSError as e:
                # The checkpoint is there: that older ones are, too, is no reason to stop a training job.
                log.warning("%s is saved, but older ones could not be removed: %s", self._path, e)

    # ---- parts of it

    @property
    def checkpoint_id(self) -> str:
        """Where the checkpoint appears."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is an URL of fs3."""
        return os.fspath(checkpoint_id).startswith("fs3://")

    def abort(self) -> None:
        """Remove what a save that was not finished has written. Called by itself when the next begins."""
        directory, self._directory = self._directory, ""
        if directory and self._claim is not None:
            with contextlib.suppress(OSError):
                self._fs.rmtree(directory)
        self._let_go()

    def _begin(self) -> None:
        self.abort()
        directory, name = split(self._path)
        self._check_replaceable()
        self._fs.makedirs(directory, exist_ok=True)
        for left in catalog.unfinished(self._fs, directory):
            # Two jobs that save under one name are a mistake; the one that began last goes on.
            if left.name == name or not left.in_use:
                self._remove(left)
        self._directory = temporary(self._path)
        self._save_id = self._directory.rpartition("-")[2]
        self._fs.mkdir(self._directory)
        with self._fs.open(posixpath.join(self._directory, SUMMARY), "xb", buffering=0) as file:
            self._claim = Claim(self._fs, file.inode)

    def _remove(self, left: catalog.Leftover) -> None:
        try:
            catalog.remove(self._fs, left)
        except OSError as e:
            # It may be another user's, and is in nobody's way.
            log.warning("%s was left unfinished and could not be removed: %s", left.path, e)

    def _check_replaceable(self) -> None:
        """Raise EXISTS for what may not be replaced: what is no checkpoint, and without `overwrite` one, too."""
        try:
            names = self._fs.listdir(self._path)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            names = [self._path]
        if names and not {SUMMARY, METADATA} & set(names):
            raise error(Code.CODE_EXISTS, f"{self._path} exists and is no checkpoint: save under another name")
        if not self._overwrite:
            raise error(Code.CODE_EXISTS, f"{self._path} exists, and overwrite=False")

    def _let_go(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            with contextlib.suppress(OSError):
                claim.release()

    def _write_metadata(self, metadata: Metadata, results: list[WriteResult]) -> None:
        metadata.storage_data = {result.index: result.storage_data for result in results}
        metadata.storage_meta = self.storage_meta()
        metadata.version = "1.0.0"
        pickled = pickle.dumps(metadata, protocol=pickle.HIGHEST_PROTOCOL)
        sums = sums_of((_shown(result), result.storage_data) for result in results)
        dumped = dump_sums(sums)
        directory = split(self._path)[0]
        known = catalog.list_checkpoints(self._fs, directory)
        newest_ns = known[-1].summary.created_ns if known else 0
        summary = Summary(
            save_id=self._save_id,
            created_ns=max(time.time_ns(), newest_ns + 1),
            length=sum(result.size_in_bytes for result in results),
            items=len(results),
            files=len(sums),
            torch=str(torch.__version__),
            metadata_crc=native.crc32c(pickled),
            checksums_crc=native.crc32c(dumped),
        )
        # The summary is there already, as what the claim is on.
        files = {METADATA: pickled, CHECKSUMS: dumped, SUMMARY: summary.dump()}
        write_small(self._fs, {posixpath.join(self._directory, name): data for name, data in files.items()})

    def _publish(self) -> None:
        try:
            self._fs.rename(self._directory, self._path)
        except FileExistsError:
            self._check_replaceable()
            # In one step, so that at any moment there is a whole one; what was there goes under the temporary name.
            self._fs.exchange(self._directory, self._path)
            self._fs.rmtree(self._directory, ignore_errors=True)
        self._directory = ""


class Part:
    """What one rank writes: a file of its items, and what is to be known of them."""

    def __init__(self, name: str, planner: SavePlanner) -> None:
        self.name = name
        self.results: list[WriteResult] = []
        self._planner = planner

    def produce(self, items: Iterable[WriteItem], stream: ChunkStream) -> None:
        """Add all items to `stream`, the small ones one after the other."""
        for item in sorted(items, key=_item_bytes):
            data = self._planner.resolve_data(item)
            self._add(item, data, stream)

    def _add(self, item: WriteItem, data: BytesIO | torch.Tensor, stream: ChunkStream) -> None:
        if item.type == WriteItemType.BYTE_IO:
            view, kind, shape = memoryview(data.getvalue()), None, None
        else:
            tensor = _plain(data)
            view, kind, shape = memoryview(exported(tensor)).cast("B"), tensor.dtype, tuple(tensor.shape)
        offset = stream.align(ALIGN_BYTES)
        crcs = []
        # Part by part, so that what the CRC brought into the processor's cache is still there when it is sent.
        for at in range(0, len(view), CRC_BYTES):
            part = view[at : at + CRC_BYTES]
            crcs.append(native.crc32c(part))
            stream.add(part)
        stored = StoredItem(self.name, offset, len(view), tuple(crcs), kind, shape)
        self.results.append(WriteResult(item.index, len(view), stored))


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values on the CPU, contiguous, as they are in memory."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _item_bytes(item: WriteItem) -> int:
    """The bytes of a tensor item; those of what is serialized are not known yet."""
    if item.tensor_data is None:
        return -1
    count = 1
    for size in item.tensor_data.chunk.sizes:
        count *= size
    return count * int(item.tensor_data.properties.dtype.itemsize)


def _shown(result: WriteResult) -> str:
    """An item's name for people."""
    offset = result.index.offset
    at = "" if offset is None or not any(offset) else f"[{','.join(map(str, offset))}]"
    return f"{result.index.fqn}{at}"
