"""A page of a directory, with attributes by range reads over runs of neighbouring inode ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fs3.kv.api import Transaction
from fs3.meta import access, keys, model, tree, walk
from fs3.meta.context import OpContext
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.meta_pb2 import ListRequest, ListResponse

LIMIT_DEFAULT: Final = 1024
LIMIT_MAX: Final = 4096
# Far below the frame's body limit; a page of long symlinks ends here before its count is full.
PAGE_BYTES_MAX: Final = 4 << 20
# Two wanted ids this close are read in one range, although what lies between may be read in vain.
RUN_GAP_IDS: Final = 32
RUN_IDS_MAX: Final = 4096


async def run(tr: Transaction, request: ListRequest, ctx: OpContext) -> ListResponse:
    """Entries with names after `after`, in byte order. Attributes need search permission; without it they are absent.

    Raises NOT_DIRECTORY, ACCESS without read permission, and what a walk raises.
    """
    directory = await walk.target(tr, request.at, request.caller)
    attr = directory.attr
    if attr.type != model.DIRECTORY:
        raise walk.not_directory(directory)
    access.require(attr, request.caller, access.READ)
    response = ListResponse(inode=attr.inode, parent=attr.parent)
    limit = min(request.limit or LIMIT_DEFAULT, LIMIT_MAX)
    if tree.removed(directory):
        response.end = True
        return response
    rows = await tr.get_range(*keys.dirents(attr.inode, request.after), limit=limit, snapshot=True)
    entries = [(keys.dirent_name(key), *model.decode_dirent(value)) for key, value in rows]
    with_attr = request.with_attr and access.allowed(attr, request.caller, access.SEARCH)
    records = await attributes(tr, [ino for _, ino, _ in entries]) if with_attr else {}
    page_bytes = 0
    for name, ino, file_type in entries:
        record = records.get(ino)
        entry = response.entries.add(name=name, inode=ino, type=file_type, attr=record.attr if record else None)
        page_bytes += entry.ByteSize()
        if page_bytes > PAGE_BYTES_MAX:
            break
    response.end = len(rows) < limit and len(response.entries) == len(rows)
    return response


def runs(wanted: list[int]) -> Iterator[tuple[int, int]]:
    """Cover sorted ids by (first, last) pairs, bridging gaps of at most RUN_GAP_IDS."""
    first = last = wanted[0]
    for ino in wanted[1:]:
        if ino - last > RUN_GAP_IDS or ino - first >= RUN_IDS_MAX:
            yield first, last
            first = ino
        last = ino
    yield first, last


async def attributes(tr: Transaction, inodes: list[int]) -> dict[int, InodeRecord]:
    """Records of the inodes that exist, complete, directories included."""
    records: dict[int, InodeRecord] = {}
    if not inodes:
        return records
    wanted = sorted(set(inodes))
    members = set(wanted)
    for first, last in runs(wanted):
        times: dict[int, bytes] = {}
        subdirs: dict[int, bytes] = {}
        found: list[InodeRecord] = []
        for key, value in await tr.get_range(*keys.inode_range(first, last), snapshot=True):
            ino = keys.inode_of(key)
            if ino not in members:
                continue
            if len(key) == keys.INODE_KEY_BYTES:
                found.append(model.decode_inode(value))
            elif key.endswith(keys.TIMES_SUFFIX):
                times[ino] = value
            else:
                subdirs[ino] = value
        for record in found:
            ino = record.attr.inode
            if record.attr.type == model.DIRECTORY:
                tree.fill_directory(record, times.get(ino), subdirs.get(ino))
            records[ino] = record
    return records
