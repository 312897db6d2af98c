"""Record files on a local directory: what was written is read back, and what is damaged is never taken for it."""

from __future__ import annotations

import os
import pickle
import random
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fs3 import native
from fs3.data import RecordDataset, RecordWriter
from fs3.data.index import HEADER_BYTES
from fs3.data.records import ALIGNED_BYTES

SIZES = [0, 1, 7, 8, 4095, 4096, 4097, 40_000, 100 << 10, 300_000]


def records(seed: int, count: int = 40) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(rng.choice(SIZES)) for _ in range(count)]


def write(path: Path, content: list[bytes], **options: Any) -> None:
    with RecordWriter(str(path), **options) as writer:
        for number, record in enumerate(content):
            assert writer.write(record) == number


@pytest.fixture
def shards(tmp_path: Path) -> list[bytes]:
    """Records in three files below tmp_path, one of them empty."""
    content = [records(1), [], records(2, 7)]
    for number, part in enumerate(content):
        write(tmp_path / f"part-{number}.fs3r", part)
    (tmp_path / "notes.txt").write_text("no shard")
    return [*content[0], *content[2]]


def test_every_record_is_read_back_by_number(tmp_path: Path, shards: list[bytes]) -> None:
    with RecordDataset(tmp_path) as dataset:
        assert len(dataset) == len(shards)
        assert [bytes(sample) for sample in dataset] == shards
        assert bytes(dataset[-1]) == shards[-1]
        wanted = [5, 46, 5, 0, -2, 39, 40]
        assert [bytes(sample) for sample in dataset.__getitems__(wanted)] == [shards[n] for n in wanted]
        assert dataset.__getitems__([]) == []
        with pytest.raises(IndexError, match="sample 47 of 47"):
            dataset.__getitems__([3, 47])
        with pytest.raises(IndexError, match="sample -48 of 47"):
            dataset[-48]


def test_shards_are_named_by_pattern_or_one_by_one(tmp_path: Path, shards: list[bytes]) -> None:
    with RecordDataset(f"{tmp_path}/part-[12].fs3r") as dataset:
        assert [bytes(sample) for sample in dataset] == shards[40:]
    with RecordDataset([tmp_path / "part-2.fs3r", tmp_path / "part-0.fs3r"]) as dataset:
        assert [bytes(sample) for sample in dataset] == shards[40:] + shards[:40]
    with pytest.raises(FileNotFoundError, match="nothing matches"):
        RecordDataset(f"{tmp_path}/other-*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no shard \(\.fs3r\)"):
        RecordDataset(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        RecordDataset(tmp_path / "none.fs3r")
    with pytest.raises(OSError, match="no record file"):
        RecordDataset(tmp_path / "notes.txt")
    with pytest.raises(OSError, match="no path"):
        RecordDataset([])


def test_large_records_begin_at_blocks(tmp_path: Path) -> None:
    content = [bytes([n]) * (ALIGNED_BYTES + n) for n in range(5)]
    write(tmp_path / "a.fs3r", content)
    with RecordDataset(tmp_path) as dataset:
        assert (dataset.index(0).starts % 4096 == 0).all()


def test_samples_are_what_was_asked_for(tmp_path: Path, shards: list[bytes]) -> None:
    import torch

    kinds = {"numpy": np.ndarray, "torch": torch.Tensor, "bytes": bytes, "memoryview": memoryview}
    for name, kind in kinds.items():
        with RecordDataset(tmp_path, format=name) as dataset:
            sample = dataset[3]
            assert isinstance(sample, kind)
            assert bytes(sample.numpy() if name == "torch" else sample) == shards[3]
    with RecordDataset(tmp_path, decode=len) as dataset:
        assert dataset.__getitems__([1, 2]) == [len(shards[1]), len(shards[2])]
    with pytest.raises(OSError, match="'pandas' is none of"):
        RecordDataset(tmp_path, format="pandas")
    # Without a device of CUDA the memory is ordinary.
    with RecordDataset(tmp_path, format="torch", pin_memory=True) as dataset:
        assert bytes(dataset[3].numpy()) == shards[3]
        assert dataset[3].is_pinned() == torch.cuda.is_available()


def test_a_batch_has_memory_of_its_own_unless_it_is_reused(tmp_path: Path, shards: list[bytes]) -> None:
    with RecordDataset(tmp_path) as dataset:
        kept = [dataset.__getitems__([n, n + 1]) for n in range(40)]
        assert all(bytes(sample) == shards[n + i] for n, batch in enumerate(kept) for i, sample in enumerate(batch))
    with RecordDataset(tmp_path, reuse=True) as dataset:
        number = next(n for n, record in enumerate(shards) if len(record) == 300_000)
        first = dataset.__getitems__([number, 1])
        assert [bytes(sample) for sample in first] == [shards[number], shards[1]]
        second = dataset.__getitems__([2])
        assert second[0].base is first[0].base
        # Another thread has a buffer of its own.
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(dataset.__getitems__, [number, 1]).result()
        assert bytes(second[0]) == shards[2]
        assert other[0].base is not second[0].base


def test_records_of_one_size_are_one_array_without_a_copy(tmp_path: Path) -> None:
    content = np.arange(20 * 10_000, dtype=np.float32).reshape(20, 10_000)
    write(tmp_path / "a.fs3r", list(content))
    with RecordDataset(tmp_path) as dataset:
        batch = dataset.__getitems__([7, 0, 19])
        found = batch.array(np.float32)
        assert np.array_equal(found, content[[7, 0, 19]])
        assert np.shares_memory(found, batch[0])
        assert np.array_equal(dataset.__getitems__([4]).array(np.float32, (100, 100)), content[4].reshape(1, 100, 100))
        with pytest.raises(ValueError, match="40000 bytes do not hold whole items of 12 bytes"):
            batch.array(np.dtype("u4,u8"))
    small = [bytes([n]) * 12 for n in range(100)]
    write(tmp_path / "b.fs3r", small)
    with RecordDataset(tmp_path / "b.fs3r") as dataset:
        assert dataset.__getitems__([99, 3]).array(np.uint32).tolist() == [[99 * 0x01010101] * 3, [3 * 0x01010101] * 3]
    write(tmp_path / "c.fs3r", [b"1", b"22"])
    with RecordDataset(tmp_path / "c.fs3r") as dataset:
        with pytest.raises(ValueError, match="differ in size"):
            dataset.__getitems__([0, 1]).array()
        with pytest.raises(ValueError, match="empty batch"):
            dataset.__getitems__([]).array()


def test_records_of_several_fields_are_dictionaries(tmp_path: Path) -> None:
    with RecordWriter(str(tmp_path / "a.fs3r"), fields=["jpg", "json"], metadata={"classes": ["cat"]}) as writer:
        writer.write({"jpg": b"picture" * 9000, "json": b"{}"}, key="one")
        writer.write({"json": b"", "jpg": np.arange(3)}, key="zwei/ü")
        writer.write({"json": b"[1]"}, key="")
        with pytest.raises(ValueError, match="no field 'png'"):
            writer.write({"png": b""}, key="x")
        with pytest.raises(TypeError, match="dictionary of"):
            writer.write(b"bare", key="x")
        with pytest.raises(ValueError, match="either all records have a key"):
            writer.write({"json": b""})
    with RecordDataset(tmp_path, format="bytes", keys=True) as dataset:
        assert dataset.__getitems__([0, 1, 2]) == [
            {"__key__": "one", "jpg": b"picture" * 9000, "json": b"{}"},
            {"__key__": "zwei/ü", "jpg": np.arange(3).tobytes(), "json": b""},
            {"__key__": "", "json": b"[1]"},
        ]
        assert dataset.key(1) == "zwei/ü"
        assert dataset.metadata() == {"classes": ["cat"]}


def test_keys_are_asked_of_files_that_have_them(tmp_path: Path) -> None:
    write(tmp_path / "a.fs3r", [b"x"])
    with RecordDataset(tmp_path, keys=True) as dataset, pytest.raises(LookupError, match="without keys"):
        dataset[0]


def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path) -> None:
    write(tmp_path / "a.fs3r", [b"before"])

    def fail() -> None:
        with RecordWriter(str(tmp_path / "a.fs3r")) as writer:
            writer.write(b"x" * (20 << 20))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        fail()
    assert os.listdir(tmp_path) == ["a.fs3r"]
    with RecordDataset(tmp_path) as dataset:
        assert bytes(dataset[0]) == b"before"
    with pytest.raises(FileNotFoundError):
        RecordWriter(str(tmp_path / "none" / "a.fs3r"))


def test_damage_is_named_by_file_and_record(tmp_path: Path) -> None:
    path = tmp_path / "a.fs3r"
    write(path, [bytes([n]) * 5000 for n in range(9)])
    with RecordDataset(path) as dataset:
        start = int(dataset.index(0).starts[6])
    with path.open("r+b") as file:
        file.seek(start + 77)
        file.write(b"\xff")
    with RecordDataset(path) as dataset:
        assert bytes(dataset[5]) == b"\5" * 5000
        with pytest.raises(OSError, match=r"record 6 is damaged.*a\.fs3r"):
            dataset.__getitems__([5, 6])
    with RecordDataset(path, verify=False) as dataset:
        assert bytes(dataset[6])[77] == 0xFF


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("magic", "no record file"),
        ("header", "header is damaged"),
        ("index", "index is damaged"),
        ("cut", "ends before"),
    ],
)
def test_damaged_headers_and_indexes_are_refused(tmp_path: Path, where: str, why: str) -> None:
    path = tmp_path / "a.fs3r"
    write(path, records(3))
    size = path.stat().st_size
    places = {"magic": 0, "header": 20, "index": size - 3}
    if where == "cut":
        os.truncate(path, size - 1)
    else:
        data = bytearray(path.read_bytes())
        data[places[where]] ^= 1
        path.write_bytes(data)

    def read() -> None:
        with RecordDataset(path) as dataset:
            dataset[0]

    with pytest.raises(OSError, match=why) as caught:
        read()
    assert caught.value.filename == str(path)


def test_a_later_version_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.fs3r"
    write(path, [b"x"])
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, 8, 2)
    struct.pack_into("<I", data, HEADER_BYTES - 4, native.crc32c(bytes(data[: HEADER_BYTES - 4])))
    path.write_bytes(data)
    with pytest.raises(OSError, match="version 2 of the format"):
        RecordDataset(path)


def test_the_format_is_what_its_specification_says(tmp_path: Path) -> None:
    # Read by the words of docs/data.md alone.
    write(tmp_path / "a.fs3r", [b"one", b"three"], metadata={"a": 1})
    data = (tmp_path / "a.fs3r").read_bytes()
    magic, version, flags, fields, count, at, size, keys, meta, crc, zero, own = struct.unpack(
        "<8sHHIQQQQIIII", data[:64]
    )
    assert (magic, version, flags, fields, count, keys, zero) == (b"fs3rec\r\n", 1, 0, 1, 2, 0, 0)
    assert own == native.crc32c(data[:60])
    block = data[at : at + size]
    assert len(data) == at + size
    assert native.crc32c(block) == crc
    starts, lengths = struct.unpack_from("<2Q", block), struct.unpack_from("<2I", block, 16)
    assert [data[s : s + n] for s, n in zip(starts, lengths, strict=True)] == [b"one", b"three"]
    assert struct.unpack_from("<2I", block, 24) == (native.crc32c(b"one"), native.crc32c(b"three"))
    assert block[32:] == b'{"fields":["data"],"keys":false,"user":{"a":1}}'
    assert len(block) - 32 == meta


def test_a_pickled_dataset_reads_the_same(tmp_path: Path, shards: list[bytes]) -> None:
    with RecordDataset(tmp_path, reuse=True) as dataset:
        dataset.load_indexes()
        packed = pickle.dumps(dataset)
        # Indexes are read again where it is loaded.
        assert len(packed) < 4000
        with pickle.loads(packed) as copy:
            assert [bytes(sample) for sample in copy] == shards


def test_a_forked_child_reads_while_its_parent_reads(tmp_path: Path, shards: list[bytes]) -> None:
    with RecordDataset(tmp_path) as dataset:
        assert bytes(dataset[0]) == shards[0]
        child = os.fork()
        if child == 0:
            os._exit(0 if [bytes(sample) for sample in dataset] == shards else 1)
        assert [bytes(sample) for sample in dataset] == shards
        assert os.waitpid(child, 0)[1] == 0
