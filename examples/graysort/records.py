"""Records of sort benchmarks, as gensort makes and valsort checks them: 100 bytes, the first 10 of them the key."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

RECORD_BYTES = 100
KEY_BYTES = 10

Records = npt.NDArray[np.uint8]
"""Shape (records, 100)."""

HEX = np.frombuffer(b"0123456789ABCDEF", np.uint8)


def records_of(data: Any) -> Records:
    """The records in a bytes-like object, in place."""
    return np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)


def generate(first: int, count: int, seed: int) -> Records:
    """Records number `first` to `first + count`: a random key, the number in hexadecimal, random digits, fixed breaks.

    They are like gensort's, with another generator of random numbers.
    """
    random = np.random.default_rng([seed, first])
    records = np.empty((count, RECORD_BYTES), np.uint8)
    records[:, :KEY_BYTES] = random.integers(0, 256, (count, KEY_BYTES), np.uint8)
    records[:, 10:12] = np.frombuffer(b"\x00\x11", np.uint8)
    records[:, 12:44] = HEX[0]
    numbers = np.arange(first, first + count, dtype=np.uint64)
    for digit in range(16):
        records[:, 43 - digit] = HEX[(numbers >> np.uint64(4 * digit)) & np.uint64(15)]
    records[:, 44:48] = np.frombuffer(b"\x88\x99\xaa\xbb", np.uint8)
    records[:, 48:96] = np.repeat(HEX[random.integers(0, 16, (count, 12), np.uint8)], 4, axis=1)
    records[:, 96:] = np.frombuffer(b"\xcc\xdd\xee\xff", np.uint8)
    return records


def checksum(records: Records) -> int:
    """The sum of a 64-bit hash of every record: the same for every order, another one if any byte changed."""
    hashes = np.zeros(len(records), np.uint64)
    # Words at 0, 8, ..., 88 and at 92: all bytes, some of them twice.
    for number, at in enumerate((*range(0, 96, 8), RECORD_BYTES - 8)):
        words = np.ascontiguousarray(records[:, at : at + 8]).view(np.uint64)[:, 0]
        hashes = mixed(hashes + words + np.uint64(number))
    return int(hashes.sum(dtype=np.uint64))


def mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): one bit in changes about half of the bits out."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def in_order(records: Records) -> bool:
    """Whether no key is smaller than the one before it."""
    high = np.ascontiguousarray(records[:, :8]).view(">u8")[:, 0]
    low = np.ascontiguousarray(records[:, 8:KEY_BYTES]).view(">u2")[:, 0]
    return bool(np.all((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))))


def partition_of(records: Records, partitions: int) -> npt.NDArray[np.int64]:
    """Which of equal ranges of keys each record belongs to."""
    prefix = np.ascontiguousarray(records[:, :2]).view(">u2")[:, 0]
    return (prefix.astype(np.int64) * partitions) >> 16


def split(records: Records, partitions: int) -> list[Records]:
    """The records of each range of keys."""
    numbers = partition_of(records, partitions)
    order = np.argsort(numbers, kind="stable")
    ends = np.cumsum(np.bincount(numbers, minlength=partitions))
    return np.split(records[order], ends[:-1])


def sort_with_arrow(records: Records) -> Records:
    """Sorted by key, by PyArrow."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = pa.py_buffer(np.ascontiguousarray(records[:, :KEY_BYTES]))
    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(records), [None, keys])
    return records[pc.sort_indices(column).to_numpy()]


def sort_with_duckdb(records: Records) -> Records:
    """Sorted by key, by DuckDB."""
    import duckdb
    import pyarrow as pa

    column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(RECORD_BYTES), len(records), [None, pa.py_buffer(records)])
    unsorted = pa.table({"record": column})
    with duckdb.connect(config={"threads": 1}) as database:
        database.register("unsorted", unsorted)
        # The key comes first, and blobs compare byte by byte: so do whole records.
        found = database.sql("SELECT record FROM unsorted ORDER BY record").to_arrow_table()
    return records_of(found["record"].combine_chunks().cast(pa.binary(RECORD_BYTES)).buffers()[1])


SORTS = {"arrow": sort_with_arrow, "duckdb": sort_with_duckdb}
