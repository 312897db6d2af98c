"""Batches of random samples through `fs3.data`, in turn with large reads of as many bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from fs3.client import FileSystem
from fs3.data import RecordDataset, RecordWriter
from fs3.testing import measure
from fs3.testing.measure import MIB, Measured, Meter

SAMPLE_BYTES = 100 << 10
BATCH = 256
SHARDS = 4


def _written(fs: FileSystem, directory: str, size: int) -> int:
    """Shards of samples, `size` bytes in all; how many samples."""
    count = max(BATCH, size // SAMPLE_BYTES) // SHARDS
    samples = memoryview(os.urandom(64 * SAMPLE_BYTES))
    fs.makedirs(directory)
    for shard in range(SHARDS):
        with RecordWriter(f"{directory}/{shard}.fs3r", fs=fs) as writer:
            for number in range(count):
                at = number % 64 * SAMPLE_BYTES
                writer.write(samples[at : at + SAMPLE_BYTES])
    return count * SHARDS


def _read(dataset: RecordDataset, batches: list[list[int]], pids: list[int]) -> Measured:
    meter = Meter(pids)
    with meter:
        for batch in batches:
            dataset.__getitems__(batch)
    return meter.result(bytes_=sum(map(len, batches)) * SAMPLE_BYTES)


def figures(
    fs: FileSystem, size: int, *, turns: int, warming: int, pids: list[int], say: Callable[[str], None]
) -> tuple[Measured, Measured]:
    """Random samples, and large reads of a file of `size` bytes, in turn; the medians.

    Samples are 100 KiB, in batches of 256 from four shards into a reused buffer; the checksums of records are verified.
    """
    count = _written(fs, "/samples", size)
    measure.native_write(fs, "/samples-large", size // MIB * MIB)
    rng = random.Random(11)
    found: list[tuple[Measured, Measured]] = []
    with RecordDataset("/samples", fs=fs, reuse=True) as dataset:
        for turn in range(warming + turns):
            say(f"samples, turn {turn + 1}")
            batches = [rng.sample(range(count), BATCH) for _ in range(max(1, count // BATCH))]
            pair = (
                _read(dataset, batches, pids),
                measure.native_read(fs, "/samples-large", size // MIB * MIB, pids=pids),
            )
            if turn >= warming:
                found.append(pair)
    fs.rmtree("/samples")
    fs.remove("/samples-large")
    samples, large = (measure.middle(side) for side in zip(*found, strict=True))
    return samples, large
