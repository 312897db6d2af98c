"""Files: raw ones on the native client, and what :func:`open` wraps around them."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fs3 import native
from fs3.client.buffers import Readable, Writable, exported
from fs3.client.finish import finish
from fs3.client.records import stat_result
from fs3.native import Operation

T = TypeVar("T")

# One round trip moves this much through a buffered file.
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Mode:
    """A parsed mode of :func:`open`."""

    action: str  # "r", "w", "x" or "a"
    update: bool  # "+"
    binary: bool

    @property
    def reads(self) -> bool:
        """Whether the file can be read."""
        return self.action == "r" or self.update

    @property
    def writes(self) -> bool:
        """Whether the file can be written."""
        return self.action != "r" or self.update

    def __str__(self) -> str:
        return f"{self.action}b{'+' if self.update else ''}"


def parse_mode(mode: str) -> Mode:
    """Parse a mode as :func:`open` does. Raises ValueError for what it would refuse."""
    letters = set(mode)
    if letters - set("rwxa+bt") or len(mode) > len(letters):
        raise ValueError(f"invalid mode: {mode!r}")
    actions = letters & set("rwxa")
    if len(actions) != 1:
        raise ValueError("must have exactly one of read/write/create/append mode")
    if {"b", "t"} <= letters:
        raise ValueError("can't have text and binary mode at once")
    return Mode(actions.pop(), "+" in letters, "b" in letters)


class RawFile(io.RawIOBase):
    """An open file without buffer: every read and write goes to the cluster, into and from the caller's memory.

    Buffers are contiguous bytes-like objects: bytearray, memoryview, mmap, NumPy arrays, tensors on the CPU. Positioned
    calls (``pread_into``, ``pwrite``, ...) may be made from any number of threads at once; calls that use the position
    take turns. A write returns after every serving replica has it (it survives kill -9 of all
    services); :meth:`sync` makes it survive power loss. Other clients see writes after :meth:`publish`, :meth:`sync`
    or :meth:`close`. Cannot be used in a forked child.
    """

    def __init__(self, client: native.Client, file: native.File, name: str, mode: Mode) -> None:
        super().__init__()
        self._client = client
        self._file = file
        self._parsed = mode
        self._position = 0
        # Calls that move the position take turns.
        self._turn = threading.Lock()
        self._pid = os.getpid()
        self.name = name
        self.mode = str(mode)
        self._blksize = BUFFER_BYTES

    def __repr__(self) -> str:
        state = " closed" if self.closed else ""
        return f"<fs3.RawFile name={self.name!r} mode={self.mode!r}{state}>"

    @property
    def native(self) -> native.File:
        """The file of the native client. Raises ValueError when closed."""
        self._check_open()
        return self._file

    @property
    def inode(self) -> int:
        """The inode."""
        return self._file.inode

    @property
    def length(self) -> int:
        """The length in bytes as this client knows it; :meth:`stat` asks the service."""
        return self.native.length

    # ---- abilities

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        self._check_open()
        return self._parsed.reads

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        self._check_open()
        return self._parsed.writes

    def seekable(self) -> bool:
        """Always True."""
        self._check_open()
        return True

    # ---- positioned

    def pread_into(self, buffer: Writable, offset: int) -> int:
        """Fill a contiguous writable buffer (bytearray, NumPy array, ...) from byte `offset`.

        Returns the count, short only at the end of the file. Bytes of the buffer beyond the count are undefined. The
        buffer is pinned until the call returns. Raises Fs3Error.
        """
        self._check_readable()
        return self._done(self._file.pread_into(exported(buffer), _offset(offset)))

    def preadv(self, buffers: Iterable[Writable], offset: int) -> int:
        """Fill buffers one after the other from byte `offset`, all at once; the count, as :func:`os.preadv`."""
        self._check_readable()
        counts = self._done(self._client.read_many(vectors(self._file, buffers, _offset(offset))))
        return total(counts, self.name)

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from byte `offset`, fewer only at the end of the file."""
        self._check_readable()
        length = max(0, min(length, self._file.length - offset))
        buffer = bytearray(length)
        count = self._done(self._file.pread_into(buffer, _offset(offset))) if length else 0
        return bytes(memoryview(buffer)[:count])

    def pwrite(self, data: Readable, offset: int) -> int:
        """Write all of a contiguous buffer at byte `offset`; returns its length in bytes.

        Returns after every serving replica has it. `data` must not change meanwhile. On an error a part may have been
        written.
        """
        self._check_writable()
        return self._done(self._file.pwrite(exported(data), _offset(offset)))

    def pwritev(self, buffers: Iterable[Readable], offset: int) -> int:
        """Write buffers one after the other from byte `offset`, all at once; the count, as :func:`os.pwritev`."""
        self._check_writable()
        counts = self._done(self._client.write_many(vectors(self._file, buffers, _offset(offset))))
        return total(counts, self.name)

    # ---- with the position

    def readinto(self, buffer: Writable) -> int:
        """Fill `buffer` from the position and move it. 0 at the end of the file."""
        self._check_readable()
        with self._turn:
            count = self._done(self._file.pread_into(exported(buffer), self._position))
            self._position += count
        return count

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to `size` bytes from the position; everything to the end when negative or None."""
        if size is None or size < 0:
            return self.readall()
        self._check_readable()
        with self._turn:
            data = self.pread(size, self._position)
            self._position += len(data)
        return data

    def readall(self) -> bytes:
        """Everything from the position to the end."""
        self._check_readable()
        with self._turn:
            data = self.pread(self._file.length, self._position)
            self._position += len(data)
        return data

    def write(self, data: Readable, /) -> int:
        """Write all of `data` at the position and move it; in append mode, at the end of the file.

        Appends never overlap, through whichever files and clients. Those of one client keep their order.
        """
        self._check_writable()
        with self._turn:
            if self._parsed.action == "a":
                memory = exported(data)
                self._position = self._done(self._file.append(memory))
                return memoryview(memory).nbytes
            count = self._done(self._file.pwrite(exported(data), self._position))
            self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move the position; it may lie beyond the end. Returns it.

        os.SEEK_DATA and os.SEEK_HOLE find data and holes. Raises OSError ENXIO when there is none in the file.
        """
        self._check_open()
        with self._turn:
            match whence:
                case os.SEEK_DATA | os.SEEK_HOLE:
                    self._position = self._sparse(_offset(offset), whence)
                    return self._position
                case os.SEEK_SET:
                    base = 0
                case os.SEEK_CUR:
                    base = self._position
                case os.SEEK_END:
                    base = self._file.length
                case _:
                    raise ValueError(f"invalid whence: {whence}")
            self._position = _offset(base + offset)
            return self._position

    def _sparse(self, offset: int, whence: int) -> int:
        position = self._done(self._file.seek_sparse(offset, whence == os.SEEK_HOLE))
        if position is None:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return position

    def tell(self) -> int:
        """The position."""
        self._check_open()
        return self._position

    # ---- the whole file

    def truncate(self, size: int | None = None, /) -> int:
        """Cut or extend (with zeros) to `size` bytes, default: the position. Returns the size."""
        self._check_writable()
        size = self._position if size is None else _offset(size)
        self._done(self._file.truncate(size))
        return size

    def punch(self, offset: int, length: int, /) -> None:
        """Make a hole, as far as the file goes: it reads as zeros, and whole blocks give their disk space back."""
        self._check_writable()
        self._done(self._file.punch(_offset(offset), _offset(length)))

    def sync(self) -> None:
        """Make acknowledged writes survive power loss of all nodes, and publish length and time of modification."""
        self._check_writable()
        self._done(self._file.sync())

    def publish(self) -> None:
        """Make the length known to other clients, as closing does, without a disk sync."""
        self._check_writable()
        self._done(self._file.publish())

    def stat(self) -> os.stat_result:
        """Attributes from the service, merged with this client's writes."""
        self._check_open()
        return stat_result(self._done(self._file.refresh()))

    def close(self) -> None:
        """Publish length and time of modification and end the session. Closing again does nothing."""
        if self.closed:
            return
        try:
            if self._pid == os.getpid():
                self._done(self._file.close())
        finally:
            super().close()

    # ---- checks

    def _done(self, operation: Operation[T]) -> T:
        return finish(operation, self.name)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _check_readable(self) -> None:
        self._check_open()
        if not self._parsed.reads:
            raise io.UnsupportedOperation("not readable")

    def _check_writable(self) -> None:
        self._check_open()
        if not self._parsed.writes:
            raise io.UnsupportedOperation("not writable")


def wrap(
    raw: RawFile, mode: Mode, buffering: int, encoding: str | None, errors: str | None, newline: str | None
) -> Any:
    """What :func:`open` returns for `raw`. Closes it when the arguments do not fit together (ValueError)."""
    try:
        check_arguments(mode, buffering, encoding, errors, newline)
        if buffering == 0:
            return raw
        line_buffering = buffering == 1 and not mode.binary
        size = BUFFER_BYTES if buffering < 0 or line_buffering or buffering == 1 else buffering
        buffered: io.BufferedReader | io.BufferedWriter | io.BufferedRandom
        if mode.update:
            buffered = io.BufferedRandom(raw, size)
        elif mode.writes:
            buffered = io.BufferedWriter(raw, size)
        else:
            buffered = io.BufferedReader(raw, size)
        if mode.binary:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering)
        text.mode = raw.mode.replace("b", "")  # type: ignore[misc]
        return text
    except BaseException:
        raw.close()
        raise


def check_arguments(mode: Mode, buffering: int, encoding: str | None, errors: str | None, newline: str | None) -> None:
    """Raise ValueError where :func:`open` would."""
    if mode.binary:
        for name, value in (("encoding", encoding), ("errors", errors), ("newline", newline)):
            if value is not None:
                raise ValueError(f"binary mode doesn't take an {name} argument")
    elif buffering == 0:
        raise ValueError("can't have unbuffered text I/O")


def _offset(offset: int) -> int:
    if offset < 0:
        raise ValueError(f"negative offset: {offset}")
    return offset


def vectors(file: native.File, buffers: Iterable[Any], offset: int) -> list[tuple[native.File, int, Any]]:
    """The ranges of consecutive buffers from `offset` on."""
    found = []
    for buffer in map(exported, buffers):
        found.append((file, offset, buffer))
        offset += memoryview(buffer).nbytes
    return found


def total(counts: Sequence[int | OSError], name: str) -> int:
    """The count of consecutive ranges. Raises the first error."""
    for count in counts:
        if isinstance(count, OSError):
            count.filename = name
            raise count
    return sum(counts)  # type: ignore[arg-type]
