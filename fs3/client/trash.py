"""What was removed and is kept: listing, restoring and purging it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from fs3.client.calls import meta_call
from fs3.client.connection import Connection
from fs3.client.paths import StrPath
from fs3.core.errors import error
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code, Method

PURGE_IDS: Final = 256


@dataclass(frozen=True, slots=True)
class TrashEntry:
    """Something in the trash. Times are nanoseconds since 1970.

    ``path``: where it goes back to; empty when its directory is gone. ``parent``: that directory's inode.
    """

    id: str
    path: str
    name: str
    parent: int
    inode: int
    is_dir: bool
    length: int
    uid: int
    removed_by: int
    removed_ns: int
    expires_ns: int


class Trash:
    """The trash of a cluster: :attr:`FileSystem.trash`. Root sees everything in it, others what they removed or own.

    Thread-safe. What is in it keeps its space, until it is restored, purged or expired.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def set(self, path: StrPath, keep_s: float) -> None:
        """Keep what is removed from a directory for `keep_s` seconds, 0: no longer. New subdirectories take it over.

        Only the owner of the directory may. What is removed is a name with unlink, rmdir or rmtree, and the last one
        of its file; what a rename replaces is not kept.
        """
        if not 0 <= keep_s < 1e12:
            raise error(Code.CODE_INVALID_ARGUMENT, f"the trash cannot keep things for {keep_s} seconds")
        request = pb.SetattrRequest(at=self._at(path), trash_ms=round(keep_s * 1000))
        meta_call(self._connection.client(), Method.METHOD_META_SETATTR, request, pb.AttrResponse)

    def keep_s(self, path: StrPath) -> float:
        """How long what is removed from a directory is kept, in seconds; 0: not at all."""
        request = pb.StatRequest(at=self._at(path))
        response = meta_call(self._connection.client(), Method.METHOD_META_STAT, request, pb.AttrResponse)
        return response.attr.trash_ms / 1000

    def entries(self, path: StrPath | None = None, *, parent: int = 0) -> Iterator[TrashEntry]:
        """What is in the trash, in the order of expiry.

        `path`: only what was at or below it. `parent`: only what was removed from the directory with this inode.
        """
        wanted = None if path is None else self._full(path)
        after = b""
        while True:
            request = pb.TrashListRequest(parent=parent, after=after)
            client = self._connection.client()
            page = meta_call(client, Method.METHOD_META_TRASH_LIST, request, pb.TrashListResponse)
            for entry in page.entries:
                if wanted is None or f"{os.fsdecode(entry.path)}/".startswith(f"{wanted}/"):
                    yield self._entry(entry)
            if not page.next:
                return
            after = page.next

    def at(self, path: StrPath) -> list[TrashEntry]:
        """What was at exactly this path, in the order of removal. Quick where its directory still exists."""
        wanted = self._full(path)
        above, _, name = wanted.rpartition("/")
        found: list[TrashEntry] = []
        try:
            directory = self._connection.client().stat(os.fsencode(above)).wait().inode
            found = [entry for entry in self.entries(parent=directory) if entry.name == name]
        except (FileNotFoundError, NotADirectoryError):
            pass
        found = found or [entry for entry in self.entries(path) if self._full(entry.path) == wanted]
        return sorted(found, key=lambda entry: entry.removed_ns)

    def restore(self, entry: TrashEntry, to: StrPath | None = None) -> Iterator[str]:
        """Put an entry back, to `to` if that is given; yields each path as it is back.

        A directory that was empty when it was removed, as `rm -r` leaves it, gets back what was removed from it
        before, of each name the latest. Raises FileExistsError when the name is taken (nothing has changed then),
        FileNotFoundError when the directory it goes to is gone.
        """
        request = pb.TrashRestoreRequest(id=entry.id.encode())
        if to is not None:
            request.to.CopyFrom(self._at(to))
        client = self._connection.client()
        response = meta_call(client, Method.METHOD_META_TRASH_RESTORE, request, pb.AttrResponse)
        where = entry.path if to is None else os.fsdecode(to)
        yield where
        if entry.is_dir and not client.list(b"", inode=response.attr.inode).wait():
            yield from self.restore_into(response.attr.inode, where)

    def restore_into(self, inode: int, where: str) -> Iterator[str]:
        """Put back what was removed from the directory `where` with `inode`, of each name the latest.

        Names that are taken are passed over.
        """
        latest: dict[str, TrashEntry] = {}
        for entry in self.entries(parent=inode):
            if entry.name not in latest or entry.removed_ns > latest[entry.name].removed_ns:
                latest[entry.name] = entry
        for name, entry in latest.items():
            try:
                for path in self.restore(entry):
                    yield f"{where.rstrip('/')}/{name}{path.removeprefix(entry.path)}"
            except FileExistsError:
                continue

    def purge(self, entries: Iterable[TrashEntry]) -> int:
        """Remove entries for good, of directories also what is in them; returns how many were still there."""
        purged = 0
        ids = (entry.id.encode() for entry in entries)
        while page := list(itertools.islice(ids, PURGE_IDS)):
            request = pb.TrashPurgeRequest(ids=page)
            client = self._connection.client()
            purged += meta_call(client, Method.METHOD_META_TRASH_PURGE, request, pb.TrashPurgeResponse).purged
        return purged

    def _at(self, path: StrPath) -> pb.PathAt:
        return pb.PathAt(inode=1, path=self._connection.path(path), follow=True)

    def _full(self, path: StrPath) -> str:
        """The path from the root of the cluster, without a slash at the end."""
        return "/" * bool(where := os.fsdecode(self._connection.path(path))) + where

    def _entry(self, entry: pb.TrashEntry) -> TrashEntry:
        base = self._full("/")
        return TrashEntry(
            id=entry.id.decode(),
            path=os.fsdecode(entry.path).removeprefix(base),
            name=os.fsdecode(entry.name),
            parent=entry.parent,
            inode=entry.attr.inode,
            is_dir=entry.attr.type == pb.FILE_TYPE_DIRECTORY,
            length=entry.attr.length,
            uid=entry.attr.uid,
            removed_by=entry.removed_by,
            removed_ns=entry.removed_ns,
            expires_ns=entry.expires_ns,
        )
