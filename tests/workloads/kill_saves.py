"""Jobs that save all the time and are killed: ``python -m tests.workloads.kill_saves URL HOME KILLS SEED``.

After each kill every checkpoint that is listed must be whole, and as new as any that the job was told is saved. The
token is in FS3_TOKEN.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import traceback

import torch

import fs3
from fs3 import checkpoint
from fs3.checkpoint.dcp import load, save
from fs3.client import FileSystem

ELEMENTS = 1 << 20
KEEP = 2
# A kill comes this long after the job began to save, at most.
KILL_S_MAX = 0.4


def save_for_ever(url: str, home: str, first: int, told: int) -> None:
    """Save versions under two names in turn, telling of each that is saved; the odd ones replace a checkpoint."""
    with fs3.connect(url) as fs:
        os.write(told, b"begin\n")
        version = first
        while True:
            version += 1
            name = f"step-{version}" if version % 2 else "same"
            state = {"version": torch.tensor(version), "data": torch.full((ELEMENTS,), float(version))}
            save(state, fs, f"{home}/{name}", keep_last=KEEP)
            os.write(told, f"{version}\n".encode())


def killed_job(url: str, home: str, first: int, rng: random.Random) -> int:
    """Run a job and kill it; the last version that it was told is saved."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_for_ever(url, home, first, write)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as told:
        assert told.readline() == b"begin\n"
        select.select([], [], [], rng.uniform(0, KILL_S_MAX))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        versions = [int(line) for line in told.read().splitlines()]
    return versions[-1] if versions else first


def check(fs: FileSystem, home: str, saved: int) -> int:
    """Every checkpoint is whole and of one version, and the newest is not older than `saved`; its version."""
    versions = []
    for found in checkpoint.list_checkpoints(fs, home):
        verified = checkpoint.verify(fs, found.path)
        assert verified.whole, verified.problems
        state = {"version": torch.tensor(0), "data": torch.empty(ELEMENTS)}
        load(state, fs, found.path)
        versions.append(int(state["version"]))
        assert bool((state["data"] == float(versions[-1])).all()), f"{found.path} mixes versions"
    assert versions == sorted(versions), f"the newest is not the last: {versions}"
    assert not saved or versions[-1] >= saved, f"{saved} was saved, the newest is {versions}"
    # One more than is kept, where a job was killed between publishing and removing.
    assert len(versions) <= KEEP + 1
    return versions[-1] if versions else 0


def main(url: str, home: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    version = 0
    for _ in range(kills):
        saved = killed_job(url, home, version, rng)
        # A connection made before a fork is of no use in the child: one for each look.
        with fs3.connect(url) as fs:
            version = check(fs, home, saved)
    print(version)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
