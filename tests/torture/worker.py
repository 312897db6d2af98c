"""What the workers of a campaign have in common: their job, their client, pausing, noting violations."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import fs3
from fs3.client import FileSystem
from fs3.kvcache import KVCache
from tests.torture import manifest
from tests.torture.board import Board
from tests.torture.content import CHUNK_BYTES, WrongBytes

OPERATION_S = 60.0
# A worker tries again at this pace while the cluster refuses.
PACE_S = 0.05


@dataclass(frozen=True)
class Job:
    """What a process does.

    `kind` is writer, mount-writer, reader, mount-reader, durable-entries, memory-entries or names. Of the numbers up to
    `files` only those up to `slotted` are files: the slots of the others are entries of the key-value cache.
    """

    kind: str
    numbers: list[int]
    files: int
    slotted: int
    own_files: list[int]
    mount_files: list[int]
    seed: int
    url: str
    token: str
    directory: str
    mountpoint: str

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @property
    def board(self) -> Path:
        """The shared board."""
        return Path(self.directory) / "board"

    def manifest(self, file: int) -> Path:
        """The manifest of a file."""
        return Path(self.directory) / f"manifest-{file}"

    @property
    def violations(self) -> Path:
        """Where violations are noted."""
        return Path(self.directory) / "violations"


def path_of(file: int) -> str:
    """The path of a slotted file in the cluster."""
    return f"/f{file}"


def open_entries(fs: FileSystem, kind: str) -> KVCache:
    """The namespace of a kind of entries. It is far from its capacity."""
    durable = kind == "durable-entries"
    return fs3.kvcache.open(
        fs,
        f"/{kind}",
        durable=durable,
        replicas=None if durable else 2,
        capacity=1 << 30,
        chunk_bytes=CHUNK_BYTES,
        timeout=OPERATION_S,
    )


class Handle(Protocol):
    """An open file, of either kind of client."""

    def pwrite(self, data: bytes, offset: int) -> int: ...
    def pread(self, length: int, offset: int) -> bytes: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class MountFile:
    """A file of the mount."""

    def __init__(self, path: str, write: bool) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT if write else os.O_RDONLY, 0o644)
        above = os.path.dirname(os.path.dirname(path))
        if os.fstat(self._descriptor).st_dev == os.stat(above).st_dev:
            os.close(self._descriptor)
            raise OSError(errno.ENOTCONN, "the mount is away; this is a file of the directory below it", path)

    def pwrite(self, data: bytes, offset: int) -> int:
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)
        return done

    def pread(self, length: int, offset: int) -> bytes:
        parts, done = [], 0
        while done < length and (part := os.pread(self._descriptor, length - done, offset + done)):
            parts.append(part)
            done += len(part)
        return b"".join(parts)

    def sync(self) -> None:
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class Entries:
    """Entries of the key-value cache by the offset of their slot, as an open file."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def pwrite(self, data: bytes, offset: int) -> int:
        if not self._cache.put(str(offset), data):
            raise OSError(errno.EAGAIN, "the value was not kept", str(offset))
        return len(data)

    def pread(self, length: int, offset: int) -> bytes:
        data = bytearray(length)
        found = self._cache.get_into(str(offset), data)
        if found is None:
            raise OSError(errno.EAGAIN, "no value was found", str(offset))
        return bytes(data[:found])

    def sync(self) -> None:
        """Nothing to do: there is no sync of entries."""

    def close(self) -> None:
        self._cache.close()


class Client:
    """Opens files of the cluster, natively or through the mount."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self.mounted = job.kind.startswith("mount")
        self._fs: FileSystem | None = None
        self._lock = threading.Lock()

    def filesystem(self) -> FileSystem:
        """The native connection. Raises OSError while there is none."""
        with self._lock:
            if self._fs is None:
                self._fs = fs3.connect(self._job.url, token=self._job.token, timeout_s=OPERATION_S)
            return self._fs

    def open(self, file: int, *, write: bool) -> Handle:
        """Open a slotted file, or the entries. Raises OSError."""
        if self._job.kind.endswith("entries"):
            return Entries(open_entries(self.filesystem(), self._job.kind))
        if self.mounted:
            return MountFile(self._job.mountpoint + path_of(file), write)
        fs = self.filesystem()
        if not write:
            return fs.open(path_of(file), "rb", buffering=0)
        try:
            return fs.open(path_of(file), "r+b", buffering=0)
        except FileNotFoundError:
            return fs.open(path_of(file), "w+b", buffering=0)


class Worker:
    """What all workers have in common: the board, pausing, noting."""

    def __init__(self, job: Job, number: int, client: Client) -> None:
        self.job, self.number, self.client = job, number, client
        self.board = Board(job.board, job.files)
        self.rng = random.Random(job.seed * 1000 + number)
        self.operations = self.board.counted(number)

    def run(self) -> None:
        """Work until stopped."""
        try:
            while not self.board.stop:
                if self.board.pause:
                    self.settle()
                    self.board.rest(self.number, True)
                    while self.board.pause and not self.board.stop:
                        time.sleep(PACE_S)
                    self.board.rest(self.number, False)
                    continue
                try:
                    self.step()
                except WrongBytes as e:
                    self.violation(str(e))
                except OSError as e:
                    self.refused(e)
        except BaseException:
            self.violation(traceback.format_exc())

    def step(self) -> None:
        """One operation."""
        raise NotImplementedError

    def settle(self) -> None:
        """Bring it to an end before a rest."""

    def refused(self, error: OSError) -> None:
        """An operation failed; faults may do that."""
        with (Path(self.job.directory) / f"errors-{self.number}").open("a") as log:
            print(f"{time.time():.3f} {type(error).__name__} {error.errno} {error}", file=log)
        time.sleep(PACE_S)

    def violation(self, text: str) -> None:
        """Something happened that must never happen."""
        journal = manifest.Journal(self.job.violations)
        journal.add({"worker": f"{self.job.kind} {self.number}", "at": time.time(), "text": text})
        journal.sync()
        journal.close()

    def done(self) -> None:
        """An operation was acknowledged."""
        self.operations += 1
        self.board.count(self.number, self.operations)
