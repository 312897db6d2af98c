"""Checkpoints of one process: what is saved comes back, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import posixpath
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fs3
from fs3 import checkpoint
from fs3.checkpoint import catalog, manifest
from fs3.client import FileSystem
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import LocalCluster
from tests.cluster.command import fs3_command

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

MIB = 1 << 20


@pytest.fixture(scope="module")
def fs(shared_cluster: LocalCluster) -> Iterator[FileSystem]:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as connected:
        yield connected


@pytest.fixture
def home(fs: FileSystem) -> Iterator[str]:
    """A directory of a test's own."""
    path = f"/ckpt-{uuid.uuid4().hex[:8]}"
    fs.makedirs(path)
    yield path
    fs.rmtree(path)


def state(seed: int = 0) -> dict[str, Any]:
    """Tensors of every kind that matters: long, short, empty, scalar, with gaps, of many types; and other things."""
    make = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(1100, 1000, generator=make),
        "larger": torch.randn(3 * MIB // 8 + 7, generator=make, dtype=torch.float64),
        "gaps": torch.randn(300, 400, generator=make)[:, 1:399:2],
        "turned": torch.randn(64, 48, generator=make).t(),
        "half": torch.randn(31, generator=make).to(torch.bfloat16),
        "tiny": torch.randn(5, generator=make).to(torch.float8_e4m3fn),
        "complex": torch.randn(6, generator=make, dtype=torch.complex64).conj(),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "optimizer": {"step": torch.tensor(seed), "groups": [{"lr": 0.1 * seed}], "name": "adam"},
    } | {f"small.{i}": torch.randn(i + 1, generator=make) for i in range(200)}


def blank(saved: Any) -> Any:
    """The same structure with nothing in it."""
    if isinstance(saved, torch.Tensor):
        return torch.zeros(saved.shape, dtype=saved.dtype)
    if isinstance(saved, dict):
        return {name: blank(value) for name, value in saved.items()}
    return [blank(value) for value in saved] if isinstance(saved, list) else None


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one.to(torch.complex128), other.to(torch.complex128))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def names(fs: FileSystem, home: str) -> list[str]:
    return [found.name for found in checkpoint.list_checkpoints(fs, home)]


def test_everything_that_was_saved_comes_back(fs: FileSystem, home: str) -> None:
    saved = state(3)
    checkpoint.save(saved, fs, f"{home}/step-1")
    loaded = blank(saved)
    checkpoint.load(loaded, fs, f"{home}/step-1")
    assert same(loaded, saved)
    assert checkpoint.latest(fs, home) == f"{home}/step-1"
    assert checkpoint.verify(fs, f"{home}/step-1").whole


def test_a_model_and_its_optimizer_go_on_where_they_were(fs: FileSystem, home: str) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = model(torch.ones(4, 20)).pow(2).mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    model, optimizer = made()
    step(model, optimizer)
    checkpoint.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, fs, f"{home}/a")
    losses = [step(model, optimizer) for _ in range(3)]
    model, optimizer = made()
    step(model, optimizer)
    found = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.load(found, fs, f"{home}/a")
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    assert [step(model, optimizer) for _ in range(3)] == losses


def test_a_part_of_a_checkpoint_is_loaded_alone_and_into_other_types(fs: FileSystem, home: str) -> None:
    saved = state(1)
    checkpoint.save(saved, fs, f"{home}/a")
    turned = torch.zeros(1000, 1100).t()
    found = {"large": turned, "gaps": torch.zeros(300, 199, dtype=torch.float64), "small.7": torch.zeros(8)}
    checkpoint.load(found, fs, f"{home}/a")
    assert torch.equal(turned, saved["large"])
    assert torch.equal(found["gaps"], saved["gaps"].double())
    assert torch.equal(found["small.7"], saved["small.7"])


def test_a_tensor_of_another_shape_is_refused(fs: FileSystem, home: str) -> None:
    checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/a")
    with pytest.raises(dcp.CheckpointException, match="Size mismatch"):
        checkpoint.load({"x": torch.zeros(5)}, fs, f"{home}/a")


def test_a_checkpoint_that_is_not_there_is_said_to_be_missing(fs: FileSystem, home: str) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        checkpoint.load({"x": torch.zeros(4)}, fs, f"{home}/none")
    assert raised.value.filename == f"{home}/none"
    assert checkpoint.latest(fs, home) is None
    assert checkpoint.latest(fs, f"{home}/none") is None


def test_saving_again_replaces_the_checkpoint_in_one_step(fs: FileSystem, home: str) -> None:
    checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/a")
    checkpoint.save({"x": torch.ones(4)}, fs, f"{home}/a")
    found = {"x": torch.empty(4)}
    checkpoint.load(found, fs, f"{home}/a")
    assert found["x"].tolist() == [1.0] * 4
    assert fs.listdir(home) == ["a"]


def test_overwrite_can_be_refused(fs: FileSystem, home: str) -> None:
    checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/a")
    with pytest.raises(dcp.CheckpointException, match="overwrite=False"):
        checkpoint.save({"x": torch.ones(4)}, fs, f"{home}/a", overwrite=False)
    found = {"x": torch.empty(4)}
    checkpoint.load(found, fs, f"{home}/a")
    assert found["x"].tolist() == [0.0] * 4
    assert fs.listdir(home) == ["a"]


def test_what_is_no_checkpoint_is_never_replaced(fs: FileSystem, home: str) -> None:
    fs.makedirs(f"{home}/notes")
    for path in (f"{home}/notes/text", f"{home}/file"):
        with fs.open(path, "w") as file:
            file.write("precious")
    for name in ("notes", "file"):
        with pytest.raises(dcp.CheckpointException, match="is no checkpoint"):
            checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/{name}")
    assert fs.listdir(home) == ["file", "notes"]
    assert fs.listdir(f"{home}/notes") == ["text"]
    # An empty directory is taken.
    fs.makedirs(f"{home}/empty")
    checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/empty")
    assert names(fs, home) == ["empty"]


def test_the_newest_checkpoints_are_kept_and_nothing_else_is_touched(fs: FileSystem, home: str) -> None:
    fs.makedirs(f"{home}/notes")
    with fs.open(f"{home}/a-file", "w") as file:
        file.write("not a checkpoint")
    for step in (1, 2, 10, 3):
        checkpoint.save({"x": torch.full((4,), float(step))}, fs, f"{home}/step-{step}", keep_last=2)
    # The newest is the one that was saved last, whatever its name.
    assert names(fs, home) == ["step-10", "step-3"]
    assert fs.listdir(home) == ["a-file", "notes", "step-10", "step-3"]
    for keep in (0, -1):
        with pytest.raises(Fs3Error, match="at least 1"):
            checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/step-4", keep_last=keep)
    assert checkpoint.retain(fs, home, 1) == [f"{home}/step-10"]


class Stop(Exception):
    """What a save fails with in a test."""


class Failing(dcp.DefaultSavePlanner):
    """A planner that cannot give the last of the data."""

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "large":
            raise Stop("no data")
        return super().resolve_data(write_item)


def test_a_save_that_fails_leaves_nothing_and_what_was_there(fs: FileSystem, home: str) -> None:
    checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/a")
    with pytest.raises(dcp.CheckpointException, match="no data"):
        checkpoint.save(state(), fs, f"{home}/a", planner=Failing())
    assert fs.listdir(home) == ["a"]
    assert checkpoint.verify(fs, f"{home}/a").whole


def test_asynchronous_saves_take_what_was_there_when_they_began(fs: FileSystem, home: str) -> None:
    saved = state(5)
    expected = saved["large"].clone()
    future = checkpoint.async_save(saved, fs, f"{home}/a")
    saved["large"].zero_()
    future.result()
    found = {"large": torch.empty_like(expected)}
    checkpoint.load(found, fs, f"{home}/a")
    assert torch.equal(found["large"], expected)


def test_writers_and_readers_work_with_the_functions_of_dcp_and_urls(
    shared_cluster: LocalCluster, fs: FileSystem, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_TOKEN", shared_cluster.token)
    saved = {"x": torch.arange(10)}
    url = f"{shared_cluster.url.rstrip('/')}{home}/a"
    dcp.save(saved, storage_writer=checkpoint.Fs3Writer(url))
    found = {"x": torch.zeros(10, dtype=torch.int64)}
    dcp.load(found, storage_reader=checkpoint.Fs3Reader(url))
    assert torch.equal(found["x"], saved["x"])
    dcp.save(saved, checkpoint_id=f"{home}/b", storage_writer=checkpoint.Fs3Writer(f"{home}/a", fs))
    assert names(fs, home) == ["a", "b"]
    with pytest.raises(Fs3Error, match=r"fs=fs3\.connect"):
        checkpoint.Fs3Writer(f"{home}/a")
    with pytest.raises(Fs3Error, match="no name for a checkpoint"):
        checkpoint.Fs3Writer("/", fs)


def test_what_cannot_work_is_refused_with_the_reason(fs: FileSystem, home: str) -> None:
    saved = {"x": torch.zeros(4)}
    with pytest.raises((ValueError, dcp.CheckpointException), match="use_collectives"):
        dcp.save(saved, storage_writer=checkpoint.Fs3Writer(f"{home}/a", fs), use_collectives=False)
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    checkpoint.save(saved, fs, f"{home}/a", planner=planner)
    with pytest.raises(dcp.CheckpointException, match="enable_plan_caching"):
        checkpoint.save(saved, fs, f"{home}/b", planner=planner)
    assert fs.listdir(home) == ["a"]


def test_checkpoints_of_dcps_own_writer_are_read(fs: FileSystem, home: str, tmp_path: Path) -> None:
    from fs3.client.transfer import upload

    saved = state(2)
    with warnings.catch_warnings(action="ignore"):
        dcp.save(saved, checkpoint_id=str(tmp_path / "stock"))
    upload(fs, tmp_path / "stock", f"{home}/stock")
    loaded = blank(saved)
    checkpoint.load(loaded, fs, f"{home}/stock")
    assert same(loaded, saved)
    assert names(fs, home) == [], "it has no checksums of fs3.checkpoint"


# ---- verification


def data_file(path: str) -> str:
    return posixpath.join(path, "__0_0.distcp")


def test_verification_finds_what_was_changed_and_names_it(fs: FileSystem, home: str) -> None:
    path = f"{home}/a"
    checkpoint.save({"first": torch.zeros(4), "second": torch.ones(5 * MIB)}, fs, path)
    read: list[int] = []
    found = checkpoint.verify(fs, path, read.append)
    assert (found.whole, found.items, found.bytes) == (True, 2, 16 + 20 * MIB)
    assert sum(read) == found.bytes
    with fs.open(data_file(path), "r+b", buffering=0) as file:
        file.pwrite(b"\1", 17 * MIB + 3)
    found = checkpoint.verify(fs, path)
    assert len(found.problems) == 1
    assert "second is not what was saved" in found.problems[0]
    fs.truncate(data_file(path), 64)
    assert all("second is cut off" in problem for problem in checkpoint.verify(fs, path).problems)
    fs.remove(data_file(path))
    assert not checkpoint.verify(fs, path).whole


@pytest.mark.parametrize("name", [manifest.METADATA, manifest.CHECKSUMS])
def test_verification_finds_metadata_that_was_changed(fs: FileSystem, home: str, name: str) -> None:
    path = f"{home}/a"
    checkpoint.save({"x": torch.zeros(4)}, fs, path)
    with fs.open(posixpath.join(path, name), "ab") as file:
        file.write(b" ")
    assert any(problem.startswith(name) for problem in checkpoint.verify(fs, path).problems)


def test_a_file_that_was_cut_is_not_loaded(fs: FileSystem, home: str) -> None:
    path = f"{home}/a"
    checkpoint.save({"x": torch.ones(MIB)}, fs, path)
    fs.truncate(data_file(path), 100_000)
    with pytest.raises(dcp.CheckpointException, match="not whole"):
        checkpoint.load({"x": torch.zeros(MIB)}, fs, path)


def test_only_checkpoints_are_deleted(fs: FileSystem, home: str) -> None:
    fs.makedirs(f"{home}/notes")
    checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/a")
    for wrong in ("notes", "none"):
        with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
            checkpoint.delete(fs, f"{home}/{wrong}")
    checkpoint.delete(fs, f"{home}/a")
    assert fs.listdir(home) == ["notes"]


def test_commands_list_verify_and_delete(
    shared_cluster: LocalCluster, fs: FileSystem, home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    for name in ("a", "b"):
        checkpoint.save({"x": torch.ones(MIB)}, fs, f"{home}/{name}")
    young = manifest.temporary(f"{home}/c")
    fs.makedirs(young)
    # However slow this machine is.
    fs.utime(young, (time.time() + 1000,) * 2)
    listed = json.loads(fs3_command("checkpoint", "list", home, "--json").stdout)
    assert [(found["path"], found["length"]) for found in listed["checkpoints"]] == [
        (f"{home}/a", 4 * MIB),
        (f"{home}/b", 4 * MIB),
    ]
    assert [(left["name"], left["in_use"]) for left in listed["unfinished"]] == [("c", True)]
    assert "c is being saved" in fs3_command("checkpoint", "list", home).stderr
    assert "whole (1 items, 4.0 MiB)" in fs3_command("checkpoint", "verify", f"{home}/a").stdout
    fs.truncate(data_file(f"{home}/b"), MIB)
    refused = fs3_command("checkpoint", "verify", f"{home}/a", f"{home}/b", "--json", check=False)
    assert refused.returncode == 1
    assert [found["whole"] for found in json.loads(refused.stdout)] == [True, False]
    fs3_command("checkpoint", "delete", f"{home}/b")
    assert names(fs, home) == ["a"]
    # One that somebody may just have begun stays; an older one that nobody works on goes.
    assert fs3_command("checkpoint", "clean", home).stdout == ""
    (left,) = catalog.unfinished(fs, home)
    fs.utime(left.path, (0, 0))
    assert fs3_command("checkpoint", "clean", home).stdout == f"{left.path}\n"


def test_the_benchmark_runs(fs: FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import checkpoints

    found = checkpoints.figures(fs, tmp_path, 48 * MIB, turns=1, warming=0, pids=[], say=lambda _: None)
    assert all(figure.mb_per_s > 0 for figure in found.values())
    assert set(found) == {"write", "save", "read", "load", "local save", "local load"}


def test_a_checkpoint_of_a_newer_format_is_not_taken_for_one(fs: FileSystem, home: str) -> None:
    checkpoint.save({"x": torch.zeros(4)}, fs, f"{home}/a")
    summary = checkpoint.list_checkpoints(fs, home)[0].summary
    with fs.open(f"{home}/a/{manifest.SUMMARY}", "wb") as file:
        file.write(dataclasses.replace(summary, version=99).dump())
    assert names(fs, home) == []
