"""Appends through several mounts and the Python client at the same time: each lands whole, at a place of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest

import fs3
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.command import fs3_command
from tests.cluster.conftest import QUICK, MakeCluster
from tests.cluster.mounts import mounted

PATIENCE_S = 120.0
MIB = 1 << 20

APPENDER = """
import os, sys
path, writer, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_WRONLY | os.O_APPEND)
for number in range(count):
    line = b"%d:%d:%s\\n" % (writer, number, b"x" * (number * 131 % 5003))
    assert os.write(fd, line) == len(line)
    if number % 29 == writer:
        os.fsync(fd)
os.close(fd)
"""


def line(writer: int, number: int) -> bytes:
    """What APPENDER writes."""
    return b"%d:%d:%s\n" % (writer, number, b"x" * (number * 131 % 5003))


class Client(threading.Thread):
    """Appends through the Python client; ``acknowledged`` counts its lines."""

    def __init__(self, cluster: LocalCluster, path: str, writer: int, count: int) -> None:
        super().__init__()
        self._cluster = cluster
        self._path = path
        self._writer = writer
        self._count = count
        self.acknowledged = 0

    def run(self) -> None:
        """Append all lines."""
        with (
            fs3.connect(self._cluster.url, token=self._cluster.token) as fs,
            fs.open(self._path, "ab", buffering=0) as file,
        ):
            for number in range(self._count):
                file.write(line(self._writer, number))
                self.acknowledged = number + 1


@pytest.fixture(scope="module")
def mounts(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster."""
    base = tmp_path_factory.mktemp("mnt")
    with mounted(shared_cluster, base / "a") as a, mounted(shared_cluster, base / "b") as b:
        yield a, b


@contextmanager
def appender(path: Path, writer: int, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that appends; it ends with the block."""
    child = subprocess.Popen([sys.executable, "-c", APPENDER, str(path), str(writer), str(count)])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def append_durably(file: BinaryIO, data: bytes) -> int:
    """Append and sync; returns the error number, 0 when both succeed."""
    try:
        file.write(data)
        os.fsync(file.fileno())
    except OSError as exc:
        return exc.errno or -1
    return 0


def check(data: bytes, counts: list[int]) -> None:
    """Every line is there once, whole, in the order of its writer, and nothing else."""
    following = [0] * len(counts)
    for found in data.splitlines(keepends=True):
        writer = int(found[: found.index(b":")]) if b":" in found[:3] else -1
        assert 0 <= writer < len(counts), found[:40]
        assert found == line(writer, following[writer])
        following[writer] += 1
    assert following == counts


def test_no_append_is_lost_or_torn_when_metadata_services_are_killed(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster(replace(QUICK, meta=2))
    counts = [500, 500, 500, 500, 150]
    with ExitStack() as stack:
        logs = [stack.enter_context(mounted(cluster, tmp_path / name)) / "log" for name in "ab"]
        logs[0].touch()
        children = [stack.enter_context(appender(logs[i % 2], i, counts[i])) for i in range(4)]
        client = Client(cluster, "/log", 4, counts[4])
        stack.callback(client.join, PATIENCE_S)
        client.start()
        for i, killed in enumerate(("meta-1", "meta-2", "meta-1")):
            wait_until(lambda i=i: client.acknowledged > 30 * (i + 1), timeout_s=PATIENCE_S, what="appends go on")
            cluster.kill(killed)
            cluster.start(killed)
        assert [child.wait(timeout=PATIENCE_S) for child in children] == [0, 0, 0, 0]
        client.join(PATIENCE_S)
        for log in logs:
            check(log.read_bytes(), counts)


def test_a_read_through_the_same_mount_sees_every_append_that_returned(mounts: tuple[Path, Path]) -> None:
    ours, theirs = (mount / "seen" for mount in mounts)
    with ours.open("a+b", buffering=0) as file, appender(theirs, 1, 400) as other:
        for number in range(60):
            file.write(line(0, number))
            assert os.fstat(file.fileno()).st_size >= sum(len(line(0, n)) for n in range(number + 1))
            found = os.pread(file.fileno(), 4 * MIB, 0) if number % 2 else ours.read_bytes()
            assert all(line(0, n) in found for n in range(number + 1))
        assert other.wait(timeout=PATIENCE_S) == 0
    check(theirs.read_bytes(), [60, 400])


def test_readers_elsewhere_never_see_zeros_while_one_mount_appends(mounts: tuple[Path, Path]) -> None:
    ours, theirs = (mount / "followed" for mount in mounts)
    ours.touch()
    expected = b"".join(line(0, number) for number in range(1500))
    with appender(ours, 0, 1500) as writer:
        ended = False
        while not ended:
            ended = writer.poll() is not None
            assert expected.startswith(theirs.read_bytes())
    assert theirs.read_bytes() == expected


def test_appends_follow_a_truncation_by_another_mount(mounts: tuple[Path, Path]) -> None:
    ours, theirs = (mount / "cut" for mount in mounts)
    ours.write_bytes(bytes(3 * MIB))
    with ours.open("ab", buffering=0) as file:
        file.write(b"old")
        os.fsync(file.fileno())
        os.truncate(theirs, 0)
        file.write(b"first\n")
        os.fsync(file.fileno())
        assert theirs.read_bytes() == b"first\n"
        os.truncate(theirs, 2)
        file.write(b"second\n")
    assert theirs.read_bytes() == ours.read_bytes() == b"fisecond\n"


def test_a_quota_refuses_appends_of_all_mounts(
    shared_cluster: LocalCluster, mounts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    ours, theirs = (mount / "limited" for mount in mounts)
    ours.mkdir()
    fs3_command("quota", "set", ":/limited", "--bytes", "8MiB")
    get = ("quota", "get", ":/limited", "--json")
    wait_until(lambda: '"active"' in fs3_command(*get).stdout, timeout_s=PATIENCE_S, what="the quota is enforced")
    piece = os.urandom(MIB // 4)
    taken = 0
    with (ours / "log").open("ab", buffering=0) as a, (theirs / "log").open("ab", buffering=0) as b:
        while append_durably((a, b)[taken % 2], piece) == 0:
            taken += 1
        assert append_durably(a, piece) == append_durably(b, piece) == errno.EDQUOT
    assert taken == 32
    assert (ours / "log").read_bytes() == piece * taken
