"""Software that reads and writes through fsspec works on a cluster: what one wrote, another or itself reads back."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pytest

from fs3.client.fsspec import Fs3FileSystem
from fs3.testing.cluster import LocalCluster

ROWS = 5000


@pytest.fixture(scope="module")
def options(shared_cluster: LocalCluster) -> Iterator[dict[str, Any]]:
    """Storage options."""
    yield {"token": shared_cluster.token}
    Fs3FileSystem.clear_instance_cache()


@pytest.fixture
def url(shared_cluster: LocalCluster, request: pytest.FixtureRequest) -> str:
    """Where a test works; the directory is not there."""
    return f"{shared_cluster.url}{request.node.name}"


@pytest.fixture(scope="module")
def frame() -> Any:
    rng = np.random.default_rng(3)
    return pd.DataFrame(
        {"number": np.arange(ROWS), "value": rng.random(ROWS), "name": [f"row {n % 97}" for n in range(ROWS)]}
    )


def test_pandas_csv_and_parquet(url: str, options: dict[str, Any], frame: Any) -> None:
    frame.to_csv(f"{url}/f.csv.gz", index=False, storage_options=options)
    pd.testing.assert_frame_equal(pd.read_csv(f"{url}/f.csv.gz", storage_options=options), frame)
    frame.to_parquet(f"{url}/f.parquet", storage_options=options)
    found = pd.read_parquet(f"{url}/f.parquet", columns=["value"], storage_options=options)
    pd.testing.assert_frame_equal(found, frame[["value"]])


def test_pyarrow_datasets(url: str, options: dict[str, Any], frame: Any) -> None:
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.fs

    fs, path = fsspec.url_to_fs(url, **options)
    arrow = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs))
    table = pa.Table.from_pandas(frame)
    pyarrow.dataset.write_dataset(table, path, filesystem=arrow, format="parquet", partitioning=["name"])
    assert len(fs.find(path)) == 97
    read = pyarrow.dataset.dataset(path, filesystem=arrow, format="parquet", partitioning=["name"])
    found = read.to_table(filter=pyarrow.dataset.field("name") == "row 5").to_pandas().sort_values("number")
    assert found["number"].tolist() == list(range(5, ROWS, 97))
    (info,) = arrow.get_file_info([f"{path}/none"])
    assert info.type == pyarrow.fs.FileType.NotFound
    arrow.move(f"{path}/row 5", f"{path}/moved")
    arrow.delete_dir(f"{path}/moved")
    assert len(fs.find(path)) == 96


def test_duckdb_queries_files(url: str, options: dict[str, Any], frame: Any) -> None:
    import duckdb

    fs, _ = fsspec.url_to_fs(url, **options)
    fs.makedirs(url)
    with duckdb.connect() as connection:
        connection.register_filesystem(fs)
        connection.register("frame", frame)
        connection.execute(f"COPY (SELECT * FROM frame WHERE number % 2 = 0) TO '{url}/even.parquet' (FORMAT parquet)")
        connection.execute(f"COPY (SELECT * FROM frame WHERE number % 2 = 1) TO '{url}/odd.parquet' (FORMAT parquet)")
        query = f"SELECT count(*), sum(number) FROM '{url}/*.parquet' WHERE number >= 100"
        assert connection.execute(query).fetchone() == (ROWS - 100, sum(range(100, ROWS)))


def test_dask_frames(url: str, options: dict[str, Any], frame: Any) -> None:
    import dask
    import dask.dataframe as dd

    with ThreadPoolExecutor(4) as pool, dask.config.set(scheduler="threads", pool=pool):
        dd.from_pandas(frame, npartitions=5).to_parquet(f"{url}/frame", storage_options=options)
        found = dd.read_parquet(f"{url}/frame", storage_options=options)
        assert found.npartitions == 5
        assert found["value"].sum().compute() == pytest.approx(frame["value"].sum())
        pd.testing.assert_frame_equal(found.compute().astype(frame.dtypes), frame)


def test_zarr_arrays(url: str, options: dict[str, Any]) -> None:
    import zarr

    store = zarr.storage.FsspecStore.from_url(url, storage_options=options)
    content = np.arange(1000 * 500, dtype=np.int32).reshape(1000, 500)
    group = zarr.create_group(store)
    array = group.create_array("a", shape=content.shape, chunks=(100, 250), dtype=content.dtype)
    array[:] = content
    array.attrs["unit"] = "m"
    reader = zarr.storage.FsspecStore.from_url(url, storage_options=options, read_only=True)
    again = zarr.open_group(reader, mode="r")["a"]
    assert np.array_equal(again[123:456, 7], content[123:456, 7])
    assert np.array_equal(again[:], content)
    assert again.attrs["unit"] == "m"
    del group["a"]
    fs, path = fsspec.url_to_fs(url, **options)
    assert not fs.exists(f"{path}/a")
    # Its threads would last.
    loop = zarr.core.sync.loop[0]
    assert loop is not None
    asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
    zarr.core.sync.cleanup_resources()


def test_huggingface_datasets(
    url: str,
    options: dict[str, Any],
    frame: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    import datasets

    made = datasets.Dataset.from_pandas(frame)
    made.save_to_disk(f"{url}/saved", storage_options=options, num_shards=3)
    again = datasets.load_from_disk(f"{url}/saved", storage_options=options)
    assert again[4321] == made[4321]
    made.to_parquet(f"{url}/f.parquet", storage_options=options)
    # It drops the host of a URL when it looks for files.
    host = url.split("/")[2]
    loaded = datasets.load_dataset(
        "parquet",
        data_files=f"{url}/f.parquet",
        split="train",
        storage_options={**options, "host": host},
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.to_pandas().equals(frame)
