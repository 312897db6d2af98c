"""Saving and loading a state dict in one call, with the names of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import errno
import os
import posixpath
from concurrent.futures import Future
from typing import Any

from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse

from fs3.checkpoint.manifest import METADATA
from fs3.checkpoint.reader import Fs3Reader
from fs3.checkpoint.writer import Fs3Writer
from fs3.client import FileSystem


def save(
    state_dict: dict[str, Any],
    fs: FileSystem,
    path: str,
    *,
    overwrite: bool = True,
    keep_last: int | None = None,
    **options: Any,
) -> Metadata:
    """Save a state dict as the checkpoint `path`; ``dcp.save`` with an :class:`Fs3Writer`.

    To be called by all ranks where ``torch.distributed`` is initialized. Returns when the checkpoint is published and
    would survive power loss of all nodes. `overwrite`, `keep_last`: as for the writer. `options`: those of ``dcp.save``
    (planner, process_group, no_dist). Raises ``CheckpointException`` with the errors of all ranks; nothing is
    published then.
    """
    writer = Fs3Writer(path, fs, overwrite=overwrite, keep_last=keep_last)
    try:
        return dcp.save(state_dict, storage_writer=writer, **options)
    finally:
        # After a success there is nothing left to remove.
        writer.abort()


def async_save(
    state_dict: dict[str, Any],
    fs: FileSystem,
    path: str,
    *,
    overwrite: bool = True,
    keep_last: int | None = None,
    async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
    **options: Any,
) -> Future[Metadata] | AsyncSaveResponse:
    """As :func:`save`, in the background; ``dcp.async_save`` with an :class:`Fs3Writer`.

    Returns when the state dict has been copied, so that training may go on; the future's result is there when the
    checkpoint is published. `async_checkpointer_type`: in a thread, or a process, which needs ``torch.distributed``
    initialized. `options`: those of ``dcp.async_save``; the memory of an ``async_stager`` that is kept is
    used again.
    """
    writer = Fs3Writer(path, fs, overwrite=overwrite, keep_last=keep_last)
    response = dcp.async_save(
        state_dict, storage_writer=writer, async_checkpointer_type=async_checkpointer_type, **options
    )
    future = response.upload_completion if isinstance(response, AsyncSaveResponse) else response
    future.add_done_callback(lambda _: writer.abort())
    return response


def load(state_dict: dict[str, Any], fs: FileSystem, path: str, **options: Any) -> None:
    """Load the checkpoint `path` into a state dict, in place; ``dcp.load`` with an :class:`Fs3Reader`.

    Tensors are filled where they are; each rank reads what its shards need, however many ranks saved them. `options`:
    those of ``dcp.load``. Raises FileNotFoundError when there is no checkpoint of that name.
    """
    if not fs.exists(posixpath.join(path, METADATA)):
        raise FileNotFoundError(errno.ENOENT, f"no checkpoint: {os.strerror(errno.ENOENT)}", path)
    dcp.load(state_dict, storage_reader=Fs3Reader(path, fs), **options)
