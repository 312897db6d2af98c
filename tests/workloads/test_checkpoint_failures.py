"""Checkpoints of several ranks, and saves during which jobs and storage services are killed."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import fs3
from fs3 import checkpoint
from fs3.checkpoint import catalog
from fs3.client import FileSystem
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from fs3.testing.replicas import compare_replicas
from tests.cluster.conftest import QUICK, MakeCluster

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ROOT = Path(__file__).resolve().parents[2]
HOME = "/ckpt"
JOB_S = 120.0
# A killed client is forgotten after this.
SESSION_MS = 3000
KILLS = 12


@pytest.fixture
def quick_cluster(make_cluster: MakeCluster) -> LocalCluster:
    return make_cluster(dataclasses.replace(QUICK, session_ms=SESSION_MS))


@pytest.fixture
def fs(quick_cluster: LocalCluster) -> Iterator[FileSystem]:
    with fs3.connect(quick_cluster.url, token=quick_cluster.token) as connected:
        connected.makedirs(HOME)
        yield connected


def job(cluster: LocalCluster, module: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"tests.workloads.{module}", cluster.url, *arguments]
    environment = os.environ | {"FS3_TOKEN": cluster.token}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)


def test_any_number_of_ranks_loads_what_another_number_saved(quick_cluster: LocalCluster, fs: FileSystem) -> None:
    with job(quick_cluster, "ranks", HOME, "save", "fail", "load", "save-async", stderr=subprocess.PIPE) as running:
        _, errors = running.communicate(timeout=JOB_S)
    assert running.returncode == 0, errors
    assert fs.listdir(HOME) == ["again", "process", "sharded", "thread"]
    for name in fs.listdir(HOME):
        assert checkpoint.verify(fs, f"{HOME}/{name}").whole
    # Also in one process, with none of it.
    found = {"rows": torch.zeros(1009, 1531)}
    checkpoint.load(found, fs, f"{HOME}/sharded")
    assert torch.equal(found["rows"].flatten(), torch.arange(1009 * 1531, dtype=torch.float32) + 1)


@contextmanager
def stuck_job(cluster: LocalCluster, path: str) -> Iterator[subprocess.Popen[str]]:
    """A job in the middle of a save that it never ends."""
    with job(cluster, "killed_job", path, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "stuck\n"
            yield running
        finally:
            running.send_signal(signal.SIGKILL)


def test_a_job_killed_while_saving_leaves_the_former_checkpoint_and_no_broken_one(
    quick_cluster: LocalCluster, fs: FileSystem
) -> None:
    state = {"x": torch.arange(100)}
    for name in ("step-1", "step-2"):
        checkpoint.save(state, fs, f"{HOME}/{name}")
    # One replaces a checkpoint, one makes a new one.
    with stuck_job(quick_cluster, f"{HOME}/step-2"), stuck_job(quick_cluster, f"{HOME}/step-3"):
        assert [left.in_use for left in catalog.unfinished(fs, HOME)] == [True, True]
        assert checkpoint.clean(fs, HOME) == []
        temporary = catalog.unfinished(fs, HOME)[0].path
        assert fs.listdir(temporary) == ["__0_0.distcp", "checkpoint.json"]
    assert [found.name for found in checkpoint.list_checkpoints(fs, HOME)] == ["step-1", "step-2"]
    assert checkpoint.latest(fs, HOME) == f"{HOME}/step-2"
    assert checkpoint.verify(fs, f"{HOME}/step-2").whole
    # Who saves under the same name again does not wait until the cluster knows that the job is dead.
    checkpoint.save(state, fs, f"{HOME}/step-2")
    assert [left.name for left in catalog.unfinished(fs, HOME)] == ["step-3"]
    wait_until(lambda: not catalog.unfinished(fs, HOME)[0].in_use, timeout_s=JOB_S, what="the end of the job's claim")
    checkpoint.save(state, fs, f"{HOME}/step-4")
    assert fs.listdir(HOME) == ["step-1", "step-2", "step-4"]


def test_jobs_killed_at_any_moment_leave_whole_checkpoints_only(quick_cluster: LocalCluster, fs: FileSystem) -> None:
    seed = random.randrange(1 << 30)
    with job(quick_cluster, "kill_saves", HOME, str(KILLS), str(seed), stderr=subprocess.PIPE) as running:
        _, errors = running.communicate(timeout=JOB_S)
    assert running.returncode == 0, f"seed {seed}: {errors}"
    wait_until(lambda: not any(left.in_use for left in catalog.unfinished(fs, HOME)), timeout_s=JOB_S, what="the end")
    checkpoint.clean(fs, HOME)
    assert [found.name for found in checkpoint.list_checkpoints(fs, HOME)]
    assert fs.listdir(HOME) == sorted(found.name for found in checkpoint.list_checkpoints(fs, HOME))


class Killing(dcp.DefaultSavePlanner):
    """A planner that kills a storage service when half of the tensors are on their way."""

    def __init__(self, cluster: LocalCluster, victim: str) -> None:
        super().__init__()
        self._kill = lambda: cluster.kill(victim)

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "tensor-6":
            self._kill()
        return super().resolve_data(write_item)


def test_a_save_survives_the_death_of_any_storage_service(quick_cluster: LocalCluster, fs: FileSystem) -> None:
    state = {f"tensor-{number}": torch.randn((1 << 20) + number) for number in range(12)}
    for number in range(1, 1 + quick_cluster.spec.storage):
        victim, path = f"storage-{number}", posixpath.join(HOME, f"step-{number}")
        checkpoint.save(state, fs, path, planner=Killing(quick_cluster, victim))
        assert checkpoint.verify(fs, path).whole
        found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        checkpoint.load(found, fs, path)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        quick_cluster.start(victim)
        quick_cluster.wait_serving()
    assert compare_replicas(fs).differences == []
