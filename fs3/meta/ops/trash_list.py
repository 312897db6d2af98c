"""A page of the trash."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import keys, model, paths, trash
from fs3.meta.context import OpContext
from fs3.meta.ops.list import attributes
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import TrashEntry, TrashListRequest, TrashListResponse

LIMIT_MAX: Final = 256


async def run(tr: Transaction, request: TrashListRequest, ctx: OpContext) -> TrashListResponse:
    """What the caller may restore, in the order of expiry. A page may be empty though there are more."""
    limit = min(request.limit or LIMIT_MAX, LIMIT_MAX)
    if len(request.after) not in (0, keys.TRASH_NAME_BYTES):
        raise error(Code.CODE_INVALID_ARGUMENT, "`after` is not the id of anything in the trash")
    if request.parent:
        rows = await tr.get_range(*keys.trash_from(request.parent, request.after), limit=limit, snapshot=True)
        names = [keys.trash_entry_name(key) for key, _ in rows]
    else:
        begin, end = keys.dirents(keys.TRASH_INODE, request.after)
        rows = await tr.get_range(begin, end, limit=limit, snapshot=True)
        names = [keys.dirent_name(key) for key, _ in rows]
    response = TrashListResponse(next=names[-1] if len(names) == limit else b"")
    records = await attributes(tr, [keys.trash_parts(name)[2] for name in names])
    parents = _Parents()
    for name in names:
        expires_ns, parent, ino = keys.trash_parts(name)
        value = await tr.get(keys.trash(name), snapshot=True)
        child = records.get(ino)
        if value is None or child is None:
            continue
        found = trash.Trashed(name, expires_ns, parent, model.decode_trash(value), child)
        if found.visible(request.caller):
            response.entries.append(await parents.entry(tr, found))
    return response


class _Parents:
    """Paths of directories, each looked for once."""

    def __init__(self) -> None:
        self._paths: dict[int, bytes | None] = {keys.ROOT_INODE: b""}

    async def entry(self, tr: Transaction, found: trash.Trashed) -> TrashEntry:
        above = await self._path(tr, found.parent)
        return TrashEntry(
            id=found.name,
            attr=found.child.attr,
            parent=found.parent,
            name=found.record.name,
            path=b"" if above is None else above + b"/" + found.record.name,
            removed_ns=found.record.removed_ns,
            expires_ns=found.expires_ns,
            removed_by=found.record.removed_by,
        )

    async def _path(self, tr: Transaction, ino: int) -> bytes | None:
        """The path of a directory, also of one that is in the trash itself; None when it is gone."""
        if ino not in self._paths:
            self._paths[ino] = await self._search(tr, ino)
        return self._paths[ino]

    async def _search(self, tr: Transaction, ino: int) -> bytes | None:
        value = await tr.get(keys.inode(ino), snapshot=True)
        record = None if value is None else model.decode_inode(value)
        name = None if record is None or record.detached else await paths.directory_name(tr, record)
        if record is None or name is None:
            return None
        parent = record.attr.parent
        if parent == keys.TRASH_INODE:
            kept = await tr.get(keys.trash(name), snapshot=True)
            if kept is None:
                return None
            parent, name = keys.trash_parts(name)[1], model.decode_trash(kept).name
        above = await self._path(tr, parent)
        return None if above is None else above + b"/" + name
