"""Writers that keep going while services die, and remember what was acknowledged."""

from __future__ import annotations

import hashlib
import random
import threading
from dataclasses import dataclass, field

import fs3
from fs3.client import FileSystem
from fs3.testing.cluster import LocalCluster

RECORD_BYTES_MAX = 300_000
FILE_BYTES = 4 << 20


def content(seed: str, length: int) -> bytes:
    """Reproducible bytes, different for every seed."""
    block = hashlib.sha256(seed.encode()).digest()
    return (block * (length // len(block) + 1))[:length]


@dataclass
class Model:
    """What a file must hold: acknowledged bytes, and the writes whose outcome is not known."""

    data: bytearray = field(default_factory=lambda: bytearray(FILE_BYTES))
    length: int = 0
    unknown: list[tuple[int, bytes]] = field(default_factory=list)

    def apply(self, offset: int, piece: bytes) -> None:
        """An acknowledged write."""
        self.data[offset : offset + len(piece)] = piece
        self.length = max(self.length, offset + len(piece))


class Writer(threading.Thread):
    """Random overlapping writes and appends to one file; every write is checked against a model afterwards."""

    def __init__(self, cluster: LocalCluster, path: str, seed: int) -> None:
        super().__init__(name=f"writer-{seed}")
        self.cluster = cluster
        self.path = path
        self.rng = random.Random(seed)
        self.model = Model()
        self.acknowledged = 0
        self.failure: BaseException | None = None
        self.stopping = threading.Event()

    def run(self) -> None:
        """Write until stopped."""
        try:
            with (
                fs3.connect(self.cluster.url, token=self.cluster.token) as fs,
                fs.open(self.path, "wb", buffering=0) as file,
            ):
                while not self.stopping.is_set():
                    length = self.rng.choice([100, 4096, 70_000, self.rng.randrange(1, RECORD_BYTES_MAX)])
                    offset = self.rng.choice(
                        [min(self.model.length, FILE_BYTES - length), self.rng.randrange(FILE_BYTES - length)]
                    )
                    piece = content(f"{self.path}-{self.acknowledged}", length)
                    assert file.pwrite(piece, offset) == length
                    self.model.apply(offset, piece)
                    self.acknowledged += 1
                file.sync()
        except BaseException as e:
            self.failure = e

    def finish(self) -> None:
        """Stop, and raise what went wrong in the thread."""
        self.stopping.set()
        self.join(timeout=120)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure is not None:
            raise self.failure

    def verify(self, fs: FileSystem) -> None:
        """Compare the file with the model, byte for byte."""
        with fs.open(self.path, "rb") as file:
            actual = file.read()
        expected = bytes(self.model.data[: self.model.length])
        assert len(actual) == len(expected), f"{self.path}: {len(actual)} bytes instead of {len(expected)}"
        if actual != expected:
            at = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b)
            raise AssertionError(
                f"{self.path} differs from byte {at} on, after {self.acknowledged} acknowledged writes"
            )
