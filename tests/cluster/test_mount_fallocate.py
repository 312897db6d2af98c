"""fallocate(2) at a mount: longer files, holes and zeros, against a model in memory."""

from __future__ import annotations

import ctypes
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from tests.cluster.mounts import mounted

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16
MIB = 1 << 20
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def mounts(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster."""
    base = tmp_path_factory.mktemp("mnt")
    with mounted(shared_cluster, base / "a") as a, mounted(shared_cluster, base / "b") as b:
        yield a, b


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Call it; returns 0 or the errno."""
    done = LIBC.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length))
    return ctypes.get_errno() if done else 0


class Model:
    """A file as it should be."""

    def __init__(self) -> None:
        self.data = bytearray()

    def extend(self, end: int) -> None:
        self.data.extend(bytes(max(0, end - len(self.data))))

    def write(self, offset: int, data: bytes) -> None:
        self.extend(offset + len(data))
        self.data[offset : offset + len(data)] = data

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        if mode & (PUNCH_HOLE | ZERO_RANGE):
            end = min(offset + length, len(self.data))
            self.data[offset:end] = bytes(max(0, end - offset))
        if not mode & KEEP_SIZE:
            self.extend(offset + length)


@pytest.mark.parametrize("seed", range(3))
def test_files_with_holes_and_zeros_are_as_they_should_be(mounts: tuple[Path, Path], seed: int) -> None:
    rng, model = random.Random(seed), Model()
    path = mounts[0] / f"random{seed}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    modes = [0, KEEP_SIZE, KEEP_SIZE | PUNCH_HOLE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE]
    for _ in range(60):
        offset, length = rng.randrange(4 * MIB), rng.choice([1, 4096, rng.randrange(1, 2 * MIB)])
        kind = rng.random()
        if kind < 0.4:
            data = rng.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model.write(offset, data)
        elif kind < 0.9:
            mode = rng.choice(modes)
            assert fallocate(fd, mode, offset, length) == 0
            model.fallocate(mode, offset, length)
        else:
            os.ftruncate(fd, offset)
            del model.data[offset:]
            model.extend(offset)
        assert os.fstat(fd).st_size == len(model.data)
        assert os.pread(fd, 8 * MIB, 0) == model.data
    os.close(fd)
    assert (mounts[1] / path.name).read_bytes() == model.data


def test_a_file_made_longer_is_so_for_others_after_close_and_is_never_cut(mounts: tuple[Path, Path]) -> None:
    first, second = (mount / "longer" for mount in mounts)
    fd = os.open(first, os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"begin", 0)
    second.write_bytes(b"x" * 3 * MIB)
    assert fallocate(fd, 0, 0, 2 * MIB) == 0
    os.close(fd)
    assert second.stat().st_size == 3 * MIB
    os.posix_fallocate(fd := os.open(first, os.O_RDWR), 0, 5 * MIB)
    os.close(fd)
    assert second.read_bytes()[3 * MIB :] == bytes(2 * MIB)


def test_what_cannot_be_is_refused(mounts: tuple[Path, Path]) -> None:
    path = mounts[0] / "refused"
    path.write_bytes(b"data")
    fd = os.open(path, os.O_RDWR)
    assert fallocate(fd, COLLAPSE_RANGE, 0, 4096) == errno.EOPNOTSUPP
    assert fallocate(fd, 0, 0, 1 << 60) == errno.ENOSPC
    assert fallocate(fd, 0, 0, 0) == errno.EINVAL
    os.close(fd)
    fd = os.open(path, os.O_RDONLY)
    assert fallocate(fd, 0, 0, 4096) == errno.EBADF
    os.close(fd)
    assert path.read_bytes() == b"data"
