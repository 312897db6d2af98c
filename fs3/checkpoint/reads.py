"""Reading many ranges of a checkpoint's files in few calls, within bounded memory."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from fs3.checkpoint.pytorch import torch
from fs3.client import FileSystem
from fs3.client.buffers import exported
from fs3.client.file import RawFile
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

# Memory for what cannot be read to where it belongs, used again and again.
STAGE_BYTES = 64 << 20
# Reads that one call makes, at most.
READS_MAX = 4096
# Ranges shorter than this are read together with neighbours that are not farther than GAP_BYTES, up to GROUP_BYTES.
SMALL_BYTES = 64 << 10
GAP_BYTES = 16 << 10
GROUP_BYTES = 1 << 20
# Where staged ranges begin, for every type of elements.
ALIGN_BYTES = 64

Consume = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Range:
    """Bytes of a file that `consume` is to get, as a tensor of uint8 that it may not keep."""

    path: str
    offset: int
    length: int
    consume: Consume


class Reads:
    """Collects reads and makes them: straight into memory, or by way of a buffer. A context manager that closes files.

    For one thread. Reads are made when enough have come together, and by :meth:`flush`.
    """

    def __init__(self, fs: FileSystem, directory: str) -> None:
        self._fs = fs
        self._directory = directory
        self._files: dict[str, RawFile] = {}
        self._ops: list[tuple[RawFile, int, memoryview]] = []
        self._consumers: list[tuple[Consume, torch.Tensor]] = []
        self._small: list[Range] = []
        self._stage: torch.Tensor | None = None
        self._staged = 0

    def __enter__(self) -> Reads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def direct(self, path: str, offset: int, target: torch.Tensor) -> None:
        """Fill a contiguous tensor on the CPU from byte `offset` of a file."""
        if len(self._ops) >= READS_MAX:
            self._run()
        self._read(path, offset, target)

    def staged(self, wanted: Range) -> None:
        """Read a range by way of the buffer. Short ones wait for their neighbours."""
        if wanted.length < SMALL_BYTES:
            self._small.append(wanted)
        else:
            self._stage_range(wanted)

    def flush(self) -> None:
        """Make all reads that were asked for. Raises OSError; what was read by then is in its place."""
        small, self._small = self._small, []
        for group in grouped(small):
            self._stage_range(group)
        self._run()

    def _read(self, path: str, offset: int, target: torch.Tensor) -> None:
        self._ops.append((self._file(path), offset, memoryview(exported(target)).cast("B")))

    def _stage_range(self, wanted: Range) -> None:
        # Before a part of the buffer is given to it: making the reads frees all of the buffer.
        if len(self._ops) >= READS_MAX or self._staged + wanted.length > STAGE_BYTES:
            self._run()
        if wanted.length > STAGE_BYTES:
            buffer = torch.empty(wanted.length, dtype=torch.uint8)
        else:
            if self._stage is None:
                self._stage = torch.empty(STAGE_BYTES, dtype=torch.uint8)
            buffer = self._stage[self._staged : self._staged + wanted.length]
            self._staged += -(-wanted.length // ALIGN_BYTES) * ALIGN_BYTES
        self._read(wanted.path, wanted.offset, buffer)
        self._consumers.append((wanted.consume, buffer))

    def _run(self) -> None:
        ops, self._ops = self._ops, []
        consumers, self._consumers = self._consumers, []
        self._staged = 0
        if not ops:
            return
        for (file, offset, view), count in zip(ops, self._fs.read_many(ops), strict=True):
            if count < len(view):
                raise error(
                    Code.CODE_DISK_ERROR, f"{file.name} ends at byte {offset + count}: the checkpoint is not whole"
                )
        for consume, buffer in consumers:
            consume(buffer)

    def _file(self, path: str) -> RawFile:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = self._fs.open(posixpath.join(self._directory, path), "rb", buffering=0)
        return file


def grouped(ranges: list[Range]) -> list[Range]:
    """The same ranges in fewer: neighbours are read together, and then taken apart."""
    found: list[Range] = []
    members: list[Range] = []
    end = 0
    for wanted in sorted(ranges, key=lambda r: (r.path, r.offset)):
        far = members and (
            wanted.path != members[0].path
            or wanted.offset - end > GAP_BYTES
            or wanted.offset + wanted.length - members[0].offset > GROUP_BYTES
        )
        if far:
            found.append(_joined(members, end))
            members = []
        end = max(end if members else 0, wanted.offset + wanted.length)
        members.append(wanted)
    if members:
        found.append(_joined(members, end))
    return found


def _joined(members: list[Range], end: int) -> Range:
    if len(members) == 1:
        return members[0]
    start = members[0].offset

    def consume(buffer: torch.Tensor) -> None:
        for member in members:
            at = member.offset - start
            member.consume(buffer[at : at + member.length])

    return Range(members[0].path, start, end - start, consume)
