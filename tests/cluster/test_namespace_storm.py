"""Clients move, link and remove the same names through two mounts and two metadata services: the tree stays whole."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import random
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import fs3
from fs3.client import FileSystem
from fs3.testing.process import wait_until
from tests.cluster.command import fs3_command
from tests.cluster.conftest import QUICK, MakeCluster
from tests.cluster.mounts import mounted

SEED = int(os.environ.get("FS3_STORM_SEED", "1"))
OPERATIONS = int(os.environ.get("FS3_STORM_OPERATIONS", "250"))
WORKERS_PER_CLIENT = 2
JOIN_S = 300.0
COLLECTED_S = 60.0
CACHED_S = 30.0

DIRECTORIES = ("d0", "d1", "d2", "d3", "d4")
# Only ever moved to free names and exchanged with each other: every one of them has to be there in the end.
TREASURES = tuple(f"t{i}" for i in range(12))
# Made, linked, replaced and removed.
JUNK = tuple(f"j{i}" for i in range(6))
DEPTH_MAX = 4

# What losing a race looks like.
LOST_RACES = frozenset(
    {
        errno.ENOENT,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.EINVAL,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ESTALE,
    }
)

# Inode, type and link count by path.
Tree = dict[str, tuple[int, int, int]]


class Client(Protocol):
    """What a worker calls; paths are relative to the top."""

    def listdir(self, path: str) -> list[str]: ...
    def create(self, path: str, data: bytes) -> None: ...
    def mkdir(self, path: str) -> None: ...
    def rmdir(self, path: str) -> None: ...
    def remove(self, path: str) -> None: ...
    def link(self, path: str, to: str) -> None: ...
    def rename(self, path: str, to: str) -> None:
        """Without replacing anything."""

    def replace(self, path: str, to: str) -> None: ...
    def exchange(self, path: str, to: str) -> None: ...


class Native:
    """A Python client that knows one metadata service first."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self.listdir, self.mkdir, self.rmdir, self.remove = fs.listdir, fs.mkdir, fs.rmdir, fs.remove
        self.link, self.rename, self.replace, self.exchange = fs.link, fs.rename, fs.replace, fs.exchange

    def create(self, path: str, data: bytes) -> None:
        with self.fs.open(path, "xb") as file:
            file.write(data)


_libc = ctypes.CDLL(None, use_errno=True)


class Mounted:
    """A mount."""

    def __init__(self, top: Path) -> None:
        self.top = top

    def _at(self, path: str) -> str:
        return f"{self.top}/{path}"

    def listdir(self, path: str) -> list[str]:
        return os.listdir(self._at(path))

    def create(self, path: str, data: bytes) -> None:
        with open(self._at(path), "xb") as file:
            file.write(data)

    def mkdir(self, path: str) -> None:
        os.mkdir(self._at(path))

    def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    def remove(self, path: str) -> None:
        os.remove(self._at(path))

    def link(self, path: str, to: str) -> None:
        os.link(self._at(path), self._at(to))

    def _rename(self, path: str, to: str, flags: int) -> None:
        if _libc.renameat2(-100, os.fsencode(self._at(path)), -100, os.fsencode(self._at(to)), flags):
            raise OSError(ctypes.get_errno(), "renameat2")

    def rename(self, path: str, to: str) -> None:
        self._rename(path, to, 1)

    def replace(self, path: str, to: str) -> None:
        self._rename(path, to, 0)

    def exchange(self, path: str, to: str) -> None:
        self._rename(path, to, 2)


class Worker(threading.Thread):
    """One of many; losing a race is fine, any other error is not."""

    def __init__(self, client: Client, seed: int) -> None:
        super().__init__(name=f"storm-{seed}")
        self._client = client
        self._rng = random.Random(seed)
        self.succeeded = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(OPERATIONS):
                try:
                    self._step()
                    self.succeeded += 1
                except OSError as exc:
                    if exc.errno not in LOST_RACES:
                        raise
        except BaseException as exc:
            self.failure = exc

    def _directory(self) -> tuple[str, list[str]]:
        """A directory on a random way down, with its names."""
        path, names = "", self._client.listdir("")
        while (below := [n for n in names if n in DIRECTORIES]) and path.count("/") < DEPTH_MAX:
            if self._rng.random() < 0.3:
                break
            path += self._rng.choice(below) + "/"
            names = self._client.listdir(path)
        return path, names

    def _existing(self, kinds: tuple[str, ...]) -> str:
        path, names = self._directory()
        chosen = [name for name in names if name in kinds] or list(kinds)
        return path + self._rng.choice(chosen)

    def _new(self, kinds: tuple[str, ...]) -> str:
        return self._directory()[0] + self._rng.choice(kinds)

    def _step(self) -> None:
        client, rng = self._client, self._rng
        steps: list[Callable[[], None]] = [
            lambda: client.rename(self._existing(TREASURES), self._new(TREASURES)),
            lambda: client.rename(self._existing(TREASURES), self._new(TREASURES)),
            lambda: client.exchange(self._existing(TREASURES), self._existing(TREASURES)),
            lambda: client.mkdir(self._new(DIRECTORIES)),
            lambda: client.rename(self._existing(DIRECTORIES), self._new(DIRECTORIES)),
            lambda: client.exchange(self._existing(DIRECTORIES), self._existing(DIRECTORIES)),
            lambda: client.replace(self._existing(DIRECTORIES), self._existing(DIRECTORIES)),
            lambda: client.rmdir(self._existing(DIRECTORIES)),
            lambda: client.create(self._new(JUNK), rng.randbytes(rng.randrange(3000))),
            lambda: client.link(self._existing(JUNK), self._new(JUNK)),
            lambda: client.replace(self._existing(JUNK), self._new(JUNK)),
            lambda: client.remove(self._existing(JUNK)),
        ]
        rng.choice(steps)()


def tree_of(client: Client, top: Path | None, fs: FileSystem) -> Tree:
    """What one client sees; `top` is its mount."""
    found: Tree = {}
    todo = [""]
    while todo:
        path = todo.pop()
        for name in client.listdir(path):
            below = path + name
            attributes = os.lstat(top / below) if top is not None else fs.lstat(below)
            found[below] = (attributes.st_ino, stat.S_IFMT(attributes.st_mode), attributes.st_nlink)
            if stat.S_ISDIR(attributes.st_mode):
                todo.append(f"{below}/")
    return found


def shows_tree(client: Client, top: Path, fs: FileSystem, tree: Tree) -> bool:
    """Whether a mount shows the tree; what its kernel has cached may be a second old."""
    try:
        return tree_of(client, top, fs) == tree
    except OSError as exc:
        if exc.errno not in LOST_RACES:
            raise
        return False


def inodes_of(fs: FileSystem) -> int:
    """Inodes in use."""
    found = fs.statvfs()
    return found.f_files - found.f_ffree


def check_links(tree: Tree) -> None:
    """Every link count is the number of names, or of subdirectories; every directory has one name."""
    names: dict[int, list[str]] = {}
    for path, (inode, _, _) in tree.items():
        names.setdefault(inode, []).append(path)
    for path, (inode, kind, links) in tree.items():
        if kind == stat.S_IFDIR:
            assert names[inode] == [path]
            below = [p for p in tree if p.startswith(f"{path}/") and p.count("/") == path.count("/") + 1]
            assert links == 2 + sum(tree[p][1] == stat.S_IFDIR for p in below), path
        else:
            assert links == len(names[inode]), f"{names[inode]} have link count {links}"


def test_names_stay_whole_in_a_storm_of_renames_links_and_removals(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(replace(QUICK, meta=2))
    urls = [f"fs3://127.0.0.1:{port}/" for port in cluster.meta_ports]
    with (
        fs3.connect(urls[0], token=cluster.token) as one,
        fs3.connect(urls[1], token=cluster.token) as other,
        mounted(cluster, tmp_path / "a") as a,
        mounted(cluster, tmp_path / "b") as b,
    ):
        clients: list[Client] = [Native(one), Native(other), Mounted(a), Mounted(b)]
        for name in TREASURES:
            clients[0].create(name, name.encode() * 100)
        workers = [Worker(clients[i % 4], SEED * 1000 + i) for i in range(4 * WORKERS_PER_CLIENT)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(JOIN_S)
            assert not worker.is_alive(), f"{worker.name} hangs"
        for worker in workers:
            if worker.failure is not None:
                raise worker.failure
        assert min(worker.succeeded for worker in workers) > OPERATIONS // 20
        trees = [tree_of(clients[0], None, one), tree_of(clients[1], None, other)]
        assert trees[0] == trees[1]
        check_links(trees[0])
        for top, client in ((a, clients[2]), (b, clients[3])):
            shows = partial(shows_tree, client, top, one, trees[0])
            wait_until(shows, timeout_s=CACHED_S, what="that a mount shows the tree")
        held = [path for path in trees[0] if path.rpartition("/")[2] in TREASURES]
        contents = sorted((a / path).read_bytes() for path in held)
        assert contents == sorted(name.encode() * 100 for name in TREASURES)
        inodes = len({inode for inode, _, _ in trees[0].values()}) + 1
        wait_until(lambda: inodes_of(one) == inodes, timeout_s=COLLECTED_S, what="that removed inodes are collected")
        audit = json.loads(fs3_command("admin", "fsck", str(cluster.directory), "--json").stdout)
        assert audit["findings"] == []
