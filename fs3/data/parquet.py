"""Parquet files: a sample is a row, or a row group. Needs pyarrow."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fs3.client import FileSystem
from fs3.core.errors import error
from fs3.data.dataset import Dataset
from fs3.data.index import wrong
from fs3.data.store import Source, present, read_whole
from fs3.v1.frame_pb2 import Code

UNITS = ("row", "row_group")
# Read from the end of each file when a dataset is opened; footers that are longer are read again.
FOOTER_BYTES = 64 << 10
# Row groups that a dataset of rows keeps decoded.
GROUPS_KEPT = 8
# The length of the footer, and the magic.
_TAIL_BYTES = 8


class ParquetDataset(Dataset):
    """Rows or row groups of Parquet files, by number.

    ``unit``: with "row" a sample is a dictionary of Python values; with "row_group" it is a ``pyarrow.Table`` of one
    row group. A row group is what Parquet can read at least, so a batch of random rows reads (and decodes) a row group
    for each: write small ones for that, or shuffle row groups. The last few are kept for rows that are read in order.
    ``columns``: only these, and only their bytes are read. ``decode``: called with each sample, its result takes the
    sample's place. ``source``, ``fs`` and ``token`` as for :class:`SpanDataset`. The footers stay in memory. A batch's
    row groups are read in one submission.
    """

    suffixes = (".parquet", ".parq")

    def __init__(
        self,
        source: Source | Sequence[Source],
        *,
        unit: str = "row",
        columns: Sequence[str] | None = None,
        decode: Callable[[Any], Any] | None = None,
        fs: FileSystem | None = None,
        token: str | None = None,
    ) -> None:
        if unit not in UNITS:
            raise error(Code.CODE_INVALID_ARGUMENT, f"the unit {unit!r} is none of {', '.join(UNITS)}")
        _pyarrow()
        self._unit = unit
        self._columns = None if columns is None else list(columns)
        self._decode = decode
        self._start_cache()
        super().__init__(source, fs, token)

    def _start_cache(self) -> None:
        self._turn = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_turn", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_cache()

    def _scan(self) -> Sequence[int]:
        sizes = [status.bytes for status in present(self._store, self._paths)]
        self._footers = [
            self._footer(path, bytes(tail))
            for path, tail in zip(self._paths, self._tails(sizes, [FOOTER_BYTES] * len(sizes)), strict=True)
        ]
        for number, path in enumerate(self._paths):
            unknown = sorted(set(self._columns or ()) - set(self.column_names(number)))
            if unknown:
                raise wrong(path, f"it has no column {unknown[0]!r}")
        # Rows before each row group, and behind the last.
        self._rows = [
            np.cumsum([0, *(footer.row_group(n).num_rows for n in range(footer.num_row_groups))])
            for footer in self._footers
        ]
        return [len(rows) - 1 if self._unit == "row_group" else int(rows[-1]) for rows in self._rows]

    def column_names(self, shard: int) -> list[str]:
        """The columns of a file."""
        return list(self._footers[shard].schema.to_arrow_schema().names)

    def _tails(self, sizes: list[int], lengths: list[int]) -> list[memoryview]:
        """The ends of all files, whole footers."""
        cut = [min(size, length) for size, length in zip(sizes, lengths, strict=True)]
        tails = read_whole(self._store, [(p, s - c, c) for p, s, c in zip(self._paths, sizes, cut, strict=True)])
        for path, tail in zip(self._paths, tails, strict=True):
            if bytes(tail[-4:]) != b"PAR1":
                raise wrong(path, "it is no Parquet file, or cut")
        needed = [int.from_bytes(tail[-_TAIL_BYTES:-4], "little") + _TAIL_BYTES for tail in tails]
        if all(n <= len(tail) or len(tail) == size for n, tail, size in zip(needed, tails, sizes, strict=True)):
            return tails
        return self._tails(sizes, [max(n, c) for n, c in zip(needed, cut, strict=True)])

    def _footer(self, path: str, tail: bytes) -> Any:
        arrow, parquet = _pyarrow()
        try:
            return parquet.read_metadata(arrow.BufferReader(tail))
        except (arrow.ArrowException, OSError) as e:
            raise wrong(path, f"its footer is damaged: {e}", Code.CODE_CHECKSUM_MISMATCH) from e

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The samples of these numbers, in this order; the bytes of all row groups in one submission."""
        shards, rows = self._locate(indices)
        if self._unit == "row_group":
            wanted = list(zip(shards.tolist(), rows.tolist(), strict=True))
            tables = self._tables(list(dict.fromkeys(wanted)))
            return [self._made(tables[one]) for one in wanted]
        places = [self._place(*one) for one in zip(shards.tolist(), rows.tolist(), strict=True)]
        tables = self._cached(list(dict.fromkeys((shard, group) for shard, group, _ in places)))
        return [self._made(tables[shard, group].slice(row, 1).to_pylist()[0]) for shard, group, row in places]

    def _made(self, sample: Any) -> Any:
        return sample if self._decode is None else self._decode(sample)

    def _place(self, shard: int, row: int) -> tuple[int, int, int]:
        """Shard, row group and row in it."""
        group = int(np.searchsorted(self._rows[shard], row, side="right")) - 1
        return shard, group, row - int(self._rows[shard][group])

    def _cached(self, groups: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        with self._turn:
            found = {one: self._kept[one] for one in groups if one in self._kept}
        found |= self._tables([one for one in groups if one not in found])
        with self._turn:
            for one in groups:
                self._kept[one] = found[one]
                self._kept.move_to_end(one)
            while len(self._kept) > GROUPS_KEPT:
                self._kept.popitem(last=False)
        return found

    def _tables(self, groups: list[tuple[int, int]]) -> dict[tuple[int, int], Any]:
        """Row groups, decoded."""
        spans = {(shard, group): self._spans(shard, group) for shard, group in groups}
        pieces = [(self._paths[one[0]], start, end - start) for one in groups for start, end in spans[one]]
        views = iter(read_whole(self._store, pieces))
        found = {}
        for shard, group in groups:
            parts = [(start, next(views)) for start, _ in spans[shard, group]]
            found[shard, group] = self._decoded(shard, group, parts)
        return found

    def _spans(self, shard: int, group: int) -> list[tuple[int, int]]:
        """The bytes of the columns of a row group, neighbours together."""
        about = self._footers[shard].row_group(group)
        spans: list[tuple[int, int]] = []
        for column in map(about.column, range(about.num_columns)):
            if not self._is_wanted(column.path_in_schema):
                continue
            start = column.data_page_offset
            if column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            spans.append((start, start + column.total_compressed_size))
        joined: list[tuple[int, int]] = []
        for start, end in sorted(spans):
            if joined and start == joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        return joined

    def _is_wanted(self, leaf: str) -> bool:
        """Whether what is stored as `leaf` is (a part of) a column that was asked for."""
        return self._columns is None or any(leaf == name or leaf.startswith(f"{name}.") for name in self._columns)

    def _decoded(self, shard: int, group: int, parts: list[tuple[int, memoryview]]) -> Any:
        arrow, parquet = _pyarrow()
        source = arrow.PythonFile(_Parts(parts), mode="r")
        try:
            with parquet.ParquetFile(source, metadata=self._footers[shard]) as file:
                return file.read_row_group(group, columns=self._columns)
        except (arrow.ArrowException, OSError) as e:
            why = f"row group {group} is damaged: {e}"
            raise wrong(self._paths[shard], why, Code.CODE_CHECKSUM_MISMATCH) from e


class _Parts:
    """What was read of a file, as the file; for pyarrow, which reads nothing else."""

    def __init__(self, parts: list[tuple[int, memoryview]]) -> None:
        self._parts = parts
        self._position = 0
        self._end = max((start + len(view) for start, view in parts), default=0)
        self.closed = False

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def read_buffer(self, count: int) -> Any:
        """From the position on, without a copy."""
        for start, view in self._parts:
            if start <= self._position and self._position + count <= start + len(view):
                at = self._position - start
                self._position += count
                return _pyarrow()[0].py_buffer(view[at : at + count])
        raise OSError(f"bytes {self._position} to {self._position + count} are of no column")

    def read(self, count: int) -> bytes:
        """From the position on."""
        return bytes(memoryview(self.read_buffer(count)))

    def close(self) -> None:
        """Nothing to do."""
        self.closed = True


def _pyarrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet. Raises ImportError that says what to do."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from e
    return pyarrow, pyarrow.parquet
