"""Which samples a rank trains on, in which order: shuffled, the same every time, resumable, without PyTorch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rounds of the Feistel network; with four and a good round function the order passes for random (Luby and Rackoff).
ROUNDS = 6
# Positions that are turned into numbers of samples at a time.
BLOCK = 8192
# What the states of a sampler say of their order; changed when the order for the same seed changes.
ORDER = "feistel-6"

_MASK = (1 << 64) - 1


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood): every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A random-looking permutation of ``range(length)`` that takes no memory, however long: always that of `seed`.

    A Feistel network over the next power of two, walked along its cycle until it is inside (Black and Rogaway). Below
    two evaluations per number on average.
    """

    def __init__(self, length: int, *seed: int) -> None:
        self._length = length
        bits = max(2, (length - 1).bit_length())
        self._low = bits // 2
        self._high = bits - self._low
        words = np.random.SeedSequence([s & _MASK for s in seed]).generate_state(ROUNDS, np.uint64)
        self._keys = [np.uint64(word) for word in words]

    def __len__(self) -> int:
        return self._length

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at each position."""
        found = self._network(positions.astype(np.uint64))
        outside = np.flatnonzero(found >= self._length)
        while len(outside):
            found[outside] = self._network(found[outside])
            outside = outside[found[outside] >= self._length]
        return found.astype(np.int64)

    def _network(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = np.uint64(self._low), np.uint64(self._high)
        right_bits, left_bits = low, high
        for key in self._keys:
            # (left, right) -> (right, left ^ f(right)); the halves change places, and their sizes with them.
            right = x & ((np.uint64(1) << right_bits) - np.uint64(1))
            left = x >> right_bits
            left = left ^ (_mixed(right + key) & ((np.uint64(1) << left_bits) - np.uint64(1)))
            x = (right << left_bits) | left
            right_bits, left_bits = left_bits, right_bits
        return x


class StatefulDistributedSampler:
    """The numbers of the samples that one rank reads in an epoch; for ``DataLoader(sampler=...)``, or any loop.

    Arguments are those of ``torch.utils.data.DistributedSampler``: each rank of `num_replicas` gets every
    `num_replicas`-th sample of the epoch's order, so that all together read every sample once; so that all get as many,
    some samples at the beginning of the order are read again at its end, or those left over are dropped with
    `drop_last`. `rank` and `num_replicas` default to those of ``torch.distributed`` where it is initialised, else to
    the environment's RANK and WORLD_SIZE, else to one alone. The order depends on `seed`, the epoch and the number of
    samples alone, and takes no memory. Call :meth:`set_epoch` before each epoch, as there.

    It can be saved in the middle of an epoch and resumed, also by another number of ranks: see :meth:`state_dict`.
    Not thread-safe.
    """

    def __init__(
        self,
        dataset: Sized | int,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        ours, all_ranks = _distributed()
        self._total = dataset if isinstance(dataset, int) else len(dataset)
        self.num_replicas = all_ranks if num_replicas is None else num_replicas
        self.rank = ours if rank is None else rank
        if self.num_replicas < 1 or not 0 <= self.rank < self.num_replicas:
            raise ValueError(
                f"rank {self.rank} of {self.num_replicas} replicas: it must be 0 to {self.num_replicas - 1}"
            )
        if self._total < 0:
            raise ValueError(f"a dataset of {self._total} samples")
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        # Samples of the epoch that all ranks together had used when it was resumed, and of this rank since.
        self._begin = 0
        self._yielded = 0

    def __len__(self) -> int:
        """The samples that this rank has left in the epoch, from where it was resumed."""
        left = self._total - self._begin
        return max(0, left // self.num_replicas if self.drop_last else -(-left // self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        self._yielded = 0
        order = Permutation(self._total, self.seed, self.epoch)
        begin, count = self._begin, len(self)
        for block in range(0, count, BLOCK):
            own = np.arange(block, min(block + BLOCK, count), dtype=np.int64)
            positions = (begin + self.rank + own * self.num_replicas) % self._total
            for number in (order(positions) if self.shuffle else positions).tolist():
                self._yielded += 1
                yield number

    def set_epoch(self, epoch: int) -> None:
        """Begin this epoch, in an order of its own. The one that was resumed, or is under way, is gone on with."""
        if epoch != self.epoch:
            self.epoch, self._begin, self._yielded = epoch, 0, 0

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on behind the samples used so far. JSON can say it.

        `consumed`: the samples of this rank in this epoch that have been used since the iteration began; default: all
        that it has yielded. A DataLoader with workers asks for more than it has delivered: count what it delivered,
        ``batches * batch_size``. Every rank must have used as many, as ranks that train together have.
        """
        used = self._yielded if consumed is None else consumed
        if not 0 <= used <= len(self):
            raise ValueError(f"{used} samples used of {len(self)}")
        return {
            "order": ORDER,
            "samples": self._total,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "epoch": self.epoch,
            "consumed": min(self._total, self._begin + used * self.num_replicas),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was made, whatever rank made it, with however many ranks there are now.

        The next iteration yields what is left of the epoch. Raises ValueError for the state of other data or another
        order.
        """
        for name, ours in (("order", ORDER), ("samples", self._total), ("shuffle", self.shuffle)):
            if state[name] != ours:
                raise ValueError(f"the state is of another run: {name} {state[name]!r} there, {ours!r} here")
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._begin, self._yielded = state["consumed"], 0


def _distributed() -> tuple[int, int]:
    """Rank and number of ranks."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
