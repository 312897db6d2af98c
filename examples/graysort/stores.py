"""Where files are: in a directory of a mount, or in the cluster through the native client."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any, Protocol

import fs3


class Store(Protocol):
    """Whole files, read and written by path."""

    def read(self, paths: Sequence[str]) -> memoryview:
        """The contents of files, one after the other."""

    def write(self, path: str, data: Any) -> None:
        """Make a file of a bytes-like object."""

    def makedirs(self, path: str) -> None:
        """Make a directory, and those above it. Raises FileExistsError."""

    def rmtree(self, path: str) -> None:
        """Remove a tree if it is there."""


class Mount:
    """Through a mount, or on any other file system."""

    def read(self, paths: Sequence[str]) -> memoryview:
        """The contents of files, one after the other."""
        sizes = [os.path.getsize(path) for path in paths]
        whole, at = memoryview(bytearray(sum(sizes))), 0
        for path, size in zip(paths, sizes, strict=True):
            with open(path, "rb", buffering=0) as file:
                while size:
                    count = file.readinto(whole[at : at + size])
                    if not count:
                        raise EOFError(f"{path} has become shorter")
                    at, size = at + count, size - count
        return whole

    def write(self, path: str, data: Any) -> None:
        """Make a file of a bytes-like object."""
        with open(path, "wb", buffering=0) as file:
            left = memoryview(data).cast("B")
            while left:
                left = left[file.write(left) :]

    def makedirs(self, path: str) -> None:
        """Make a directory, and those above it. Raises FileExistsError."""
        os.makedirs(path)

    def rmtree(self, path: str) -> None:
        """Remove a tree if it is there."""
        shutil.rmtree(path, ignore_errors=True)


class Native:
    """Through the native client: many files are one batch, and bytes go straight to their place."""

    def __init__(self, url: str) -> None:
        self._fs = fs3.connect(url)

    def read(self, paths: Sequence[str]) -> memoryview:
        """The contents of files, one after the other."""
        parts = self._fs.read_batch([(path, 0, None) for path in paths])
        # They lie in one buffer, in the order given.
        return memoryview(parts[0].obj) if parts else memoryview(b"")

    def write(self, path: str, data: Any) -> None:
        """Make a file of a bytes-like object."""
        with self._fs.open(path, "wb", buffering=0) as file:
            file.write(data)

    def makedirs(self, path: str) -> None:
        """Make a directory, and those above it. Raises FileExistsError."""
        self._fs.makedirs(path)

    def rmtree(self, path: str) -> None:
        """Remove a tree if it is there."""
        self._fs.rmtree(path, ignore_errors=True)


def open_store(url: str | None) -> Store:
    """The native client of a cluster, or files of this machine."""
    return Native(url) if url else Mount()
