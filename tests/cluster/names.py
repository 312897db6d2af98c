"""Load on names that remembers what was acknowledged and how long it took, at native clients and at mounts."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fs3.client import FileSystem
from tests.cluster.writers import content

ENTRIES_MAX = 40
FILE_BYTES_MAX = 20_000
LOOK_EVERY = 10


class Names(Protocol):
    """The calls of a file system that the load makes. Paths begin with a slash."""

    def make(self, path: str, data: bytes) -> None:
        """A new file."""

    def read(self, path: str) -> bytes:
        """A whole file."""

    def mkdir(self, path: str) -> None: ...
    def replace(self, path: str, to: str) -> None: ...
    def link(self, path: str, to: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def listdir(self, path: str) -> list[str]: ...


class NativeNames:
    """By the Python client."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self.mkdir, self.replace, self.link = fs.mkdir, fs.replace, fs.link
        self.remove, self.rmdir, self.listdir = fs.remove, fs.rmdir, fs.listdir

    def make(self, path: str, data: bytes) -> None:
        with self._fs.open(path, "xb") as file:
            file.write(data)

    def read(self, path: str) -> bytes:
        with self._fs.open(path, "rb") as file:
            return bytes(file.read())


class MountedNames:
    """By system calls on a mount."""

    def __init__(self, mountpoint: Path) -> None:
        self._top = str(mountpoint)

    def make(self, path: str, data: bytes) -> None:
        with open(self._top + path, "xb") as file:
            file.write(data)

    def read(self, path: str) -> bytes:
        return Path(self._top + path).read_bytes()

    def mkdir(self, path: str) -> None:
        os.mkdir(self._top + path)

    def replace(self, path: str, to: str) -> None:
        os.replace(self._top + path, self._top + to)

    def link(self, path: str, to: str) -> None:
        os.link(self._top + path, self._top + to)

    def remove(self, path: str) -> None:
        os.remove(self._top + path)

    def rmdir(self, path: str) -> None:
        os.rmdir(self._top + path)

    def listdir(self, path: str) -> list[str]:
        return os.listdir(self._top + path)


@dataclass(frozen=True)
class Call:
    """An acknowledged call, on the monotonic clock in seconds."""

    kind: str
    began_s: float
    ended_s: float

    @property
    def took_s(self) -> float:
        """How long the caller waited."""
        return self.ended_s - self.began_s


class NameLoad(threading.Thread):
    """Makes, links, moves, reads and removes in a directory of its own; every call has to succeed.

    ``there`` maps the names to what they hold: the seed and length of a file's content, None for a directory.
    """

    def __init__(self, names: Names, home: str, seed: int) -> None:
        super().__init__(name=f"names-{home}")
        self.home = home
        self.there: dict[str, tuple[str, int] | None] = {}
        self.calls: list[Call] = []
        self.failure: BaseException | None = None
        self.stopping = threading.Event()
        self._names = names
        self._rng = random.Random(seed)
        self._made = 0

    def run(self) -> None:
        """Work until stopped, or until something fails."""
        try:
            self._names.mkdir(self.home)
            while not self.stopping.is_set():
                self._step()
                if len(self.calls) % LOOK_EVERY == 0:
                    self._look()
        except BaseException as e:
            self.failure = e

    def finish(self) -> None:
        """Stop, and raise what went wrong."""
        self.stopping.set()
        self.join(timeout=120)
        assert not self.is_alive(), f"{self.name} hangs"
        if self.failure is not None:
            raise self.failure

    def _call(self, kind: str, work: Callable[[], object]) -> None:
        began_s = time.monotonic()
        work()
        self.calls.append(Call(kind, began_s, time.monotonic()))

    def _new(self) -> str:
        self._made += 1
        return f"e{self._made}"

    def _path(self, name: str) -> str:
        return f"{self.home}/{name}"

    def _step(self) -> None:
        files = [name for name, held in self.there.items() if held is not None]
        directories = [name for name, held in self.there.items() if held is None]
        choices: list[Callable[[], None]] = []
        if len(self.there) < ENTRIES_MAX:
            choices += [self._make, self._make, self._make_directory]
        if files:
            chosen = self._rng.choice(files)
            choices += [lambda: self._remove(chosen), lambda: self._read(chosen), lambda: self._link(chosen)]
        if len(files) > 1:
            choices.append(lambda: self._replace(*self._rng.sample(files, 2)))
        if self.there:
            choices.append(lambda: self._move(self._rng.choice(list(self.there))))
        if directories:
            choices.append(lambda: self._remove_directory(self._rng.choice(directories)))
        self._rng.choice(choices)()

    def _make(self) -> None:
        name, length = self._new(), self._rng.randrange(FILE_BYTES_MAX)
        held = (self._path(name), length)
        self._call("make", lambda: self._names.make(self._path(name), content(*held)))
        self.there[name] = held

    def _make_directory(self) -> None:
        name = self._new()
        self._call("mkdir", lambda: self._names.mkdir(self._path(name)))
        self.there[name] = None

    def _read(self, name: str) -> None:
        held = self.there[name]
        assert held is not None
        data: list[bytes] = []
        self._call("read", lambda: data.append(self._names.read(self._path(name))))
        assert data[0] == content(*held), f"{self._path(name)} has other bytes than were written"

    def _link(self, name: str) -> None:
        if len(self.there) < ENTRIES_MAX:
            to = self._new()
            self._call("link", lambda: self._names.link(self._path(name), self._path(to)))
            self.there[to] = self.there[name]

    def _move(self, name: str) -> None:
        to = self._new()
        self._call("rename", lambda: self._names.replace(self._path(name), self._path(to)))
        self.there[to] = self.there.pop(name)

    def _replace(self, name: str, to: str) -> None:
        self._call("rename", lambda: self._names.replace(self._path(name), self._path(to)))
        # Two names of one file: rename leaves both.
        if self.there[name] != self.there[to]:
            self.there[to] = self.there.pop(name)

    def _remove(self, name: str) -> None:
        self._call("remove", lambda: self._names.remove(self._path(name)))
        del self.there[name]

    def _remove_directory(self, name: str) -> None:
        self._call("rmdir", lambda: self._names.rmdir(self._path(name)))
        del self.there[name]

    def _look(self) -> None:
        listed: list[list[str]] = []
        self._call("list", lambda: listed.append(self._names.listdir(self.home)))
        self._compare_names(listed[0])

    def _compare_names(self, listed: list[str]) -> None:
        missing, strange = self.there.keys() - set(listed), set(listed) - self.there.keys()
        assert not missing, f"{self.home}: {sorted(missing)} were acknowledged and are not there"
        assert not strange, f"{self.home}: {sorted(strange)} were removed or never made"

    def verify(self, names: Names) -> None:
        """Compare every name and every byte with what was acknowledged."""
        self._compare_names(names.listdir(self.home))
        for name, held in self.there.items():
            if held is not None:
                assert names.read(self._path(name)) == content(*held), f"{self._path(name)} has other bytes"
