"""Holes of files at a mount, and copies between its files."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fs3
from fs3.testing.cluster import LocalCluster
from tests.cluster.mounts import mounted

MIB = 1 << 20


@pytest.fixture(scope="module")
def mounts(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster."""
    base = tmp_path_factory.mktemp("mnt")
    with mounted(shared_cluster, base / "a") as a, mounted(shared_cluster, base / "b") as b:
        yield a, b


def extents(path: Path) -> list[tuple[int, int]]:
    """Where the file has data."""
    found = []
    fd = os.open(path, os.O_RDONLY)
    try:
        position, end = 0, os.fstat(fd).st_size
        while position < end:
            try:
                start = os.lseek(fd, position, os.SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:
                    raise
                break
            position = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, position))
    finally:
        os.close(fd)
    return found


def make_sparse(path: Path, seed: int = 1) -> None:
    """200 MiB, of which little is there."""
    rng = random.Random(seed)
    with path.open("wb") as file:
        for at in sorted(rng.sample(range(200), 9)):
            file.seek(at * MIB + rng.choice([0, 5000]))
            file.write(rng.randbytes(rng.choice([1, 70_000, 2 * MIB])))
        file.truncate(230 * MIB)


def test_seeking_finds_exactly_the_chunks_that_were_written(mounts: tuple[Path, Path]) -> None:
    a, b = mounts
    with (a / "f").open("wb", buffering=0) as file:
        os.pwrite(file.fileno(), b"x" * 3 * MIB, 10 * MIB)
        os.pwrite(file.fileno(), b"y", 20 * MIB + 7)
        os.ftruncate(file.fileno(), 40 * MIB)
        assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == 10 * MIB
    expected = [(10 * MIB, 13 * MIB), (20 * MIB, 20 * MIB + 8)]
    assert extents(a / "f") == extents(b / "f") == expected


def test_the_python_client_seeks_too(mounts: tuple[Path, Path], shared_cluster: LocalCluster) -> None:
    make_sparse(mounts[0] / "py")
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs, fs.open("/py", "rb", buffering=0) as file:
        start = file.seek(0, os.SEEK_DATA)
        assert (start, file.seek(start, os.SEEK_HOLE)) == extents(mounts[0] / "py")[0]
        with pytest.raises(OSError, match="No such device or address"):
            file.seek(230 * MIB, os.SEEK_HOLE)


def test_cp_and_tar_keep_holes_and_bytes(mounts: tuple[Path, Path], tmp_path: Path) -> None:
    source = mounts[0] / "sparse"
    make_sparse(source)
    has = extents(source)
    assert 0 < sum(end - start for start, end in has) < 30 * MIB
    subprocess.run(["cp", "--sparse=auto", source, mounts[0] / "copied"], check=True)
    assert extents(mounts[0] / "copied") == has
    subprocess.run(["cp", "--sparse=auto", source, tmp_path / "local"], check=True)
    assert (tmp_path / "local").stat().st_blocks * 512 < 60 * MIB
    archive = tmp_path / "archive.tar"
    subprocess.run(["tar", "-S", "-cf", archive, "-C", mounts[0], "sparse"], check=True)
    assert archive.stat().st_size < 60 * MIB
    (mounts[1] / "untarred").mkdir()
    subprocess.run(["tar", "-S", "-xf", archive, "-C", mounts[1] / "untarred"], check=True)
    for copy in (mounts[1] / "copied", tmp_path / "local", mounts[1] / "untarred" / "sparse"):
        subprocess.run(["cmp", source, copy], check=True)


def copy_range(source: int, target: int, count: int, at: int, to: int) -> None:
    while count:
        copied = os.copy_file_range(source, target, count, at, to)
        assert copied > 0
        count, at, to = count - copied, at + copied, to + copied


def test_copied_ranges_are_what_a_model_says(mounts: tuple[Path, Path]) -> None:
    rng = random.Random(7)
    fds, models = [], []
    for name in ("m0", "m1"):
        data = rng.randbytes(6 * MIB)
        (mounts[0] / name).write_bytes(data)
        fds.append(os.open(mounts[0] / name, os.O_RDWR))
        models.append(bytearray(data))
    for _ in range(40):
        one, other = rng.choice([(0, 1), (1, 0)])
        at, to = rng.randrange(5 * MIB), rng.randrange(8 * MIB)
        count = min(rng.choice([1, 4096, rng.randrange(3 * MIB)]), len(models[one]) - at)
        # What was written a moment ago is still on its way.
        models[one][at : at + 3] = b"now"
        os.pwrite(fds[one], b"now", at)
        copy_range(fds[one], fds[other], count, at, to)
        if count:
            models[other].extend(bytes(max(0, to + count - len(models[other]))))
            models[other][to : to + count] = models[one][at : at + count]
        for fd, model in zip(fds, models, strict=True):
            assert os.pread(fd, 16 * MIB, 0) == model, "they differ"
    for fd in fds:
        os.close(fd)
    for name, model in zip(("m0", "m1"), models, strict=True):
        assert (mounts[1] / name).read_bytes() == model
