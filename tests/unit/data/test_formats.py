"""Shards of other software's formats are read as they are, and what is wrong with them is named."""

from __future__ import annotations

import os
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fs3.data import FFRecordDataset, FileDataset, ParquetDataset, RecordWriter, TarDataset, open_dataset
from fs3.data.tar import build_index, is_indexed
from tests.unit.data.shards import write_ffrecord, write_tar

RNG = random.Random(4)
RECORDS = [RNG.randbytes(RNG.choice([0, 1, 100, 5000, 100_000])) for _ in range(30)]


# ---- FFRecord


def test_ffrecord_files(tmp_path: Path) -> None:
    write_ffrecord(tmp_path / "a.ffr", RECORDS[:20])
    write_ffrecord(tmp_path / "b.ffr", [])
    write_ffrecord(tmp_path / "c.ffr", RECORDS[20:])
    with FFRecordDataset(tmp_path, format="bytes") as dataset:
        assert list(dataset) == RECORDS
        assert dataset.__getitems__([29, 0, 19, 20]) == [RECORDS[29], RECORDS[0], RECORDS[19], RECORDS[20]]
        with pickle.loads(pickle.dumps(dataset)) as copy:
            assert copy[19] == RECORDS[19]


@pytest.mark.parametrize(
    ("at", "why"),
    [(0, "header is damaged"), (11, "cannot hold"), (14, "header is damaged"), (-1, "record 29 is damaged")],
)
def test_damaged_ffrecord_files_are_refused(tmp_path: Path, at: int, why: str) -> None:
    path = tmp_path / "a.ffr"
    write_ffrecord(path, [*RECORDS[:29], b"last"])
    data = bytearray(path.read_bytes())
    data[at] ^= 0x80
    path.write_bytes(data)
    with pytest.raises(OSError, match=why), FFRecordDataset(path) as dataset:
        dataset[29]
    path.write_bytes(b"short")
    with pytest.raises(OSError, match="no FFRecord file"):
        FFRecordDataset(path)


# ---- tar

LONG = "deep/" * 40 + "name"
MEMBERS = [
    ("./one.jpg", b"J" * 5000),
    ("./one.cls", b"3"),
    ("README", b"no sample"),
    ("__meta__.json", b"no sample either"),
    ("a/two.JPG", b"j" * 513),
    ("a/two.seg.png", b""),
    (f"{LONG}.cls", b"7"),
]
SAMPLES = [
    {"__key__": "one", "jpg": b"J" * 5000, "cls": b"3"},
    {"__key__": "a/two", "jpg": b"j" * 513, "seg.png": b""},
    {"__key__": LONG, "cls": b"7"},
]
OPTIONS: Any = {"format": "bytes", "keys": True}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_shards_of_every_kind(tmp_path: Path, format: int) -> None:
    write_tar(tmp_path / "a.tar", MEMBERS, format)
    write_tar(tmp_path / "b.tar", [])
    write_tar(tmp_path / "c.tar", [("x.txt", b"only")], format)
    with TarDataset(tmp_path, **OPTIONS) as dataset:
        assert list(dataset) == [*SAMPLES, {"__key__": "x", "txt": b"only"}]
        assert dataset.key(1) == "a/two"
        with pickle.loads(pickle.dumps(dataset)) as copy:
            assert list(copy) == list(dataset)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "b.tar", "c.tar"]


def test_an_index_beside_a_shard_is_used_while_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, MEMBERS)
    with TarDataset(path, save_index=True, **OPTIONS) as dataset:
        assert list(dataset) == SAMPLES
        assert is_indexed(dataset.store, str(path))
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.fs3i"]
    with monkeypatch.context() as patched:
        patched.setattr("fs3.data.tar._scan_shard", lambda *_: pytest.fail("it was scanned"))
        with TarDataset(path, **OPTIONS) as dataset:
            assert list(dataset) == SAMPLES
            with pickle.loads(pickle.dumps(dataset)) as copy:
                assert list(copy) == SAMPLES
    write_tar(path, [("x.txt", b"other")])
    with TarDataset(path, **OPTIONS) as dataset:
        assert list(dataset) == [{"__key__": "x", "txt": b"other"}]
        assert not is_indexed(dataset.store, str(path))
        assert len(build_index(dataset.store, str(path))) == 1
        assert is_indexed(dataset.store, str(path))


def test_tar_files_that_are_no_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(__file__, "x.py")
    with pytest.raises(OSError, match="no tar file without compression"):
        TarDataset(path)
    write_tar(path, [("x.a", b"1"), ("x.a", b"2")])
    with pytest.raises(OSError, match=r"two members x\.a"):
        TarDataset(path)
    write_tar(path, [("x.a", b"1"), ("x.b", b"2" * 2000)])
    os.truncate(path, 2000)
    with pytest.raises(OSError, match="unexpected end of data"):
        TarDataset(path)
    write_tar(path, [(f"x.{n}", b"") for n in range(300)])
    with pytest.raises(OSError, match="more than 256 different"):
        TarDataset(path)


# ---- files of a directory


def test_files_of_a_tree(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "cat/2.JPG", "dog/1.jpg", "dog/notes.txt", "a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode() * 1000)
    (tmp_path / "dog" / "link.jpg").symlink_to("1.jpg")
    names = ["a.jpg", "cat/1.jpg", "cat/2.JPG", "dog/1.jpg", "dog/link.jpg"]
    with FileDataset(tmp_path, suffixes=[".jpg"], format="bytes") as dataset:
        assert [dataset.key(n) for n in range(len(dataset))] == names
        assert dataset.__getitems__([3, 1, 1])[0] == b"dog/1.jpg" * 1000
        assert [len(sample) for sample in dataset] == [5000, 9000, 9000, 9000, 9000]
    with FileDataset([tmp_path / "dog", tmp_path / "a.jpg"], keys=True, format="bytes") as dataset:
        assert [sample["__key__"] for sample in dataset] == ["1.jpg", "link.jpg", "notes.txt", "a.jpg"]
        assert dataset[3]["data"] == b"a.jpg" * 1000
        os.truncate(tmp_path / "a.jpg", 10)
        with pytest.raises(OSError, match=r"ends before byte 5000.*a\.jpg"):
            dataset[3]
    with pytest.raises(FileNotFoundError, match="none"):
        FileDataset(tmp_path / "none")


# ---- Parquet


@pytest.fixture
def table(tmp_path: Path) -> pa.Table:
    made = pa.table(
        {
            "id": np.arange(1000),
            "image": [RNG.randbytes(200) for _ in range(1000)],
            "point": [{"x": n, "tags": [str(n)] * (n % 3)} for n in range(1000)],
            "label": [f"class {n % 7}" if n % 5 else None for n in range(1000)],
        }
    )
    pq.write_table(made.slice(0, 640), tmp_path / "a.parquet", row_group_size=100)
    pq.write_table(made.slice(640), tmp_path / "b.parquet", row_group_size=64, use_dictionary=False, compression="zstd")
    return made


@pytest.mark.parametrize("columns", [None, ["id"], ["label", "point"]])
def test_rows_of_parquet_files(tmp_path: Path, table: pa.Table, columns: list[str] | None) -> None:
    expected = (table if columns is None else table.select(columns)).to_pylist()
    with ParquetDataset(tmp_path, columns=columns) as dataset:
        assert len(dataset) == 1000
        wanted = [*RNG.sample(range(1000), 50), 0, 639, 640, -1]
        assert dataset.__getitems__(wanted) == [expected[n] for n in wanted]
        with pickle.loads(pickle.dumps(dataset)) as copy:
            assert [row["id" if columns is None else columns[0]] for row in copy] == [
                row["id" if columns is None else columns[0]] for row in expected
            ]


def test_row_groups_of_parquet_files(tmp_path: Path, table: pa.Table) -> None:
    with ParquetDataset(tmp_path, unit="row_group", decode=lambda group: group["id"].to_pylist()) as dataset:
        assert len(dataset) == 7 + 6
        assert dataset[6] == list(range(600, 640))
        assert dataset.__getitems__([12, 0, 12]) == [list(range(960, 1000)), list(range(100)), list(range(960, 1000))]


def test_only_the_bytes_of_the_columns_are_read(tmp_path: Path, table: pa.Table) -> None:
    with ParquetDataset(tmp_path, unit="row_group", columns=["id"]) as dataset:
        asked: list[int] = []
        read = dataset.store.read
        dataset.store.read = lambda ranges: (asked.extend(len(m) for _, _, m in ranges), read(ranges))[1]  # type: ignore[method-assign]
        assert dataset[0].column_names == ["id"]
        assert len(asked) == 1
        assert sum(asked) < 2000


def test_names_of_columns_may_have_dots(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a.b": [1], "a": [2], "ab": [3]}), tmp_path / "a.parquet")
    with ParquetDataset(tmp_path, columns=["a.b"]) as dataset:
        assert dataset[0] == {"a.b": 1}


def test_long_footers_are_read_whole(tmp_path: Path) -> None:
    wide = pa.table({f"column {n}": [n] for n in range(1500)})
    pq.write_table(wide, tmp_path / "a.parquet")
    with ParquetDataset(tmp_path) as dataset:
        assert dataset[0]["column 1499"] == 1499


def test_wrong_parquet_files_are_refused(tmp_path: Path, table: pa.Table) -> None:
    with pytest.raises(OSError, match="no column 'price'"):
        ParquetDataset(tmp_path, columns=["id", "price"])
    with pytest.raises(OSError, match="none of row, row_group"):
        ParquetDataset(tmp_path, unit="page")
    os.truncate(tmp_path / "a.parquet", 1000)
    with pytest.raises(OSError, match="no Parquet file"):
        ParquetDataset(tmp_path)


# ---- any


def test_the_format_follows_from_the_names(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", MEMBERS)
    write_ffrecord(tmp_path / "a.ffr", RECORDS)
    with RecordWriter(str(tmp_path / "b.fs3r")) as writer:
        writer.write(b"x")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x").touch()
    for name, kind, count in [
        ("tars", "TarDataset", 3),
        ("tars/*.tar", "TarDataset", 3),
        ("a.ffr", "FFRecordDataset", 30),
        ("b.fs3r", "RecordDataset", 1),
        ("plain", "FileDataset", 1),
    ]:
        with open_dataset(tmp_path / name) as dataset:
            assert (type(dataset).__name__, len(dataset)) == (kind, count)
    with pytest.raises(OSError, match="give a pattern"):
        open_dataset(tmp_path)
    with pytest.raises(OSError, match="no shard: its name should end in"):
        open_dataset(tmp_path / "plain" / "x")
