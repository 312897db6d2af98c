"""Paths of inodes, for people. What is read here is a look, not part of an operation: it conflicts with nothing."""

from __future__ import annotations

from typing import Final

from fs3.kv.api import Transaction
from fs3.meta import keys, model
from fs3.v1.disk_meta_pb2 import InodeRecord

# Entries that are searched for the name of a directory that does not know it.
SEARCH_ENTRIES_MAX: Final = 10_000


async def name_in(tr: Transaction, parent: int, ino: int) -> bytes | None:
    """The name of `ino` in `parent`, if it is among its first SEARCH_ENTRIES_MAX."""
    for key, value in await tr.get_range(*keys.dirents(parent), limit=SEARCH_ENTRIES_MAX, snapshot=True):
        if model.decode_dirent(value)[0] == ino:
            return keys.dirent_name(key)
    return None


async def directory_name(tr: Transaction, record: InodeRecord) -> bytes | None:
    """The name of a directory in its parent."""
    if record.name:
        value = await tr.get(keys.dirent(record.attr.parent, record.name), snapshot=True)
        if value is not None and model.decode_dirent(value)[0] == record.attr.inode:
            return record.name
    return await name_in(tr, record.attr.parent, record.attr.inode)


async def path_bytes(tr: Transaction, parent: int, name: bytes) -> tuple[bytes, int]:
    """The path of the entry `name` of `parent`, and the directory it begins in: the root, or where the way up ends."""
    parts = [name]
    seen: set[int] = set()
    while parent != keys.ROOT_INODE and parent not in seen:
        seen.add(parent)
        value = await tr.get(keys.inode(parent), snapshot=True)
        record = None if value is None else model.decode_inode(value)
        found = None if record is None else await directory_name(tr, record)
        if record is None or found is None:
            break
        parts.append(found)
        parent = record.attr.parent
    return b"/".join(reversed(parts)), parent


async def directory_path(tr: Transaction, ino: int) -> str:
    """The path of a directory, as :func:`path_of`; "" when it is gone."""
    if ino == keys.ROOT_INODE:
        return "/"
    value = await tr.get(keys.inode(ino), snapshot=True)
    record = None if value is None else model.decode_inode(value)
    name = None if record is None else await directory_name(tr, record)
    return "" if record is None or name is None else await path_of(tr, record.attr.parent, name)


async def path_of(tr: Transaction, parent: int, name: bytes) -> str:
    """The path of an entry; one that does not lead to the root begins with the inode where it ends."""
    path, top = await path_bytes(tr, parent, name)
    where = "/" if top == keys.ROOT_INODE else "<trash>/" if top == keys.TRASH_INODE else f"<{top:#x}>/"
    return where + path.decode(errors="backslashreplace")
