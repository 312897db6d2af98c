"""Map-style datasets: random access to samples by number, a batch of them in one submission."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fs3 import native
from fs3.client import FileSystem
from fs3.core.errors import error
from fs3.data.index import FIELD, MISSING, Index, wrong
from fs3.data.store import Source, Store, expand, locate, short
from fs3.v1.frame_pb2 import Code

if TYPE_CHECKING:
    from types import TracebackType

# The unit of checksums on the cluster: reads of whole blocks go straight into the buffer, parts of one by a copy.
BLOCK_BYTES = 4096
PAGE_BYTES = 4096
FORMATS = ("numpy", "torch", "bytes", "memoryview")
Bytes = NDArray[np.uint8]


class Batch(list[Any]):
    """The samples of one `__getitems__`, a list. Unless they were copied, they are views of the same memory."""

    def __init__(self, samples: Iterable[Any], memory: Bytes, places: Sequence[tuple[int, int]]) -> None:
        super().__init__(samples)
        self._memory = memory
        self._places = places

    def array(self, dtype: DTypeLike = np.uint8, shape: tuple[int, ...] = (-1,)) -> NDArray[Any]:
        """All samples as one array, each as `dtype` of `shape`, the batch first.

        Without a copy where the samples lie evenly in the batch's memory, as records of one size of 32 KiB or more do;
        then it is a view that lives as long as they. Raises ValueError when they differ in size.
        """
        if not self._places:
            raise ValueError("an empty batch has no array")
        starts, lengths = np.array(self._places, np.int64).T
        if (lengths != lengths[0]).any():
            raise ValueError("the samples differ in size; collate them one by one")
        steps = np.diff(starts)
        step = int(steps[0]) if len(steps) else int(lengths[0])
        if (steps == step).all():
            whole = self._memory[int(starts[0]) :]
            rows = np.lib.stride_tricks.as_strided(whole, (len(starts), int(lengths[0])), (step, 1))
        else:
            rows = np.stack([self._memory[start : start + length] for start, length in self._places])
        # A single row may be longer than the step says.
        item = np.dtype(dtype).itemsize
        if rows.shape[1] % item:
            raise ValueError(f"samples of {rows.shape[1]} bytes do not hold whole items of {item} bytes")
        return rows.view(dtype).reshape((len(rows), *shape))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


@dataclass(frozen=True)
class Ranges:
    """Where the samples of a batch are, an entry for each: file, first byte, length, checksum (None: there is none)."""

    paths: list[str]
    """Files."""
    files: NDArray[np.uint64]
    """Which of them, by number."""
    starts: NDArray[np.uint64]
    lengths: NDArray[np.uint64]
    crcs: NDArray[np.uint32] | None
    checksum: Callable[[memoryview], int]


class Dataset(ABC):
    """Samples by number: what a PyTorch DataLoader calls a map-style dataset, without needing PyTorch.

    ``dataset[i]`` reads one sample, ``dataset.__getitems__([...])`` (which a DataLoader calls once for each batch) many
    in one submission, in the order asked for. Nothing is shuffled or read ahead; that is the sampler's and the
    DataLoader's work. Thread-safe; works in forked and spawned workers, each of which connects by itself.
    """

    suffixes: tuple[str, ...] = ()
    """Of shards, where a directory is given."""

    def __init__(self, source: Source | Sequence[Source], fs: FileSystem | None, token: str | None) -> None:
        self._store, given = locate(source, fs, token)
        try:
            self._paths = self._expand(given)
            counts = self._scan()
        except BaseException:
            self._store.close()
            raise
        # Samples up to and with each shard.
        self._ends = np.cumsum(np.asarray(counts, np.int64))

    def _expand(self, given: list[str]) -> list[str]:
        return expand(self._store, given, self.suffixes)

    @abstractmethod
    def _scan(self) -> Sequence[int]:
        """The samples of each of the paths; called once, with the paths found."""

    @abstractmethod
    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples of these numbers, in this order."""

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            # Python's protocol of sequences ends a loop by this.
            raise IndexError(f"sample {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} samples in {len(self._paths)} files>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close files, and the connection unless it was given."""
        self._store.close()

    @property
    def store(self) -> Store:
        """Where the shards are."""
        return self._store

    @property
    def paths(self) -> list[str]:
        """The shards, in the order of their samples."""
        return list(self._paths)

    def counts(self) -> list[int]:
        """The samples of each of the paths."""
        counted: list[int] = np.diff(self._ends, prepend=0).tolist()
        return counted

    def _locate(self, indices: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard and number in it, of each. Raises IndexError."""
        wanted = np.asarray(indices, np.int64).reshape(-1)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        outside = (wanted < 0) | (wanted >= len(self))
        if outside.any():
            raise IndexError(f"sample {indices[int(outside.argmax())]} of {len(self)}")
        shards = np.searchsorted(self._ends, wanted, side="right")
        return shards, wanted - np.where(shards > 0, self._ends[shards - 1], 0)


class SpanDataset(Dataset):
    """Datasets whose samples are ranges of bytes in files.

    ``source``: a path, URL, directory, pattern (``*`` in the last name) or a list of them; ``fs``: the file system that
    paths are on (default: local ones unless they are URLs). ``format``: samples are arrays of ``uint8`` ("numpy"),
    tensors ("torch"), "bytes" or "memoryview"; of several fields, dictionaries of them. ``decode``: called with each
    sample, its result takes the sample's place. ``keys``: samples are dictionaries with their names under
    ``"__key__"``. ``verify``: compare the checksums of records, where the format has them (the bytes that come from a
    cluster are verified anyway).

    ``reuse``: how long samples live. False: every batch has memory of its own, which lives as long as any of its
    samples. True: the batches of a thread share one buffer, faster, and samples are valid until the thread's next
    batch: for a `decode` or collate function that copies, as PyTorch's default one does. ``pin_memory``: the memory is
    page-locked by PyTorch where CUDA is present, and ordinary where it is not. "bytes" are always copies.
    """

    def __init__(
        self,
        source: Source | Sequence[Source],
        *,
        fs: FileSystem | None = None,
        token: str | None = None,
        format: str = "numpy",
        decode: Callable[[Any], Any] | None = None,
        keys: bool = False,
        verify: bool = True,
        reuse: bool = False,
        pin_memory: bool = False,
    ) -> None:
        if format not in FORMATS:
            raise error(Code.CODE_INVALID_ARGUMENT, f"the format {format!r} is none of {', '.join(FORMATS)}")
        self._format = format
        self._decode = decode
        self._with_keys = keys
        self._verify = verify
        self._reuse = reuse
        self._pin_memory = pin_memory
        self._buffers = threading.local()
        if format == "torch" or pin_memory:
            torch_module()
        super().__init__(source, fs, token)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_buffers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._buffers = threading.local()

    @abstractmethod
    def _ranges(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> Ranges:
        """Where samples are."""

    @abstractmethod
    def _key(self, shard: int, row: int) -> str:
        """The name of a sample; KeyError where the format has none."""

    def _fields(self, shard: int, row: int) -> list[tuple[str, int, int]] | None:
        """(name, offset in the sample, length) of its fields; None when it is one piece."""
        return None

    def _has_fields(self, shard: int) -> bool:
        """Whether the samples of a shard have fields."""
        return False

    def key(self, index: int) -> str:
        """The name of a sample: that of its file, or the key it was written with. Raises LookupError."""
        shards, rows = self._locate([index])
        return self._key(int(shards[0]), int(rows[0]))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples of these numbers, in this order: one batch of reads.

        Raises IndexError, and OSError for what cannot be read or is damaged, naming file and record.
        """
        shards, rows = self._locate(indices)
        ranges = self._ranges(shards, rows)
        # Whole blocks, each sample in a slot of its own.
        skips = ranges.starts % BLOCK_BYTES
        sizes = (skips + ranges.lengths + (BLOCK_BYTES - 1)) // BLOCK_BYTES * BLOCK_BYTES
        slots = np.cumsum(sizes) - sizes
        memory = self._memory(int(sizes.sum()))
        nothing = np.zeros(len(rows), np.uint64)
        # The client compares checksums of its own kind while it reads.
        summed = self._verify and ranges.crcs is not None and ranges.checksum is native.crc32c
        sums = (ranges.lengths, ranges.crcs) if summed else (nothing, nothing)
        spans = np.stack([ranges.files, ranges.starts - skips, slots, sizes, skips, *sums], axis=1, dtype=np.uint64)
        begins = (slots + skips).tolist()
        places = list(zip(begins, ranges.lengths.tolist(), strict=True))
        counts = self._store.read_spans(ranges.paths, spans, memory)
        self._check(ranges, rows, counts, skips)
        if self._verify and not summed:
            self._compare(ranges, rows, places, memory)
        if self._is_plain(shards):
            return Batch([memory[begin : begin + length] for begin, length in places], memory, places)
        samples = [self._sample(int(s), int(r), memory, *p) for s, r, p in zip(shards, rows, places, strict=True)]
        return Batch(samples, memory, places)

    def _is_plain(self, shards: NDArray[np.int64]) -> bool:
        """Whether samples of these shards are what was read, as arrays."""
        if self._format != "numpy" or self._with_keys or self._decode is not None:
            return False
        return not any(self._has_fields(shard) for shard in np.unique(shards).tolist())

    def _check(
        self, ranges: Ranges, rows: NDArray[np.int64], counts: list[int | None], skips: NDArray[np.uint64]
    ) -> None:
        if None in counts:
            raise self._damaged(ranges, rows, counts.index(None))
        missing = (np.array(counts, np.uint64) < skips + ranges.lengths) & (ranges.lengths > 0)
        if missing.any():
            n = int(missing.argmax())
            raise short(ranges.paths[int(ranges.files[n])], int(ranges.starts[n] + ranges.lengths[n]))

    def _compare(self, ranges: Ranges, rows: NDArray[np.int64], places: list[tuple[int, int]], memory: Bytes) -> None:
        if ranges.crcs is None:
            return
        view = memoryview(memory)  # type: ignore[arg-type]
        for n, (expected, (begin, length)) in enumerate(zip(ranges.crcs.tolist(), places, strict=True)):
            if ranges.checksum(view[begin : begin + length]) != expected:
                raise self._damaged(ranges, rows, n)

    def _damaged(self, ranges: Ranges, rows: NDArray[np.int64], n: int) -> OSError:
        why = f"record {rows[n]} is damaged: it is not what its checksum says"
        return wrong(ranges.paths[int(ranges.files[n])], why, Code.CODE_CHECKSUM_MISMATCH)

    def _memory(self, size: int) -> Bytes:
        """Memory for a batch: the thread's buffer, or some of its own."""
        if not self._reuse:
            return self._allocate(size)
        buffer: Bytes | None = getattr(self._buffers, "memory", None)
        if buffer is None or len(buffer) < size:
            # Sizes of batches differ a little: the next larger one shall fit.
            buffer = self._buffers.memory = self._allocate(size + size // 4)
        return buffer

    def _allocate(self, size: int) -> Bytes:
        if self._pin_memory and torch_module().cuda.is_available():
            pinned: Bytes = torch_module().empty(size, dtype=torch_module().uint8, pin_memory=True).numpy()
            return pinned
        # From a page's beginning on, as what comes from a cluster lies there too: that is copied faster.
        memory = np.empty(size + PAGE_BYTES, np.uint8)
        start = -memory.ctypes.data % PAGE_BYTES
        return memory[start : start + size]

    def _sample(self, shard: int, row: int, memory: Bytes, begin: int, length: int) -> Any:
        fields = self._fields(shard, row)
        if fields is None:
            made: Any = self._formed(memory, begin, length)
            if self._with_keys:
                made = {"__key__": self._key(shard, row), FIELD: made}
        else:
            made = {"__key__": self._key(shard, row)} if self._with_keys else {}
            made |= {name: self._formed(memory, begin + at, size) for name, at, size in fields}
        return made if self._decode is None else self._decode(made)

    def _formed(self, memory: Bytes, begin: int, length: int) -> Any:
        piece = memory[begin : begin + length]
        match self._format:
            case "numpy":
                return piece
            case "torch":
                return torch_module().from_numpy(piece)
            case "bytes":
                return piece.tobytes()
            case _:
                return memoryview(piece)  # type: ignore[arg-type]


class IndexedDataset(SpanDataset):
    """Shards with an index each, which is read when a sample of the shard is first asked for, and kept."""

    def _reset(self) -> None:
        self._indexes: dict[int, Index] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_indexes": {}}

    @abstractmethod
    def _load(self, shards: list[int]) -> list[Index]:
        """The indexes of shards."""

    def load_indexes(self) -> int:
        """Read all indexes now, so that forked workers share their memory; the bytes that they take."""
        self._need(range(len(self._paths)))
        return sum(index.nbytes for index in self._indexes.values())

    def lengths(self) -> NDArray[Any]:
        """The bytes of every sample."""
        self.load_indexes()
        return np.concatenate([self._indexes[shard].lengths for shard in range(len(self._paths))])

    def index(self, shard: int) -> Index:
        """The index of a shard."""
        self._need([shard])
        return self._indexes[shard]

    def _need(self, shards: Iterable[int]) -> None:
        missing = [shard for shard in shards if shard not in self._indexes]
        if missing:
            for shard, index in zip(missing, self._load(missing), strict=True):
                self._check_index(shard, index)
                self._indexes[shard] = index

    def _check_index(self, shard: int, index: Index) -> None:
        before = int(self._ends[shard - 1]) if shard else 0
        if len(index) != int(self._ends[shard]) - before:
            why = "the shard was replaced while it was in use: open the dataset anew"
            raise wrong(self._paths[shard], why, Code.CODE_STALE_HANDLE)

    def _ranges(self, shards: NDArray[np.int64], rows: NDArray[np.int64]) -> Ranges:
        involved = np.unique(shards).tolist()
        self._need(involved)
        starts, lengths = np.empty(len(rows), np.uint64), np.empty(len(rows), np.uint64)
        indexes = [self._indexes[shard] for shard in involved]
        crcs = np.empty(len(rows), np.uint32) if all(i.crcs is not None for i in indexes) else None
        for shard, index in zip(involved, indexes, strict=True):
            here = shards == shard
            starts[here], lengths[here] = index.starts[rows[here]], index.lengths[rows[here]]
            if crcs is not None and index.crcs is not None:
                crcs[here] = index.crcs[rows[here]]
        checksum = indexes[0].checksum if indexes else len
        files = np.searchsorted(involved, shards).astype(np.uint64)
        return Ranges([self._paths[shard] for shard in involved], files, starts, lengths, crcs, checksum)

    def _key(self, shard: int, row: int) -> str:
        keys = self.index(shard).keys
        if keys is None:
            raise LookupError(f"the records of {self._paths[shard]} were written without keys")
        return keys[row]

    def _has_fields(self, shard: int) -> bool:
        return self._indexes[shard].places is not None

    def _fields(self, shard: int, row: int) -> list[tuple[str, int, int]] | None:
        index = self._indexes[shard]
        if index.places is None:
            return None
        return [
            (name, offset, length)
            for name, (offset, length) in zip(index.fields, index.places[row].tolist(), strict=True)
            if length != MISSING
        ]


def torch_module() -> Any:
    """PyTorch. Raises ImportError that says what to do."""
    try:
        import torch
    except ImportError as e:
        raise ImportError("tensors and pinned memory need PyTorch: pip install torch") from e
    return torch
