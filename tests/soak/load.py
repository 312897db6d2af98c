"""Workers that do what people do with files, and check what they read back."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

SMALL_BYTES = 20_000
LARGE_BYTES = 8 << 20
LOG_BYTES = 4 << 20
MAP_BYTES = 1 << 20


def small_files(base: Path, rng: random.Random) -> None:
    """Make, read, rename, list and remove small files."""
    base.mkdir(exist_ok=True)
    contents = {f"f{n}": rng.randbytes(rng.randrange(SMALL_BYTES)) for n in range(30)}
    for name, data in contents.items():
        (base / name).write_bytes(data)
    for name, data in contents.items():
        assert (base / name).read_bytes() == data, name
        (base / name).rename(base / f"{name}-moved")
    assert sorted(os.listdir(base)) == sorted(f"{name}-moved" for name in contents)
    for name in contents:
        (base / f"{name}-moved").unlink()


def large_file(base: Path, rng: random.Random) -> None:
    """Write a large file, sync it, read it back, replace it."""
    base.mkdir(exist_ok=True)
    data = rng.randbytes(MAP_BYTES) * (LARGE_BYTES // MAP_BYTES)
    temporary = base / "large.tmp"
    with temporary.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    temporary.replace(base / "large")
    assert (base / "large").read_bytes() == data


def appended_log(base: Path, rng: random.Random) -> None:
    """Append lines, read the end, begin a new file when it is long."""
    base.mkdir(exist_ok=True)
    path = base / "log"
    line = rng.randbytes(rng.randrange(1, 2000)).hex().encode() + b"\n"
    for _ in range(20):
        with path.open("ab") as file:
            file.write(line)
    with path.open("rb") as file:
        file.seek(-len(line), os.SEEK_END)
        assert file.read() == line
    if path.stat().st_size > LOG_BYTES:
        path.replace(base / "log.1")


def mapped_file(base: Path, rng: random.Random) -> None:
    """Write through a shared mapping, read by descriptor; punch it short again at the end."""
    base.mkdir(exist_ok=True)
    with (base / "mapped").open("w+b") as file:
        file.truncate(MAP_BYTES)
        with mmap.mmap(file.fileno(), MAP_BYTES) as view:
            for _ in range(50):
                at, piece = rng.randrange(MAP_BYTES - 5000), rng.randbytes(rng.randrange(1, 5000))
                view[at : at + len(piece)] = piece
                assert os.pread(file.fileno(), len(piece), at) == piece
            view.flush()
        file.truncate(rng.randrange(MAP_BYTES))


def tree(base: Path, rng: random.Random) -> None:
    """Make a tree as a version control system does, copy it, compare, remove both."""
    base.mkdir(exist_ok=True)
    one, other = base / "tree", base / "copy"
    for made in (one, other):
        shutil.rmtree(made, ignore_errors=True)
    for _ in range(40):
        name = rng.randbytes(20).hex()
        path = one / name[:1] / name[2:]
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(rng.randbytes(rng.randrange(4000)))
        temporary.chmod(0o444)
        os.link(temporary, path)
        temporary.unlink()
    shutil.copytree(one, other)
    for path in one.rglob("*"):
        if path.is_file():
            assert (other / path.relative_to(one)).read_bytes() == path.read_bytes()
    shutil.rmtree(one)
    shutil.rmtree(other)


WORK: dict[str, Callable[[Path, random.Random], None]] = {
    "small files": small_files,
    "large file": large_file,
    "appended log": appended_log,
    "mapped file": mapped_file,
    "tree": tree,
}


class Worker(threading.Thread):
    """Does one kind of work again and again until `ended`; ``error`` is what went wrong, which ends it."""

    def __init__(self, name: str, base: Path, seed: int, ended: threading.Event) -> None:
        super().__init__(name=f"soak-{name}")
        self.kind = name
        self.rounds = 0
        self.error = ""
        self._base = base / name
        self._rng = random.Random(f"{seed} {name}")
        self._ended = ended

    def run(self) -> None:
        """Work."""
        try:
            while not self._ended.is_set():
                WORK[self.kind](self._base, self._rng)
                self.rounds += 1
        except Exception:
            self.error = f"{self.kind}, round {self.rounds}: {traceback.format_exc()}"
