"""The checkpoints of a directory: which there are, whether they are whole, and what goes. Needs no PyTorch."""

from __future__ import annotations

import logging
import posixpath
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fs3 import native
from fs3.checkpoint.claim import claimed
from fs3.checkpoint.manifest import (
    CHECKSUMS,
    CRC_BYTES,
    METADATA,
    SUMMARY,
    Summary,
    Sums,
    parse_sums,
    unfinished_name,
)
from fs3.client import FileSystem
from fs3.client.file import RawFile
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

log = logging.getLogger(__name__)

# What is younger may be about to be claimed.
YOUNG_S = 5.0
# Of the reads of a verification, in all.
VERIFY_BYTES = 16 * CRC_BYTES

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. `path` from the file system's base directory."""

    path: str
    summary: Summary

    @property
    def name(self) -> str:
        """The last part of its path."""
        return posixpath.basename(self.path)


def list_checkpoints(fs: FileSystem, directory: str) -> list[Checkpoint]:
    """The whole checkpoints in a directory, the newest last. Raises FileNotFoundError when there is no directory.

    What is being written, or was left by a killed job, and directories that hold something else are not among them.
    """
    paths = [
        posixpath.join(directory, entry.name)
        for entry in fs.scandir(directory)
        if entry.is_dir() and unfinished_name(entry.name) is None
    ]
    wanted = [(posixpath.join(path, SUMMARY), 0, None) for path in paths]
    found = []
    for path, data in zip(paths, fs.read_batch(wanted, return_errors=True), strict=True):
        # Others may be removed meanwhile; directories without a summary are none of ours.
        if isinstance(data, FileNotFoundError | NotADirectoryError):
            continue
        if isinstance(data, OSError):
            raise data
        try:
            found.append(Checkpoint(path, Summary.parse(bytes(data))))
        except ValueError as e:
            log.warning("%s is not listed: %s", path, e)
    return sorted(found, key=lambda checkpoint: (checkpoint.summary.created_ns, checkpoint.path))


def latest(fs: FileSystem, directory: str) -> str | None:
    """The path of the newest whole checkpoint in a directory; None when there is none, or no directory."""
    try:
        found = list_checkpoints(fs, directory)
    except FileNotFoundError:
        return None
    return found[-1].path if found else None


def get(fs: FileSystem, path: str) -> Checkpoint:
    """The checkpoint at `path`. Raises NOT_FOUND when there is none, or not a whole one."""
    try:
        data = fs.read_batch([(posixpath.join(path, SUMMARY), 0, None)])[0]
        return Checkpoint(path, Summary.parse(bytes(data)))
    except (FileNotFoundError, NotADirectoryError, ValueError) as e:
        raise error(Code.CODE_NOT_FOUND, f"{path} is no whole checkpoint of fs3.checkpoint") from e


# ---- what goes


def delete(fs: FileSystem, path: str) -> None:
    """Remove a checkpoint at once. Raises NOT_FOUND for anything else. Who is reading it can go on."""
    get(fs, path)
    fs.rmtree(path)


def retain(fs: FileSystem, directory: str, keep_last: int) -> list[str]:
    """Remove all whole checkpoints in a directory but the newest `keep_last`, 1 or more; what was removed."""
    check_keep(keep_last)
    removed = []
    for checkpoint in list_checkpoints(fs, directory)[:-keep_last]:
        try:
            fs.rmtree(checkpoint.path)
        except FileNotFoundError:
            # Somebody else was faster.
            continue
        removed.append(checkpoint.path)
    return removed


def check_keep(keep_last: int | None) -> None:
    """Raise INVALID_ARGUMENT unless it is None or a number from 1 on: the newest checkpoint always stays."""
    if keep_last is not None and keep_last < 1:
        raise error(Code.CODE_INVALID_ARGUMENT, f"keep_last is {keep_last}: at least 1 checkpoint is kept")


@dataclass(frozen=True)
class Leftover:
    """An unfinished checkpoint, or safetensors file: of `name`, and whether somebody is (or may be) writing it."""

    path: str
    name: str
    is_dir: bool
    in_use: bool


def unfinished(fs: FileSystem, directory: str) -> list[Leftover]:
    """What was not finished in a directory. What was begun by a live process is in use.

    The cluster knows of a process that was killed after the session time (60 s unless it was set otherwise).
    """
    found = []
    for entry in fs.scandir(directory):
        name = unfinished_name(entry.name)
        if name is None:
            continue
        path, is_dir = posixpath.join(directory, entry.name), entry.is_dir()
        try:
            young = time.time() - entry.stat().st_mtime < YOUNG_S
            inode = fs.stat(posixpath.join(path, SUMMARY)).st_ino if is_dir else entry.inode()
            in_use = young or claimed(fs, inode)
        except FileNotFoundError:
            in_use = young
        found.append(Leftover(path, name, is_dir, in_use))
    return found


def clean(fs: FileSystem, directory: str) -> list[str]:
    """Remove what was not finished in a directory and nobody is writing any more; what was removed."""
    return [left.path for left in unfinished(fs, directory) if not left.in_use and remove(fs, left)]


def remove(fs: FileSystem, left: Leftover) -> bool:
    """Remove what was not finished; whether it was there."""
    try:
        (fs.rmtree if left.is_dir else fs.remove)(left.path)
    except FileNotFoundError:
        return False
    return True


# ---- verification


@dataclass
class Verification:
    """What a verification found. `problems` is empty when every byte is what was saved."""

    path: str
    bytes: int = 0
    items: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verify(fs: FileSystem, path: str, progress: Progress | None = None) -> Verification:
    """Read a whole checkpoint again and compare it with the CRCs that its writer made of its memory.

    fs3 verifies checksums of its own at every hop and in every read; this adds what lies above it, such as files that
    were exchanged or cut. `progress` is called with the bytes that were read. Needs 64 MiB of memory. Raises NOT_FOUND
    when `path` is no checkpoint.
    """
    checkpoint = get(fs, path)
    found = Verification(path)
    sums = _checked_sums(fs, checkpoint, found)
    buffer = memoryview(bytearray(VERIFY_BYTES))
    for name, items in sums.items():
        found.items += len(items)
        try:
            with fs.open(posixpath.join(path, name), "rb", buffering=0) as file:
                _verify_file(fs, file, name, items, found, buffer, progress)
        except OSError as e:
            found.problems.append(f"{name}: {e.strerror or e}")
    if found.items != checkpoint.summary.items:
        found.problems.append(f"{CHECKSUMS} lists {found.items} items of {checkpoint.summary.items}")
    return found


def _checked_sums(fs: FileSystem, checkpoint: Checkpoint, found: Verification) -> dict[str, list[Sums]]:
    wanted = {METADATA: checkpoint.summary.metadata_crc, CHECKSUMS: checkpoint.summary.checksums_crc}
    ranges = [(posixpath.join(checkpoint.path, name), 0, None) for name in wanted]
    for (name, crc), data in zip(wanted.items(), fs.read_batch(ranges, return_errors=True), strict=True):
        if isinstance(data, OSError):
            found.problems.append(f"{name}: {data.strerror}")
        elif native.crc32c(data) != crc:
            found.problems.append(f"{name}: it is not what was written")
        elif name == CHECKSUMS:
            return parse_sums(bytes(data))
    return {}


@dataclass(frozen=True)
class _Part:
    """What one CRC is of."""

    item: str
    offset: int
    length: int
    crc: int


def _parts(items: list[Sums]) -> Iterator[_Part]:
    for item in items:
        for number, crc in enumerate(item.crcs):
            start = number * CRC_BYTES
            yield _Part(item.name, item.offset + start, min(CRC_BYTES, item.length - start), crc)


def _batches(items: list[Sums]) -> Iterator[list[_Part]]:
    """Parts of at most VERIFY_BYTES in all."""
    batch: list[_Part] = []
    room = VERIFY_BYTES
    for part in _parts(items):
        if part.length > room:
            yield batch
            batch, room = [], VERIFY_BYTES
        batch.append(part)
        room -= part.length
    if batch:
        yield batch


def _verify_file(
    fs: FileSystem,
    file: RawFile,
    name: str,
    items: list[Sums],
    found: Verification,
    buffer: memoryview,
    progress: Progress | None,
) -> None:
    for batch in _batches(items):
        views, at = [], 0
        for part in batch:
            views.append(buffer[at : at + part.length])
            at += part.length
        reads = [(file, part.offset, view) for part, view in zip(batch, views, strict=True)]
        counts: list[int | OSError] = list(fs.read_many(reads, return_errors=True))
        for part, view, count in zip(batch, views, counts, strict=True):
            found.bytes += part.length
            problem = _problem(part, view, count)
            if problem:
                found.problems.append(f"{name}, bytes {part.offset} to {part.offset + part.length - 1}: {problem}")
        if progress:
            progress(at)


def _problem(part: _Part, view: memoryview, count: int | OSError) -> str | None:
    if isinstance(count, OSError):
        return f"{part.item} cannot be read: {count.strerror}"
    if count < part.length:
        return f"{part.item} is cut off: the file ends after {count} of {part.length} bytes"
    if native.crc32c(view) != part.crc:
        return f"{part.item} is not what was saved"
    return None
