"""Waiting for native operations, with errors that name the paths they are about."""

from __future__ import annotations

import os
from typing import TypeVar

from fs3 import native
from fs3.client.paths import StrPath

T = TypeVar("T")


def finish(operation: native.Operation[T], path: StrPath, other: StrPath | None = None) -> T:
    """Wait for an operation on `path`. Its errors carry the path, and the `other` of two, as those of :mod:`os` do."""
    try:
        return operation.wait()
    except OSError as e:
        name_paths(e, path, other)
        raise


async def finished(operation: native.Operation[T], path: StrPath, other: StrPath | None = None) -> T:
    """As :func:`finish`, for asyncio."""
    try:
        return await operation
    except OSError as e:
        name_paths(e, path, other)
        raise


def name_paths(error: OSError, path: StrPath, other: StrPath | None = None) -> None:
    """Say in an error which paths it is about."""
    error.filename = os.fspath(path)
    if other is not None:
        error.filename2 = os.fspath(other)
