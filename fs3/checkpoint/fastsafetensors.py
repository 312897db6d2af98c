"""The file reader of fastsafetensors' 3FS loader (``fastsafetensor_3fs_reader``) on the native client."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fs3.checkpoint.safetensors import HEADER_BYTES_MAX
from fs3.client import FileSystem, connect
from fs3.client.file import RawFile
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

# Memory for reads that nobody wants the bytes of.
SCRATCH_BYTES = 16 << 20


class ThreeFSFileReader:
    """Reads safetensors files into memory at an address. Thread-safe but for :meth:`close`.

    Paths are those at `mount_point`, which need not be mounted: what follows it is read from `fs`, by default the
    cluster of FS3_URL. Further arguments of the original are taken and do nothing. Only memory of the CPU can be read
    into; elsewhere the read raises, before anything is touched.
    """

    def __init__(self, mount_point: str = "", fs: FileSystem | None = None, **_: Any) -> None:
        self._mount_point = mount_point.rstrip("/")
        self._own = fs is None
        self._fs = connect() if fs is None else fs
        self._files: dict[str, RawFile] = {}

    def read_chunked(self, path: str, dev_ptr: int, file_offset: int, total_length: int, chunk_size: int = 0) -> int:
        """Read `total_length` bytes from `file_offset` on to the address `dev_ptr`, `chunk_size` at a time (0: all).

        Returns the count, short only at the end of the file. `dev_ptr` 0 reads and drops the bytes. Raises
        INVALID_ARGUMENT for memory that this process cannot write to, such as that of a GPU.
        """
        file = self._file(path)
        if dev_ptr:
            _check_writable(dev_ptr, total_length)
            target = memoryview((ctypes.c_char * total_length).from_address(dev_ptr)).cast("B")
            step = chunk_size or max(1, total_length)
        else:
            step = min(chunk_size or SCRATCH_BYTES, SCRATCH_BYTES)
            target = memoryview(bytearray(min(step, total_length)))
        done = 0
        while done < total_length:
            length = min(step, total_length - done)
            start = done if dev_ptr else 0
            count = file.pread_into(target[start : start + length], file_offset + done)
            done += count
            if count < length:
                break
        return done

    def read_headers_batch(self, paths: Iterable[str], num_threads: int = 8) -> dict[str, tuple[str, int, int]]:
        """By path: the header's JSON, its length with the 8 bytes before it, and the length of the file."""
        files = {path: self._file(path) for path in paths}
        lengths = self._fs.read_batch([(file, 0, 8) for file in files.values()])
        found = {}
        for (path, file), head in zip(files.items(), lengths, strict=True):
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(HEADER_BYTES_MAX, file.length - 8):
                raise ValueError(f"{path} is no safetensors file: its header does not fit into it")
            found[path] = (file.pread(length, 8).decode(), 8 + length, file.length)
        return found

    def close(self) -> None:
        """Close the files, and the connection if it was made here."""
        files, self._files = self._files, {}
        for file in files.values():
            file.close()
        if self._own:
            self._fs.close()

    def _file(self, path: str) -> RawFile:
        file = self._files.get(path)
        if file is None:
            if self._mount_point and not path.startswith(f"{self._mount_point}/"):
                raise error(Code.CODE_INVALID_ARGUMENT, f"{path} is not below {self._mount_point}")
            inside = path[len(self._mount_point) :]
            file = self._files.setdefault(path, self._fs.open(inside, "rb", buffering=0))
        return file


def _check_writable(address: int, length: int) -> None:
    """Raise INVALID_ARGUMENT unless all of it is memory that this process can write to."""
    at, end = address, address + length
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, *_ = line.split()
        first, last = (int(border, 16) for border in span.split("-"))
        if first <= at < last and "w" in access:
            at = last
        if at >= end:
            return
    raise error(
        Code.CODE_INVALID_ARGUMENT,
        f"the memory at {address:#x} is not the CPU's (or not this process'): read into a tensor on the CPU, "
        f"then copy it to the device",
    )
