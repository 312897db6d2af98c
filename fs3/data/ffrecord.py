"""FFRecord files, as the `ffrecord` package writes them: all checksums and offsets first, then the records."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from fs3.data.dataset import IndexedDataset
from fs3.data.index import Index, wrong
from fs3.data.store import present, read_whole
from fs3.v1.frame_pb2 import Code

# u32 CRC-32 of what follows up to the first record, u64 number of records n, u32[n] CRC-32s, u64[n] offsets.
_HEADER_BYTES = 12


class FFRecordDataset(IndexedDataset):
    """The records of FFRecord files, by number. Arguments are those of :class:`SpanDataset`; there are no keys."""

    suffixes = (".ffr", ".ffrecord")

    def _scan(self) -> Sequence[int]:
        self._reset()
        self._sizes = [status.bytes for status in present(self._store, self._paths)]
        for path, size in zip(self._paths, self._sizes, strict=True):
            if size < _HEADER_BYTES:
                raise wrong(path, "it is no FFRecord file: it has no header")
        heads = read_whole(self._store, [(path, 0, _HEADER_BYTES) for path in self._paths])
        counts = [int.from_bytes(head[4:12], "little") for head in heads]
        for path, size, count in zip(self._paths, self._sizes, counts, strict=True):
            if _index_bytes(count) > size:
                raise wrong(path, f"it is no FFRecord file, or cut: {size} bytes cannot hold {count} records")
        return counts

    def _load(self, shards: list[int]) -> list[Index]:
        counts = np.diff(self._ends, prepend=0)
        blocks = read_whole(self._store, [(self._paths[s], 0, _index_bytes(int(counts[s]))) for s in shards])
        return [self._parsed(s, int(counts[s]), block) for s, block in zip(shards, blocks, strict=True)]

    def _parsed(self, shard: int, count: int, block: memoryview) -> Index:
        if zlib.crc32(block[4:]) != int.from_bytes(block[:4], "little"):
            raise wrong(self._paths[shard], "its header is damaged", Code.CODE_CHECKSUM_MISMATCH)
        crcs = np.frombuffer(block, "<u4", count, _HEADER_BYTES)
        starts = np.frombuffer(block, "<u8", count, _HEADER_BYTES + 4 * count)
        ends = np.append(starts[1:], np.uint64(self._sizes[shard]))
        if (ends < starts).any():
            raise wrong(self._paths[shard], "its records are not in order, or it is cut", Code.CODE_CHECKSUM_MISMATCH)
        return Index(starts, ends - starts, crcs, checksum=zlib.crc32)


def _index_bytes(records: int) -> int:
    return _HEADER_BYTES + 12 * records
