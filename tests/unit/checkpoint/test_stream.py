"""Cutting a stream of memory into whole chunks."""

from __future__ import annotations

import random
import threading
from typing import Any, cast

import pytest

from fs3.checkpoint import stream as stream_module
from fs3.checkpoint.stream import ChunkStream

CHUNK = 64


class Recorder:
    """A file system that keeps what is written and how."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.writes: list[tuple[int, int]] = []
        self.failure: OSError | None = None
        self._lock = threading.Lock()

    def write_many(self, writes: list[tuple[Any, int, memoryview]]) -> list[int]:
        if self.failure:
            raise self.failure
        with self._lock:
            for _, offset, view in writes:
                self.writes.append((offset, len(view)))
                self.data.extend(bytes(max(0, offset + len(view) - len(self.data))))
                self.data[offset : offset + len(view)] = view
        return [len(view) for _, _, view in writes]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "BATCH_BYTES", 4 * CHUNK)


def opened(to: Recorder) -> ChunkStream:
    return ChunkStream(cast(Any, to), cast(Any, None), CHUNK)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("seed", range(20))
def test_every_chunk_is_written_once_and_whole(seed: int) -> None:
    rng, to = random.Random(seed), Recorder()
    expected = bytearray()
    with opened(to) as stream:
        for _ in range(rng.randrange(40)):
            data = rng.randbytes(rng.choice([0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, rng.randrange(1000)]))
            align = rng.choice([1, 8, 16])
            expected += bytes(-len(expected) % align)
            assert stream.align(align) == len(expected)
            stream.add(memoryview(data))
            expected += data
        stream.finish()
    assert to.data == expected
    ends = 0
    for offset, length in sorted(to.writes):
        assert offset == ends
        assert offset % CHUNK == 0
        ends = offset + length
        assert length % CHUNK == 0 or ends == len(expected)
    assert ends == len(expected)


@pytest.mark.usefixtures("small_batches")
def test_large_memory_is_written_from_where_it_is() -> None:
    to = Recorder()
    seen: list[Any] = []
    original = to.write_many

    def watch(writes: list[tuple[Any, int, memoryview]]) -> list[int]:
        seen.extend(view.obj for _, _, view in writes)
        return original(writes)

    to.write_many = watch  # type: ignore[method-assign]
    large = bytearray(10 * CHUNK)
    with opened(to) as stream:
        stream.add(memoryview(b"x" * (CHUNK // 2)))
        stream.add(memoryview(large))
        stream.finish()
    # All but the first half chunk and the last one of it.
    assert sum(obj is large for obj in seen) == len(seen) - 2


@pytest.mark.usefixtures("small_batches")
def test_an_error_of_any_write_is_raised() -> None:
    to = Recorder()
    to.failure = OSError(5, "broken")
    with pytest.raises(OSError, match="broken"), opened(to) as stream:
        for _ in range(100):
            stream.add(memoryview(bytes(4 * CHUNK)))
        stream.finish()
