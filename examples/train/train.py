"""Train a small model on samples that lie on fs3, and save checkpoints there; kill it at any time and start it again.

The same command goes on from the last checkpoint, in the middle of an epoch, with the same samples in the same order:
the losses that it prints are those of a run that was never killed. Runs on a CPU.

    fs3 up && python examples/train/train.py "fs3://127.0.0.1:7000/demo?token_file=fs3-cluster/token"
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import DataLoader

import fs3
from fs3 import checkpoint
from fs3.data import RecordDataset, RecordWriter, StatefulDistributedSampler

FEATURES, CLASSES = 64, 10
SHARDS = 4


def make_data(fs: fs3.FileSystem, directory: str, samples: int) -> None:
    """Points around ten centres, and which centre each is of; for real data see `fs3 data pack`."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(CLASSES, FEATURES))
    fs.makedirs(directory)
    for shard in range(SHARDS):
        labels = rng.integers(0, CLASSES, samples // SHARDS)
        points = (centres[labels] + rng.normal(scale=2.0, size=(len(labels), FEATURES))).astype(np.float32)
        with RecordWriter(f"{directory}/{shard}.fs3r", fs=fs, fields=["point", "label"]) as writer:
            for point, label in zip(points, labels, strict=True):
                writer.write({"point": point, "label": label})


def decode(sample: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the batch's memory: collating copies them out."""
    return sample["point"].view(torch.float32), sample["label"].view(torch.int64)[0]


class Run:
    """All that a checkpoint keeps: model, optimizer, random numbers, and which samples have been used."""

    def __init__(self, samples: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, CLASSES))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.sampler = StatefulDistributedSampler(samples, seed=7)
        self.step = 0
        # Samples used since the iteration over the sampler began; its workers are ahead of that.
        self.used = 0

    def train(self, points: torch.Tensor, labels: torch.Tensor) -> float:
        """One step; its loss."""
        loss = nn.functional.cross_entropy(self.model(points), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        self.used += len(labels)
        return loss.item()

    def end_epoch(self) -> None:
        """The next one has an order of its own."""
        self.sampler.set_epoch(self.sampler.epoch + 1)
        self.used = 0

    def state_dict(self) -> dict[str, Any]:
        """For PyTorch's checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "random": torch.get_rng_state(),
            "sampler": self.sampler.state_dict(self.used),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        torch.set_rng_state(state["random"])
        self.sampler.load_state_dict(state["sampler"])
        self.step, self.used = state["step"], 0


def main() -> None:
    """Make the data unless they are there, resume, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="the cluster, and the directory to work in (default: FS3_URL)")
    parser.add_argument("--samples", type=int, default=20_000, help="of data that are made")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=128, help="samples of a step")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--workers", type=int, default=2, help="processes that read")
    parser.add_argument("--data", default="/samples", help="directory of the samples")
    parser.add_argument("--checkpoints", default="/checkpoints", help="directory of the checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # That there is only one process.
    warnings.filterwarnings("ignore", module="torch.distributed")
    with fs3.connect(arguments.url) as fs:
        if not fs.exists(arguments.data):
            make_data(fs, arguments.data, arguments.samples)
        dataset = RecordDataset(arguments.data, fs=fs, format="torch", decode=decode, reuse=True)
        run = Run(len(dataset))
        last = checkpoint.latest(fs, arguments.checkpoints)
        if last is not None:
            checkpoint.load({"run": run}, fs, last)
            print(f"resumed from {last}", flush=True)
        # Of its own: a loader draws a random number whenever it begins, which a resumed run does more often.
        random = torch.Generator()
        loader = DataLoader(
            dataset, arguments.batch, sampler=run.sampler, num_workers=arguments.workers, generator=random
        )
        while run.step < arguments.steps:
            for points, labels in loader:
                loss = run.train(points, labels)
                print(f"step {run.step} loss {loss:.9g}", flush=True)
                if run.step % arguments.save_every == 0:
                    checkpoint.save({"run": run}, fs, f"{arguments.checkpoints}/step-{run.step:08}", keep_last=2)
                if run.step == arguments.steps:
                    break
            else:
                run.end_epoch()


if __name__ == "__main__":
    main()
