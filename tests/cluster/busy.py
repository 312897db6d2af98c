"""A program that uses a mount all the time: `busy.py KIND MOUNT DIRECTORY`, until DIRECTORY/stop is there.

DIRECTORY is no part of the mount; DIRECTORY/KIND says how many rounds are over. Exits with 0, with 3 and the error's
name on standard output when a call fails, and with 1 when one gave something else than was written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

BLOCK = 4096
FILE_BLOCKS = 512


def home_of(kind: str, mount: Path, directory: Path) -> Path:
    """Where a program is at home on the mount."""
    return mount / f"{kind}-{directory.name}"


def block(number: int) -> bytes:
    return (b"%015d\n" % number) * (BLOCK // 16)


def reading(home: Path) -> Callable[[int], None]:
    """Reads of a file, each of which the kernel has to ask for."""
    (home / "read").write_bytes(b"".join(block(n) for n in range(FILE_BLOCKS)))
    file = os.open(home / "read", os.O_RDONLY)

    def do(_: int) -> None:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        at, count = random.randrange(FILE_BLOCKS), random.randrange(1, 64)
        wanted = b"".join(block(n) for n in range(at, min(at + count, FILE_BLOCKS)))
        assert os.pread(file, count * BLOCK, at * BLOCK) == wanted

    return do


def writing(home: Path) -> Callable[[int], None]:
    """Writes to a file that stays open, and to new ones."""
    file = os.open(home / "written", os.O_RDWR | os.O_CREAT, 0o644)

    def do(number: int) -> None:
        data = block(number) * 16
        os.pwrite(file, data, 0)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(file, 2 * len(data), 0) == data
        (home / "new").write_bytes(data)
        os.replace(home / "new", home / "whole")
        assert (home / "whole").read_bytes() == data

    return do


def looking(home: Path) -> Callable[[int], None]:
    """Names and attributes."""

    def do(number: int) -> None:
        path = home / f"f{number % 7}"
        path.touch()
        os.truncate(path, number)
        assert path.stat().st_size == number
        assert path.name in os.listdir(home)
        path.unlink()
        assert not path.exists()
        os.statvfs(home)

    return do


def locking(home: Path) -> Callable[[int], None]:
    """Waits for a lock that somebody else has."""
    file = os.open(home / "locked", os.O_RDWR | os.O_CREAT, 0o644)

    def do(_: int) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_UN)

    return do


KINDS = {"reading": reading, "writing": writing, "looking": looking, "locking": locking}


def main(kind: str, mount: str, directory: str) -> int:
    progress = os.open(Path(directory) / kind, os.O_WRONLY | os.O_CREAT, 0o644)
    number = 0
    try:
        home = home_of(kind, Path(mount), Path(directory))
        home.mkdir(exist_ok=True)
        do = KINDS[kind](home)
        while not (Path(directory) / "stop").exists():
            os.pwrite(progress, b"%d" % number, 0)
            number += 1
            do(number)
    except OSError as e:
        with contextlib.suppress(KeyError):
            print(errno.errorcode[e.errno or 0], flush=True)
        # Descriptors of a mount that has ended cannot be closed without an error.
        os._exit(3)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
