"""Reading parts of stored tensors: whatever the box, the same as slicing."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fs3.checkpoint import reader as reader_module
from fs3.checkpoint import reads as reads_module
from fs3.checkpoint.manifest import StoredItem
from fs3.checkpoint.reads import Range, Reads, grouped


class Memory:
    """A file system of one file, that counts calls and bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.calls = 0
        self.bytes = 0

    def open(self, path: str, mode: str, buffering: int) -> Any:
        return SimpleNamespace(name=path, close=lambda: None)

    def read_many(self, ops: list[tuple[Any, int, memoryview]]) -> list[int]:
        self.calls += 1
        counts = []
        for _, offset, view in ops:
            found = self.data[offset : offset + len(view)]
            view[: len(found)] = found
            counts.append(len(found))
            self.bytes += len(found)
        return counts


def read(memory: Memory, stored: StoredItem, offsets: tuple[int, ...], target: torch.Tensor) -> None:
    item = SimpleNamespace(storage_offsets=offsets, lengths=tuple(target.shape))
    with Reads(cast(Any, memory), "/") as reads:
        reader_module._read_tensor(reads, cast(Any, item), stored, target)
        reads.flush()


def targets(shape: tuple[int, ...], dtype: Any, rng: random.Random) -> torch.Tensor:
    """A tensor of that shape: contiguous, with its dimensions the other way round, with gaps, or of another type."""
    kind = rng.randrange(4)
    if kind == 0:
        return torch.zeros(shape, dtype=dtype)
    if kind == 1:
        return torch.zeros(shape[::-1], dtype=dtype).permute(tuple(reversed(range(len(shape)))))
    if kind == 2:
        return torch.zeros((*shape, 2), dtype=dtype)[..., 0]
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(60))
def test_any_box_is_what_slicing_gives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(reads_module, "STAGE_BYTES", 4096)
    monkeypatch.setattr(reader_module, "STAGE_BYTES", 4096)
    monkeypatch.setattr(reads_module, "READS_MAX", 7)
    monkeypatch.setattr(reader_module, "RUN_BYTES_MIN", rng.choice([8, 64, 1 << 20]))
    monkeypatch.setattr(reader_module, "DIRECT_BYTES_MIN", rng.choice([1, 100]))
    monkeypatch.setattr(reads_module, "SMALL_BYTES", rng.choice([1, 100]))
    shape = tuple(rng.randrange(1, 9) for _ in range(rng.randrange(5)))
    dtype = rng.choice([torch.float32, torch.int64, torch.int8])
    whole = torch.randint(-100, 100, shape, dtype=torch.int64).to(dtype)
    before = rng.choice([0, 64, 640])
    memory = Memory(bytes(before) + whole.numpy().tobytes() + bytes(9))
    stored = StoredItem("file", before, whole.nbytes, (), dtype, shape)
    for _ in range(10):
        offsets = tuple(rng.randrange(size) for size in shape)
        lengths = tuple(rng.randrange(1, size - start + 1) for size, start in zip(shape, offsets, strict=True))
        target = targets(lengths, dtype, rng)
        read(memory, stored, offsets, target)
        box = tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))
        assert torch.equal(target.to(dtype), whole[box])


def test_long_parts_are_read_alone_and_short_ones_with_what_is_between() -> None:
    whole = torch.arange(64 * 16384, dtype=torch.float32).reshape(64, 16384)
    memory = Memory(whole.numpy().tobytes())
    stored = StoredItem("file", 0, whole.nbytes, (), torch.float32, (64, 16384))
    long = torch.zeros(64, 8192)
    read(memory, stored, (0, 100), long)
    assert torch.equal(long, whole[:, 100 : 100 + 8192])
    assert (memory.calls, memory.bytes) == (1, long.nbytes)
    short = torch.zeros(64, 10)
    read(memory, stored, (0, 100), short)
    assert torch.equal(short, whole[:, 100:110])
    assert memory.calls == 2


def test_staged_reads_keep_their_memory_when_many_have_been_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads_module, "READS_MAX", 3)
    monkeypatch.setattr(reads_module, "SMALL_BYTES", 1)
    data = torch.arange(200, dtype=torch.uint8)
    got: list[bytes] = []
    with Reads(cast(Any, Memory(data.numpy().tobytes())), "/") as reads:
        for place in range(3):
            reads.direct("file", place, torch.zeros(1, dtype=torch.uint8))
        for place in (10, 20, 30):
            reads.staged(Range("file", place, 2, lambda found: got.append(bytes(found.tolist()))))
        reads.flush()
    assert got == [bytes((10, 11)), bytes((20, 21)), bytes((30, 31))]


def test_an_empty_part_reads_nothing() -> None:
    memory = Memory(b"")
    read(memory, StoredItem("file", 0, 0, (), torch.float32, (0, 4)), (0, 0), torch.zeros(0, 4))
    assert memory.calls == 0


def test_a_short_file_is_an_error() -> None:
    stored = StoredItem("file", 0, 400, (), torch.float32, (100,))
    with pytest.raises(OSError, match="ends at byte 399"):
        read(Memory(bytes(399)), stored, (0,), torch.zeros(100))


def test_neighbours_are_read_together_and_get_their_own_bytes() -> None:
    data = torch.arange(5000, dtype=torch.int64).to(torch.uint8)
    got: dict[tuple[str, int], torch.Tensor] = {}

    def wanted(path: str, offset: int, length: int) -> Range:
        return Range(path, offset, length, lambda found: got.__setitem__((path, offset), found.clone()))

    gap, group = reads_module.GAP_BYTES, reads_module.GROUP_BYTES
    asked = [wanted("a", 300, 10), wanted("a", 0, 100), wanted("b", 310, 5), wanted("a", 305, 50), wanted("a", 310, 4)]
    joined = grouped(asked)
    assert [(r.path, r.offset, r.length) for r in joined] == [("a", 0, 355), ("b", 310, 5)]
    for found in joined:
        found.consume(data[found.offset : found.offset + found.length])
    for range_ in asked:
        assert torch.equal(got[range_.path, range_.offset], data[range_.offset : range_.offset + range_.length])
    far = [wanted("a", 0, 10), wanted("a", 10 + gap, 10), wanted("a", 21 + 2 * gap, 10)]
    assert [(r.offset, r.length) for r in grouped(far)] == [(0, 20 + gap), (21 + 2 * gap, 10)]
    many = [wanted("a", at, 5000) for at in range(0, 2 * group, 5000)]
    assert all(r.length <= group for r in grouped(many))
    assert sum(r.length for r in grouped(many)) == len(many) * 5000
    assert grouped([]) == []
