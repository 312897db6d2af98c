"""Writing one file from many pieces of memory: every chunk once and whole, large pieces without a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from types import TracebackType

from fs3.checkpoint.claim import Claim
from fs3.client import FileSystem
from fs3.client.file import RawFile

# What one call writes, about, and calls under way at a time: together more than the client has in flight, and little
# enough that memory which was just read is still in the processor's cache when it is sent.
BATCH_BYTES = 8 << 20
BATCHES_MAX = 3


class ChunkStream:
    """Appends memory to a new file in whole chunks. A context manager; for one thread.

    Chunks that lie within one piece of memory are written from there. Those that pieces share are put together in
    buffers, which are used again; so small pieces cost a copy, and large ones one of less than two chunks. Memory
    that was added must not change before :meth:`finish` returns, or the context ends.
    """

    def __init__(self, fs: FileSystem, file: RawFile, chunk_bytes: int) -> None:
        self._fs = fs
        self._file = file
        self._chunk = chunk_bytes
        self._executor = ThreadPoolExecutor(BATCHES_MAX, thread_name_prefix="fs3-checkpoint")
        self._running: dict[Future[None], list[bytearray]] = {}
        self._free: list[bytearray] = []
        # What is to go out next: writes, and the buffers among them.
        self._writes: list[tuple[RawFile, int, memoryview]] = []
        self._buffers: list[bytearray] = []
        self._bytes = 0
        # The chunk that is put together, and how much of it there is.
        self._partial: bytearray | None = None
        self.position = 0

    def __enter__(self) -> ChunkStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Writes hold memory of the caller: none may be under way afterwards.
        self._executor.shutdown(wait=True, cancel_futures=True)

    def align(self, bytes_: int) -> int:
        """Fill up with zeros to a multiple of `bytes_`, at most a chunk; the position."""
        gap = -self.position % bytes_
        if gap:
            self.add(memoryview(bytes(gap)))
        return self.position

    def add(self, data: memoryview) -> None:
        """Append flat bytes. Raises OSError of earlier writes."""
        while data:
            filled = self.position % self._chunk
            if filled == 0 and len(data) >= self._chunk:
                count = min(len(data) // self._chunk * self._chunk, BATCH_BYTES)
                self._put(self.position, data[:count])
            else:
                count = min(self._chunk - filled, len(data))
                self._copy(filled, data[:count])
            self.position += count
            data = data[count:]

    def _copy(self, filled: int, data: memoryview) -> None:
        if self._partial is None:
            self._partial = self._free.pop() if self._free else bytearray(self._chunk)
        self._partial[filled : filled + len(data)] = data
        if filled + len(data) == self._chunk:
            self._put_partial(self.position - filled, self._chunk)

    def _put_partial(self, offset: int, length: int) -> None:
        assert self._partial is not None
        buffer, self._partial = self._partial, None
        self._buffers.append(buffer)
        self._put(offset, memoryview(buffer)[:length])

    def _put(self, offset: int, data: memoryview) -> None:
        self._writes.append((self._file, offset, data))
        self._bytes += len(data)
        if self._bytes >= BATCH_BYTES:
            self._send()

    def _send(self) -> None:
        while len(self._running) >= BATCHES_MAX:
            self._reap()
        writes, buffers = self._writes, self._buffers
        self._writes, self._buffers, self._bytes = [], [], 0
        self._running[self._executor.submit(self._write, writes)] = buffers

    def _write(self, writes: list[tuple[RawFile, int, memoryview]]) -> None:
        self._fs.write_many(writes)

    def _reap(self) -> None:
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        for future in done:
            buffers = self._running.pop(future)
            future.result()
            self._free += buffers

    def finish(self) -> None:
        """Write what is left, and wait until every replica has everything. Raises OSError of any write."""
        filled = self.position % self._chunk
        if filled:
            self._put_partial(self.position - filled, filled)
        if self._writes:
            self._send()
        while self._running:
            self._reap()


Produce = Callable[[ChunkStream], None]


def write_file(fs: FileSystem, path: str, produce: Produce, *, claimed: bool = False) -> None:
    """Make the file `path` of what `produce` adds; returns when it would survive power loss of all nodes.

    `claimed`: with a claim on it meanwhile. Raises FileExistsError when there is one. What was written stays there
    after an error.
    """
    with fs.open(path, "xb", buffering=0) as file, Claim(fs, file.inode) if claimed else nullcontext():
        layout = file.native.attr().layout
        assert layout is not None
        with ChunkStream(fs, file, layout.chunk_bytes) as stream:
            produce(stream)
            stream.finish()
        file.sync()


def write_small(fs: FileSystem, files: Mapping[str, bytes]) -> None:
    """Write files at the same time, in place of what they held; returns when they would survive power loss."""

    def write(path: str, data: bytes) -> None:
        with fs.open(path, "wb", buffering=0) as file:
            file.pwrite(data, 0)
            file.sync()

    with ThreadPoolExecutor(max(1, len(files)), thread_name_prefix="fs3-checkpoint") as executor:
        for _ in executor.map(write, files.keys(), files.values()):
            pass
