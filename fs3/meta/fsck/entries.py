"""Directory entries: each names an inode of its type, in a directory that exists, and directories know their parents.

One page of entries, the inodes they name and their directories are read in one transaction. The pass also counts how
often each inode is named, and the subdirectories of each directory as the entries of one directory come together.
"""

from __future__ import annotations

from typing import Final

from fs3.kv.api import Transaction
from fs3.meta import keys, model, tree
from fs3.meta.context import OpContext
from fs3.meta.fsck.audit import SUSPECTS_MAX, Audit, Look, Unsettled
from fs3.meta.fsck.report import Finding
from fs3.meta.fsck.sorter import Sorter
from fs3.meta.ops.list import attributes
from fs3.meta.paths import path_of
from fs3.meta.scan import Rows
from fs3.v1.disk_meta_pb2 import InodeRecord
from fs3.v1.meta_pb2 import FileType

# Entries of one directory that are counted in one transaction; a larger directory is not judged.
COUNT_ENTRIES_MAX: Final = 1_000_000
COUNT_PAGE: Final = 4096


async def check_entries(audit: Audit, names: Sorter) -> None:
    """Look at every entry; `names` gets every inode that an entry of a directory names."""
    audit.report.begin("entries")
    suspects: list[Look] = []
    directories: set[int] = set()
    counting = _Counting()
    async for page in audit.pages(keys.table(keys.DIRENT), _page):
        for child in page.named:
            names.add(child)
        for entry in page.counted:
            directories.update(counting.take(*entry))
        suspects += [entry_look(parent, name) for parent, name in page.wrong]
        # What a repaired entry counted as is not known, so the counter of its directory is looked at afterwards.
        directories.update(parent for parent, _ in page.wrong)
        if len(suspects) + len(directories) >= SUSPECTS_MAX:
            await _confirm(audit, suspects, directories)
    directories.update(counting.ended())
    await _confirm(audit, suspects, directories)


async def _confirm(audit: Audit, suspects: list[Look], directories: set[int]) -> None:
    await audit.confirm(suspects)
    await audit.confirm([subdirs_look(ino) for ino in sorted(directories)])
    directories.clear()


class _Counting:
    """Subdirectories of the directory whose entries are being read, over pages."""

    def __init__(self) -> None:
        self._parent = 0
        self._found = 0
        self._stored = 0

    def take(self, parent: int, stored: int, is_directory: bool) -> list[int]:
        """The next entry, and the counter of its directory; gives the directory before when its counter looks wrong."""
        wrong = self.ended() if parent != self._parent else []
        if parent != self._parent:
            self._parent, self._found = parent, 0
        self._stored = stored
        self._found += is_directory
        return wrong

    def ended(self) -> list[int]:
        """The directory whose entries have all been taken, when its counter looks wrong."""
        return [self._parent] if self._parent and self._found != self._stored else []


class _Page:
    """What a page of entries showed."""

    def __init__(self) -> None:
        self.named: list[int] = []
        self.wrong: list[tuple[int, bytes]] = []
        # Directory, its counter, whether the entry is a subdirectory.
        self.counted: list[tuple[int, int, bool]] = []


async def _page(tr: Transaction, rows: Rows) -> _Page:
    entries = [(keys.inode_of(key), keys.dirent_name(key), *model.decode_dirent(value)) for key, value in rows]
    inodes = {parent for parent, _, _, _ in entries} | {child for _, _, child, _ in entries}
    records = await attributes(tr, list(inodes))
    page = _Page()
    for parent, name, child, file_type in entries:
        directory, record = records.get(parent), records.get(child)
        if _trouble(directory, record, file_type) is not None:
            page.wrong.append((parent, name))
        if directory is None or directory.attr.type != model.DIRECTORY:
            continue
        if record is not None:
            page.named.append(child)
        if not tree.removed(directory):
            page.counted.append((parent, directory.attr.nlink - 2, file_type == model.DIRECTORY))
    return page


def _trouble(directory: InodeRecord | None, record: InodeRecord | None, file_type: int) -> str | None:
    """The kind of what is wrong with an entry. Pure."""
    if directory is None or directory.attr.type != model.DIRECTORY:
        return "stray-entry"
    if record is None:
        return "dangling-entry"
    if record.attr.type != file_type:
        return "entry-type"
    if file_type == model.DIRECTORY and record.attr.parent != directory.attr.inode and not directory.detached:
        return "directory-parent"
    return None


def entry_look(parent: int, name: bytes) -> Look:
    """A look at one entry."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        value = await tr.get(keys.dirent(parent, name))
        if value is None:
            return None
        child, file_type = model.decode_dirent(value)
        directory, record = await tree.load(tr, parent), await tree.load(tr, child)
        kind = _trouble(directory, record, file_type)
        if kind is None:
            return None
        if kind == "directory-parent" and await _named_by_parent(tr, child, record):
            # The other entry is the right one; this one is a second name, which the pass over inodes settles.
            return None
        finding = _finding(kind, await path_of(tr, parent, name), child, parent, file_type, record)
        if ctx is not None:
            _repair(tr, ctx, kind, parent, name, child, record)
        return finding

    return look


async def _named_by_parent(tr: Transaction, child: int, record: InodeRecord | None) -> bool:
    """Whether the directory that `child` takes for its parent has an entry for it."""
    assert record is not None
    for _, value in await tr.get_range(*keys.dirents(record.attr.parent), limit=COUNT_PAGE, snapshot=True):
        if model.decode_dirent(value)[0] == child:
            return True
    return False


def _finding(kind: str, where: str, child: int, parent: int, file_type: int, record: InodeRecord | None) -> Finding:
    if kind == "stray-entry":
        return Finding(kind, child, where, f"its directory {parent:#x} does not exist", "remove the entry")
    if record is None:
        return Finding(kind, child, where, f"names inode {child:#x}, which does not exist", "remove the entry")
    if kind == "entry-type":
        problem = f"says {_type(file_type)}, the inode is a {_type(record.attr.type)}"
        return Finding(kind, child, where, problem, "set the type of the entry")
    problem = f"the directory takes {record.attr.parent:#x} for its parent, its entry is in {parent:#x}"
    return Finding(kind, child, where, problem, "set the parent")


def _type(file_type: int) -> str:
    names = {number: name for name, number in FileType.items()}
    return names.get(file_type, str(file_type)).removeprefix("FILE_TYPE_").lower().replace("_", " ")  # type: ignore[call-overload, no-any-return]


def _repair(
    tr: Transaction, ctx: OpContext, kind: str, parent: int, name: bytes, child: int, record: InodeRecord | None
) -> None:
    if kind == "stray-entry" or record is None:
        tr.clear(keys.dirent(parent, name))
    elif kind == "entry-type":
        tr.set(keys.dirent(parent, name), model.encode_dirent(child, record.attr.type))
    else:
        record.attr.parent = parent
        tree.store(tr, record)
    if kind != "stray-entry":
        tree.touch_directory(tr, parent, ctx.now_ns)


def subdirs_look(ino: int) -> Look:
    """A look at the subdirectory counter of a directory."""

    async def look(tr: Transaction, ctx: OpContext | None) -> Finding | None:
        record = await tree.load(tr, ino)
        if record is None or record.attr.type != model.DIRECTORY or record.detached:
            return None
        stored = model.decode_count(await tr.get(keys.directory_subdirs(ino), snapshot=True))
        found = await _subdirectories(tr, ino)
        if found == stored:
            return None
        if ctx is not None:
            # Relative, so that it is right whatever others add at the same time.
            tr.add(keys.directory_subdirs(ino), found - stored)
        problem = f"has {found} subdirectories, its counter says {stored}"
        return Finding("subdirectories", ino, f"directory {ino:#x}", problem, "set the counter")

    return look


async def _subdirectories(tr: Transaction, ino: int) -> int:
    """Count by the snapshot of the transaction; conflicts with nobody. Raises Unsettled for huge directories."""
    begin, end = keys.dirents(ino)
    found = 0
    for _ in range(COUNT_ENTRIES_MAX // COUNT_PAGE):
        rows = await tr.get_range(begin, end, limit=COUNT_PAGE, snapshot=True)
        found += sum(model.decode_dirent(value)[1] == model.DIRECTORY for _, value in rows)
        if len(rows) < COUNT_PAGE:
            return found
        begin = rows[-1][0] + b"\x00"
    raise Unsettled
