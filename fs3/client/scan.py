"""The iterator of a directory's entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fs3.client.records import DirEntry

if TYPE_CHECKING:
    from types import TracebackType


class Scan(Iterator[DirEntry]):
    """Entries of a directory, as of one listing. A context manager, for code written for :func:`os.scandir`."""

    def __init__(self, entries: Iterable[DirEntry]) -> None:
        self._entries = iter(entries)

    def __next__(self) -> DirEntry:
        return next(self._entries)

    def __enter__(self) -> Scan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Forget the entries that were not fetched."""
        self._entries = iter(())
