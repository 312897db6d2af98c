"""Checkpoints: PyTorch's distributed checkpoint (DCP) and safetensors, straight between fs3 and tensor memory.

Loaded when used, because the file formats need no PyTorch and the rest does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fs3.checkpoint.catalog import (
        Checkpoint,
        Verification,
        clean,
        delete,
        latest,
        list_checkpoints,
        retain,
        verify,
    )
    from fs3.checkpoint.dcp import async_save, load, save
    from fs3.checkpoint.reader import Fs3Reader
    from fs3.checkpoint.writer import Fs3Writer

_HOMES = {
    "Checkpoint": "catalog",
    "Fs3Reader": "reader",
    "Fs3Writer": "writer",
    "Verification": "catalog",
    "async_save": "dcp",
    "clean": "catalog",
    "delete": "catalog",
    "latest": "catalog",
    "list_checkpoints": "catalog",
    "load": "dcp",
    "retain": "catalog",
    "save": "dcp",
    "verify": "catalog",
}

__all__ = [
    "Checkpoint",
    "Fs3Reader",
    "Fs3Writer",
    "Verification",
    "async_save",
    "clean",
    "delete",
    "latest",
    "list_checkpoints",
    "load",
    "retain",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fs3.checkpoint.{home}"), name)
