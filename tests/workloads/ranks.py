"""A training job of several ranks, for tests: ``python -m tests.workloads.ranks URL HOME STEP...``.

PyTorch is imported once; the ranks of each step are forked from there, as cheaply as that. The token is in FS3_TOKEN.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fs3
from fs3 import checkpoint
from fs3.client import FileSystem

# Rows and columns that no number of ranks divides.
SHAPE = (1009, 1531)


def full(seed: int) -> torch.Tensor:
    """A matrix that all ranks know."""
    return torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).reshape(SHAPE) + seed


def sharded(mesh: DeviceMesh, fill: Callable[[int], torch.Tensor], turned: bool = False) -> dict[str, DTensor]:
    """Matrices that are cut by rows, by columns and not at all; `turned`: the other way round."""
    ways = [Shard(1), Shard(0)] if turned else [Shard(0), Shard(1)]
    placements = {"rows": ways[0], "columns": ways[1], "everywhere": Replicate()}
    return {
        name: distribute_tensor(fill(seed), mesh, [way]) for seed, (name, way) in enumerate(placements.items(), start=1)
    }


def model(mesh: DeviceMesh, seed: int) -> torch.nn.Module:
    """A model cut by FSDP."""
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Linear(65, 7))
    for layer in made:
        fully_shard(layer, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def save(fs: FileSystem, home: str, mesh: DeviceMesh) -> None:
    state = sharded(mesh, full) | {"model": get_model_state_dict(model(mesh, seed=5)), "step": 7}
    checkpoint.save(state, fs, f"{home}/sharded")
    # Only one rank has something to write.
    checkpoint.save({"one": torch.ones(3)}, fs, f"{home}/again", keep_last=2)


def load(fs: FileSystem, home: str, mesh: DeviceMesh) -> None:
    for turned in (False, True):
        found = sharded(mesh, lambda _: torch.zeros(SHAPE), turned)
        empty = model(mesh, seed=6)
        state = found | {"model": get_model_state_dict(empty), "step": 0}
        checkpoint.load(state, fs, f"{home}/sharded")
        for seed, tensor in enumerate(found.values(), start=1):
            expected = distribute_tensor(full(seed), mesh, tensor.placements)
            assert torch.equal(tensor.to_local(), expected.to_local())
        set_model_state_dict(empty, state["model"])
        for one, other in zip(empty.parameters(), model(mesh, seed=5).parameters(), strict=True):
            assert torch.equal(one.full_tensor(), other.full_tensor())
        assert state["step"] == 7


def save_async(fs: FileSystem, home: str, mesh: DeviceMesh) -> None:
    for kind in AsyncCheckpointerType:
        # Processes look for the token where this one found it.
        state = sharded(mesh, full)
        future = checkpoint.async_save(state, fs, f"{home}/{kind.value}", async_checkpointer_type=kind)
        for tensor in state.values():
            tensor.to_local().zero_()
        future.result()
    for kind in AsyncCheckpointerType:
        found = sharded(mesh, lambda _: torch.zeros(SHAPE))
        checkpoint.load(found, fs, f"{home}/{kind.value}")
        assert torch.equal(found["columns"].full_tensor(), full(2))


class Failing(dcp.DefaultSavePlanner):
    """A planner that has no data on the last rank."""

    def resolve_data(self, write_item: object) -> object:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("this rank has no data")
        return super().resolve_data(write_item)


def fail(fs: FileSystem, home: str, mesh: DeviceMesh) -> None:
    with pytest.raises(dcp.CheckpointException, match="this rank has no data"):
        checkpoint.save(sharded(mesh, full), fs, f"{home}/sharded", planner=Failing())


STEPS = {"save": (2, save), "load": (3, load), "save-async": (2, save_async), "fail": (2, fail)}


def rank_main(rank: int, world: int, store: str, url: str, home: str, step: Callable[..., None]) -> int:
    """One rank of a step; the exit status."""
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        with fs3.connect(url) as fs:
            step(fs, home, init_device_mesh("cpu", (world,)))
        dist.barrier()
        dist.destroy_process_group()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


def main(url: str, home: str, steps: list[str]) -> int:
    """Run steps one after the other; 1 at the first that fails."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as directory:
        for name in steps:
            world, step = STEPS[name]
            children = []
            for rank in range(world):
                child = os.fork()
                if child == 0:
                    code = rank_main(rank, world, f"{directory}/{name}", url, home, step)
                    sys.stderr.flush()
                    os._exit(code)
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            if any(codes):
                print(f"{name}: the ranks ended with {codes}", file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
