"""Shards of every format give the same samples on a cluster as in a local directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fs3
from fs3.client import FileSystem, transfer
from fs3.data import RecordWriter, TarDataset, open_dataset
from fs3.testing.cluster import LocalCluster
from tests.unit.data.shards import write_ffrecord, write_tar

RECORDS = [bytes([n]) * (n * 1001) for n in range(130)]


@pytest.fixture(scope="module")
def fs(shared_cluster: LocalCluster) -> Iterator[FileSystem]:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as connected:
        yield connected


def make(kind: str, directory: Path) -> None:
    """Two shards."""
    for number, part in enumerate((RECORDS[:70], RECORDS[70:])):
        name = directory / f"{number}.{kind}"
        match kind:
            case "fs3r":
                with RecordWriter(str(name)) as writer:
                    for record in part:
                        writer.write(record, f"key {len(record)}")
            case "ffr":
                write_ffrecord(name, part)
            case "tar":
                write_tar(name, [(f"{len(r)}.{field}", r) for r in part for field in ("bin", "copy")])
            case "parquet":
                pq.write_table(pa.table({"data": part}), name, row_group_size=16)
            case _:
                name.mkdir()
                for record in part:
                    (name / str(len(record))).write_bytes(record)


@pytest.mark.parametrize("kind", ["fs3r", "ffr", "tar", "parquet", "directory"])
def test_a_cluster_gives_what_a_local_directory_gives(
    fs: FileSystem, shared_cluster: LocalCluster, tmp_path: Path, kind: str
) -> None:
    directory = tmp_path / "shards"
    directory.mkdir()
    make(kind, directory)
    transfer.upload(fs, directory, f"/{kind}")
    options = {} if kind == "parquet" else {"format": "bytes"}
    with (
        open_dataset(directory, **options) as local,
        open_dataset(f"{shared_cluster.url}{kind}", token=shared_cluster.token, **options) as remote,
    ):
        assert type(local) is type(remote)
        assert len(local) == len(remote) == len(RECORDS)
        order = [*range(0, 130, 3), *range(129, 0, -2)]
        assert remote.__getitems__(order) == local.__getitems__(order)


def test_an_index_is_left_beside_a_shard_on_the_cluster(fs: FileSystem, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"{n}.bin", bytes([n]) * 100_000) for n in range(20)])
    fs.makedirs("/indexed")
    transfer.upload(fs, tmp_path / "a.tar", "/indexed/a.tar")
    for _ in range(2):
        with TarDataset("/indexed", fs=fs, save_index=True) as dataset:
            assert bytes(dataset[13]["bin"]) == b"\x0d" * 100_000
        assert fs.listdir("/indexed") == ["a.tar", "a.tar.fs3i"]


def test_spans_that_do_not_fit_are_refused(fs: FileSystem) -> None:
    with fs.open("/spans", "w+b", buffering=0) as file:
        file.write(b"0123456789")
        whole = (0, 0, 0, 10, 0, 0, 0)
        for spans in [(1, 0, 0, 4, 0, 0, 0)], [whole, whole], [(0, 0, 7, 4, 0, 0, 0)], [(0, 0, 0, 4, 2, 3, 0)]:
            with pytest.raises(ValueError, match="spans do not fit"):
                fs.client.read_spans([file.native], np.array(spans, np.uint64), bytearray(10))
        memory = bytearray(10)
        assert fs.client.read_spans([file.native], np.array([whole], np.uint64), memory).wait() == [10]
        assert memory == b"0123456789"
