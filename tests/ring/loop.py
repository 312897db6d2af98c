"""A program that uses rings all the time: `loop.py MOUNT DIRECTORY`, until DIRECTORY/stop is there.

DIRECTORY is no part of the mount; DIRECTORY/rounds says how many rounds are over. Exits with an error when an I/O fails
or its bytes are wrong.
"""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import hf3fs_fuse.io as h3

ENTRIES = 8
BLOCK = 64 << 10


def announce(mount: str) -> tuple[SharedMemory, h3.iovec]:
    """Memory that has no name any more, announced by a thread that is gone."""
    memory = SharedMemory(create=True, size=ENTRIES * BLOCK)
    made: list[h3.iovec] = []
    thread = threading.Thread(target=lambda: made.append(h3.make_iovec(memory, mount)))
    thread.start()
    thread.join()
    memory.unlink()
    return memory, made[0]


def transfer(ring: h3.ioring, iov: h3.iovec, fd: int, for_read: bool) -> None:
    """All of the memory, from or to the start of a file."""
    for n in range(ENTRIES):
        ring.prepare(iov[n * BLOCK : (n + 1) * BLOCK], for_read, fd, n * BLOCK, userdata=n)
    done = ring.submit().wait(min_results=ENTRIES, timeout=timedelta(seconds=120))
    results = [(d.userdata, d.result) for d in done]
    assert results == [(n, BLOCK) for n in range(ENTRIES)], results


def pattern(number: int) -> bytes:
    return (b"%08d" % number) * (ENTRIES * BLOCK // 8)


def main(mount: str, directory: str) -> None:
    home = Path(directory)
    reads, writes = h3.make_ioring(mount, ENTRIES, True), h3.make_ioring(mount, ENTRIES, False)
    (source, written), (target, read) = announce(mount), announce(mount)
    kept = os.open(f"{mount}/kept", os.O_RDWR | os.O_CREAT, 0o644)
    h3.register_fd(kept)
    progress = os.open(home / "rounds", os.O_RDWR | os.O_CREAT, 0o644)
    number = 0
    while not (home / "stop").exists():
        number += 1
        source.buf[:] = pattern(number)
        target.buf[:] = bytes(len(target.buf))
        new = os.open(f"{mount}/new-{number % 5}", os.O_RDWR | os.O_CREAT, 0o644)
        h3.register_fd(new)
        for fd in (kept, new):
            transfer(writes, written, fd, False)
            transfer(reads, read, fd, True)
            assert target.buf == source.buf, f"round {number} read other bytes than it wrote"
        h3.deregister_fd(new)
        os.close(new)
        os.pwrite(progress, b"%d" % number, 0)
    h3.deregister_fd(kept)
    del written, read
    for memory in (source, target):
        memory.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
