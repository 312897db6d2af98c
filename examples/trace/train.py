"""Train a small network on samples in fs3, and take one trace of the computing (PyTorch profiler) and the I/O (fs3).

    python train.py --url fs3://127.0.0.1:7000/?token_file=... --trace train.json
    python timeline.py train.json -o train.svg        # or open train.json in https://ui.perfetto.dev

A thread reads batches ahead of the training; `--ahead 0` reads each one when it is needed. The program prints how much
of the time in which it was reading it was also computing.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from overlap import overlapped
from torch.profiler import ProfilerActivity, profile, record_function

import fs3

FEATURES = 256
HIDDEN = 128
FLOAT_BYTES = 4


def write_samples(fs: fs3.FileSystem, path: str, batches: int, batch: int) -> None:
    """Random points and what an unknown linear map makes of them, as float32, batch after batch."""
    torch.manual_seed(1)
    weights = torch.randn(FEATURES, 1)
    with fs.open(path, "wb", buffering=0) as file:
        for _ in range(batches):
            points = torch.randn(batch, FEATURES)
            file.write(torch.cat([points, points @ weights + 0.1 * torch.randn(batch, 1)], dim=1).contiguous())


def read_batch(file: fs3.client.RawFile, number: int, batch: int) -> torch.Tensor:
    """One batch, read straight into a tensor."""
    data = torch.empty(batch, FEATURES + 1)
    wanted = data.numel() * FLOAT_BYTES
    if file.pread_into(data, number * wanted) != wanted:
        raise EOFError(f"{file.name} has no batch {number}")
    return data


def read_all(
    reader: ThreadPoolExecutor, file: fs3.client.RawFile, batches: int, batch: int, ahead: int
) -> Iterator[torch.Tensor]:
    """All batches, each read by `reader` while `ahead` batches before it are still being used."""
    if not ahead:
        yield from (read_batch(file, number, batch) for number in range(batches))
        return
    coming = deque(reader.submit(read_batch, file, number, batch) for number in range(min(ahead, batches)))
    for number in range(ahead, batches + ahead):
        data = coming.popleft().result()
        if number < batches:
            coming.append(reader.submit(read_batch, file, number, batch))
        yield data


def train(batches: Iterator[torch.Tensor], steps: int) -> list[float]:
    """One pass; the loss of each step."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        with record_function("wait for batch"):
            data = next(batches)
        with record_function("compute"):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(data[:, :FEATURES]), data[:, FEATURES:])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def main() -> int:
    """Train, and say what the trace shows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of the cluster (default: FS3_URL)")
    parser.add_argument(
        "--path", default="/trace-example", help="of the samples, which are made (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=40, help="batches (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4096, help="samples in each (default: %(default)s)")
    parser.add_argument("--ahead", type=int, default=2, help="batches that are read ahead (default: %(default)s)")
    parser.add_argument("--trace", default="train.json", help="where to write the trace (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with fs3.connect(options.url) as fs, ThreadPoolExecutor(1, thread_name_prefix="reader") as reader:
        write_samples(fs, options.path, options.steps, options.batch)
        with fs3.trace(options.trace, merge=f"{options.trace}.torch"):
            with (
                profile(activities=[ProfilerActivity.CPU]) as profiler,
                fs.open(options.path, "rb", buffering=0) as file,
            ):
                losses = train(read_all(reader, file, options.steps, options.batch, options.ahead), options.steps)
            profiler.export_chrome_trace(f"{options.trace}.torch")
        fs.remove(options.path)
    reading_us, both_us = overlapped(options.trace, "fs3.read", "compute")
    print(f"loss {losses[0]:.1f} at first, {losses[-1]:.1f} at last")
    print(f"reading took {reading_us / 1e3:.1f} ms, {both_us / reading_us:.0%} of it while computing")
    print(f"{options.trace}: open it in https://ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
