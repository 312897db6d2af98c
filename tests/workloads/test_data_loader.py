"""Datasets on a cluster feed PyTorch's DataLoader, in this process and in forked and spawned workers."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fs3
from fs3.client import FileSystem
from fs3.data import RecordDataset, RecordWriter, StatefulDistributedSampler
from fs3.data.store import ClusterStore
from fs3.testing.cluster import LocalCluster

SAMPLES, SHARDS = 300, 3
FLOATS = 2000


@pytest.fixture(scope="module")
def fs(shared_cluster: LocalCluster) -> Iterator[FileSystem]:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as connected:
        yield connected


@pytest.fixture
def spawning() -> Iterator[None]:
    """Spawned workers bring a tracker of shared memory with them, which would stay until this process ends."""
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def numbers(fs: FileSystem) -> np.ndarray[Any, Any]:
    """The samples of the shards in /numbers."""
    made = np.random.default_rng(5).random((SAMPLES, FLOATS), np.float32)
    made[:, 0] = np.arange(SAMPLES)
    fs.makedirs("/numbers")
    for shard, part in enumerate(np.split(made, SHARDS)):
        with RecordWriter(f"/numbers/{shard}.fs3r", fs=fs) as writer:
            for record in part:
                writer.write(record)
    return made


def as_floats(sample: torch.Tensor) -> torch.Tensor:
    return sample.view(torch.float32)


def loader(fs: FileSystem, **options: Any) -> tuple[RecordDataset, DataLoader[Any]]:
    dataset = RecordDataset("/numbers", fs=fs, format="torch", decode=as_floats, reuse=True)
    return dataset, DataLoader(dataset, batch_size=32, **options)


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_every_worker_reads_its_batches(
    fs: FileSystem, numbers: np.ndarray[Any, Any], start: str | None, spawning: None
) -> None:
    dataset, batches = loader(
        fs,
        sampler=StatefulDistributedSampler(SAMPLES, 2, 1, seed=4),
        num_workers={None: 0, "fork": 2, "spawn": 1}[start],
        multiprocessing_context=start,
    )
    expected = list(StatefulDistributedSampler(SAMPLES, 2, 1, seed=4))
    # Files are open in this process when it forks.
    assert dataset[0][0] == 0
    read = torch.cat(list(batches)).numpy()
    assert read[:, 0].astype(int).tolist() == expected
    assert np.array_equal(read, numbers[expected])
    assert np.array_equal(dataset[7].numpy(), numbers[7])


def test_a_dataset_by_url_connects_in_each_worker(shared_cluster: LocalCluster, numbers: np.ndarray[Any, Any]) -> None:
    with RecordDataset(f"{shared_cluster.url}numbers/*.fs3r", token=shared_cluster.token) as dataset:
        batches = DataLoader(dataset, batch_size=100, num_workers=2, multiprocessing_context="fork")
        read = torch.cat(list(batches)).numpy().view(np.float32)
    assert np.array_equal(read, numbers)


def test_an_epoch_that_workers_have_read_ahead_of_is_resumed_where_it_was_used(
    fs: FileSystem, numbers: np.ndarray[Any, Any]
) -> None:
    sampler = StatefulDistributedSampler(SAMPLES, seed=8)
    _, batches = loader(fs, sampler=sampler, num_workers=2, prefetch_factor=2)
    iterator = iter(batches)
    used = [next(iterator) for _ in range(3)]
    state = sampler.state_dict(3 * 32)
    del iterator
    again = StatefulDistributedSampler(SAMPLES)
    again.load_state_dict(state)
    _, batches = loader(fs, sampler=again)
    read = torch.cat([*used, *batches])[:, 0].int().tolist()
    assert read == list(StatefulDistributedSampler(SAMPLES, seed=8))


def test_samples_of_a_batch_are_the_memory_that_was_read_into(fs: FileSystem, numbers: np.ndarray[Any, Any]) -> None:
    with RecordDataset("/numbers", fs=fs, format="torch") as dataset:
        batch = dataset.__getitems__(list(range(0, 300, 7)))
        assert len({sample.untyped_storage().data_ptr() for sample in batch}) == len(batch)
        assert np.shares_memory(batch[0].numpy(), batch[5].numpy()) is False
        assert np.array_equal(torch.stack(batch).view(torch.float32).numpy(), numbers[::7])
        large = batch.array(np.float32)
        assert np.array_equal(large, numbers[::7])


def test_threads_share_a_dataset(fs: FileSystem, numbers: np.ndarray[Any, Any]) -> None:
    with RecordDataset("/numbers", fs=fs, reuse=True) as dataset:

        def work(seed: int) -> bool:
            rng = random.Random(seed)
            for _ in range(10):
                wanted = rng.choices(range(SAMPLES), k=40)
                batch = dataset.__getitems__(wanted)
                if not np.array_equal(np.stack(batch).view(np.float32), numbers[wanted]):
                    return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(8)))


def test_a_shard_that_was_replaced_is_noticed(fs: FileSystem) -> None:
    fs.makedirs("/replaced", exist_ok=True)
    for content in ([b"one", b"two"], [b"three"]):
        with RecordWriter("/replaced/a.fs3r", fs=fs) as writer:
            for record in content:
                writer.write(record)
        if len(content) == 2:
            old = RecordDataset("/replaced/a.fs3r", fs=fs)
    with RecordDataset("/replaced/a.fs3r", fs=fs) as new:
        assert [bytes(sample) for sample in new] == [b"three"]
    # It goes on with the file that it has open, or says that it is gone; it never mixes the two.
    found: Any
    try:
        found = [bytes(sample) for sample in old]
    except OSError as e:
        found = e.filename
    assert found in ([b"one", b"two"], "/replaced/a.fs3r")


def test_few_files_stay_open_however_many_a_batch_reads(fs: FileSystem) -> None:
    fs.makedirs("/many")
    for number in range(7):
        with fs.open(f"/many/{number}", "wb") as file:
            file.write(bytes([number]) * 10)
    store = ClusterStore(fs, open_files_max=2)
    for _ in range(2):
        views = [memoryview(bytearray(10)) for _ in range(7)]
        assert store.read([(f"/many/{n}", 0, view) for n, view in enumerate(views)]) == [10] * 7
        assert [view[9] for view in views] == list(range(7))
        assert len(store._handles) == 2
    with pytest.raises(FileNotFoundError, match="/many/none"):
        store.read([("/many/none", 0, memoryview(bytearray(1)))])
    store.close()


def test_the_benchmark_runs(fs: FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    dataloader = importlib.import_module("dataloader")
    samples, large = dataloader.figures(fs, 30 << 20, turns=1, warming=0, pids=[], say=lambda _: None)
    assert samples.bytes == 256 * dataloader.SAMPLE_BYTES
    assert large.bytes == 30 << 20
    assert samples.mb_per_s > 0
    assert not fs.exists("/samples")
