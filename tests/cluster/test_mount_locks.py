"""flock(2) and fcntl(2) locks between mounts: who has them, who gets them next, and what happens when somebody dies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.conftest import QUICK, MakeCluster
from tests.cluster.mounts import mounted

KINDS = pytest.mark.parametrize("lock", [fcntl.flock, fcntl.lockf], ids=["flock", "fcntl"])
SESSION_S = 4.0
PATIENCE_S = 60.0

# Says what it does; holds what it got until its standard input ends.
HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
print("asking", flush=True)
getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX)
print("got it", flush=True)
sys.stdin.read()
"""

COUNTER = """
import fcntl, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for _ in range(int(sys.argv[3])):
    getattr(fcntl, sys.argv[2])(fd, fcntl.LOCK_EX)
    count = int(os.pread(fd, 20, 0))
    os.pwrite(fd, b"%020d" % (count + 1), 0)
    getattr(fcntl, sys.argv[2])(fd, fcntl.LOCK_UN)
"""


@pytest.fixture(scope="module")
def mounts(
    shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory, engine: str
) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster."""
    base = tmp_path_factory.mktemp("mnt")
    with (
        mounted(shared_cluster, base / "a", engine=engine) as a,
        mounted(shared_cluster, base / "b", engine=engine) as b,
    ):
        yield a, b


@pytest.fixture
def paths(mounts: tuple[Path, Path], request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A fresh file, by both mounts."""
    name = request.node.name.replace("/", "_")[:100]
    (mounts[0] / name).write_bytes(b"0" * 100)
    return mounts[0] / name, mounts[1] / name


def is_free(path: Path, lock: Callable[..., Any]) -> bool:
    """Whether somebody who opens the file could lock it."""
    with path.open("r+b") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@contextmanager
def holder(path: Path, lock: Callable[..., Any]) -> Iterator[subprocess.Popen[str]]:
    """A process that asks for a lock; it has asked when this returns."""
    arguments = [sys.executable, "-c", HOLDER, str(path), lock.__name__]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asking\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def got_it(process: subprocess.Popen[str]) -> bool:
    """Wait until it has its lock."""
    assert process.stdout is not None
    return process.stdout.readline() == "got it\n"


@KINDS
def test_a_lock_of_one_mount_holds_in_the_other(paths: tuple[Path, Path], lock: Callable[..., Any]) -> None:
    with paths[0].open("r+b") as file:
        lock(file, fcntl.LOCK_EX)
        assert not is_free(paths[1], lock)
        lock(file, fcntl.LOCK_UN)
        assert is_free(paths[1], lock)
        lock(file, fcntl.LOCK_SH)
        with paths[1].open("r+b") as other:
            lock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not is_free(paths[1], lock)
    # The kernel does not wait for the end of a flock.
    wait_until(lambda: is_free(paths[1], lock), timeout_s=PATIENCE_S, what="closing ends it")


def test_the_two_kinds_do_not_conflict(paths: tuple[Path, Path]) -> None:
    with paths[0].open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert not is_free(paths[1], fcntl.flock)
        fcntl.flock(file, fcntl.LOCK_UN)
        assert is_free(paths[1], fcntl.flock)
        assert not is_free(paths[1], fcntl.lockf)


def test_ranges_are_locked_split_and_asked_for(paths: tuple[Path, Path]) -> None:
    with paths[0].open("r+b") as file, paths[1].open("r+b") as other:
        fcntl.lockf(file, fcntl.LOCK_EX, 30, 10)
        fcntl.lockf(file, fcntl.LOCK_UN, 10, 20)
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 20)
        for start, length in ((10, 1), (19, 2), (39, 100)):
            with pytest.raises(BlockingIOError):
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        layout = "hhqqi4x"
        asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 30, 5, 0)
        kind, _, start, length, _ = struct.unpack(layout, fcntl.fcntl(other, fcntl.F_GETLK, asked))
        assert (kind, start, length) == (fcntl.F_WRLCK, 30, 10)
        asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 40, 0, 0)
        assert struct.unpack(layout, fcntl.fcntl(other, fcntl.F_GETLK, asked))[0] == fcntl.F_UNLCK


@KINDS
def test_a_process_that_waits_gets_the_lock_when_it_is_free(paths: tuple[Path, Path], lock: Callable[..., Any]) -> None:
    with paths[0].open("r+b") as file:
        lock(file, fcntl.LOCK_EX)
        with holder(paths[1], lock) as waiting:
            lock(file, fcntl.LOCK_UN)
            assert got_it(waiting)
            assert not is_free(paths[0], lock)
        wait_until(lambda: is_free(paths[0], lock), timeout_s=PATIENCE_S, what="the end of a dead process' lock")


@KINDS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_signal_ends_the_wait(paths: tuple[Path, Path], lock: Callable[..., Any], number: signal.Signals) -> None:
    with paths[0].open("r+b") as file:
        lock(file, fcntl.LOCK_EX)
        with holder(paths[1], lock) as waiting:
            waiting.send_signal(number)
            assert waiting.wait(PATIENCE_S) == -number
    with paths[1].open("r+b") as file:
        lock(file, fcntl.LOCK_EX)


def test_descriptors_of_readers_count_too(paths: tuple[Path, Path]) -> None:
    with paths[0].open("rb") as reader:
        fcntl.lockf(reader, fcntl.LOCK_SH)
        assert not is_free(paths[1], fcntl.lockf)
        # POSIX: the close of any descriptor of the file ends the locks of the process.
        paths[0].open("rb").close()
        wait_until(lambda: is_free(paths[1], fcntl.lockf), timeout_s=PATIENCE_S, what="the end of the lock")


def test_a_copy_of_the_descriptor_keeps_a_flock(paths: tuple[Path, Path]) -> None:
    file = os.open(paths[0], os.O_RDWR)
    fcntl.flock(file, fcntl.LOCK_EX)
    copy = os.dup(file)
    os.close(file)
    assert not is_free(paths[1], fcntl.flock)
    os.close(copy)
    wait_until(lambda: is_free(paths[1], fcntl.flock), timeout_s=PATIENCE_S, what="the end of the lock")


@KINDS
def test_what_was_written_under_the_lock_is_seen_by_the_next(
    paths: tuple[Path, Path], lock: Callable[..., Any]
) -> None:
    paths[0].write_bytes(b"%020d" % 0)
    counts = 25
    with ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen([sys.executable, "-c", COUNTER, str(path), lock.__name__, str(counts)])
            )
            for path in (*paths, *paths)
        ]
        for process in running:
            assert process.wait(PATIENCE_S) == 0
    assert int(paths[0].read_bytes()) == counts * len(running)


def test_local_locks_stay_in_their_mount(
    shared_cluster: LocalCluster, paths: tuple[Path, Path], tmp_path: Path, engine: str
) -> None:
    with mounted(shared_cluster, tmp_path / "local", "locallocks", engine=engine) as local:
        path = local / paths[0].name
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert not is_free(path, fcntl.flock)
            assert is_free(paths[0], fcntl.flock)


@pytest.fixture
def quick(make_cluster: MakeCluster) -> LocalCluster:
    """A cluster that soon gives up clients that are silent."""
    return make_cluster(replace(QUICK, session_ms=int(SESSION_S * 1000)))


def daemon_of(cluster: LocalCluster, name: str) -> int:
    """The process behind a mount of :func:`mounted`."""
    return int(json.loads((cluster.directory / f"mount-{name}.pid").read_text())["pid"])


@KINDS
def test_locks_of_a_killed_mount_are_given_to_those_who_wait(
    quick: LocalCluster, tmp_path: Path, lock: Callable[..., Any]
) -> None:
    with mounted(quick, tmp_path / "a") as a, mounted(quick, tmp_path / "b") as b:
        (a / "f").write_bytes(b"x")
        held = os.open(a / "f", os.O_RDWR)
        lock(held, fcntl.LOCK_EX)
        with holder(b / "f", lock) as waiting:
            os.kill(daemon_of(quick, "a"), signal.SIGKILL)
            assert got_it(waiting)
        with pytest.raises(OSError, match="not connected"):
            os.close(held)


def test_who_waits_goes_on_waiting_when_the_metadata_service_is_killed(quick: LocalCluster, tmp_path: Path) -> None:
    with mounted(quick, tmp_path / "a") as a, mounted(quick, tmp_path / "b") as b:
        (a / "f").write_bytes(b"x")
        with (a / "f").open("r+b") as file, holder(b / "f", fcntl.flock) as first:
            assert got_it(first)
            with holder(a / "f", fcntl.flock) as second:
                quick.kill("meta-1")
                quick.start("meta-1")
                with pytest.raises(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                assert first.stdin is not None
                first.stdin.close()
                assert got_it(second)


def test_a_mount_that_reaches_no_service_fails_rather_than_pretend(quick: LocalCluster, tmp_path: Path) -> None:
    with mounted(quick, tmp_path / "a") as a:
        (a / "f").write_bytes(b"x")
        file = os.open(a / "f", os.O_RDWR)
        with (a / "f").open("r+b", buffering=0) as other:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert os.pread(file, 1, 0) == b"x"
            quick.kill("meta-1", signal.SIGSTOP)

            def fails() -> bool:
                try:
                    os.pwrite(file, b"y", 0)
                except OSError as e:
                    return e.errno == errno.EIO
                return False

            wait_until(fails, timeout_s=PATIENCE_S, what="the end of the lease")
            quick.kill("meta-1", signal.SIGCONT)
            wait_until(lambda: is_free(a / "f", fcntl.flock), timeout_s=PATIENCE_S, what="the end of the lock")
            assert fails(), "what is lost stays lost"
            with pytest.raises(OSError, match="Input/output error"):
                fcntl.flock(file, fcntl.LOCK_EX)
            os.pwrite(other.fileno(), b"z", 0)
            assert os.pread(other.fileno(), 1, 0) == b"z"
        with pytest.raises(OSError, match="Input/output error"):
            os.close(file)
        assert (a / "f").read_bytes() == b"z"
