"""Checkpoints through PyTorch's DCP on fs3, in turn with large reads and writes, and by DCP itself on a local disk."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from fs3 import checkpoint
from fs3.client import FileSystem
from fs3.testing import measure
from fs3.testing.measure import MIB, Measured, Meter

# Of a layer: matrices of this many rows and columns (16, 16 and 4 MiB), and what else there is.
MATRICES = ((1024, 4096), (4096, 1024), (1024, 1024))
LAYER_BYTES = 4 * sum(rows * columns for rows, columns in MATRICES) + 2 * 4 * 1024


def made(size: int) -> dict[str, Any]:
    """A state dict of about `size` bytes: layers of matrices and vectors, and the scalars of an optimizer."""
    state: dict[str, Any] = {}
    for layer in range(max(1, size // LAYER_BYTES)):
        for number, shape in enumerate(MATRICES):
            state[f"layer.{layer}.{number}"] = torch.rand(shape)
        for name in ("norm", "bias"):
            state[f"layer.{layer}.{name}"] = torch.rand(1024)
        state[f"layer.{layer}.step"] = torch.tensor(float(layer))
    return state


def _timed(pids: Iterable[int], size: int, work: Callable[[], object]) -> Measured:
    meter = Meter(pids)
    with meter:
        work()
    return meter.result(bytes_=size)


def figures(
    fs: FileSystem, directory: Path, size: int, *, turns: int, warming: int, pids: list[int], say: Callable[[str], None]
) -> dict[str, Measured]:
    """Save and load on fs3 and on the local disk, and large writes and reads of as much, all in turn; the medians.

    Tensors are touched before it counts; loads go into the same ones every time. Everything is written to new files,
    but large writes, which go over one that is there.
    """
    state = made(size)
    into = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    size = sum(tensor.nbytes for tensor in state.values())
    local = directory / "dcp"
    work: dict[str, Callable[[], Measured]] = {
        "write": lambda: measure.native_write(fs, "/checkpoint-large", size // MIB * MIB, pids=pids),
        "save": lambda: _timed(pids, size, lambda: checkpoint.save(state, fs, "/checkpoint/step", keep_last=1)),
        "read": lambda: measure.native_read(fs, "/checkpoint-large", size // MIB * MIB, pids=pids),
        "load": lambda: _timed(pids, size, lambda: checkpoint.load(into, fs, "/checkpoint/step")),
        "local save": lambda: _timed((), size, lambda: dcp.save(state, checkpoint_id=str(local))),
        "local load": lambda: _timed((), size, lambda: dcp.load(into, checkpoint_id=str(local))),
    }
    found: dict[str, list[Measured]] = {name: [] for name in work}
    with warnings.catch_warnings(action="ignore"):
        for turn in range(warming + turns):
            say(f"checkpoints, turn {turn + 1}")
            for name, move in work.items():
                moved = move()
                if turn >= warming:
                    found[name].append(moved)
            shutil.rmtree(local, ignore_errors=True)
            os.sync()
    if not all(torch.equal(into[name], tensor) for name, tensor in state.items()):
        raise AssertionError("what was loaded is not what was saved")
    fs.rmtree("/checkpoint")
    fs.remove("/checkpoint-large")
    return {name: measure.middle(measured) for name, measured in found.items()}
