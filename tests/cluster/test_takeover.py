"""A daemon that takes the place of another while programs use the mount."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

import hf3fs_fuse.io as h3
from fs3.core.errors import Fs3Error
from fs3.fuse import parse_options, take_over
from fs3.fuse.handover import Predecessor
from fs3.fuse.serve import door_file
from fs3.fuse.table import Daemon, default_file, real_path
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until

from .busy import KINDS, block, home_of
from .mounts import mounted
from .successor import AFTER, BEFORE
from .test_ring import make_ring, one, registered

LOOP = Path(__file__).parent.parent / "ring" / "loop.py"
BUSY = Path(__file__).parent / "busy.py"
SUCCESSOR = Path(__file__).parent / "successor.py"
# Needs more than one message to hand over.
PIECES = 300


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pid files and sockets of the mounts of a test; long names are no hindrance."""
    directory = tmp_path / ("run-" + "x" * 100)
    monkeypatch.setenv("FS3_RUN_DIR", str(directory))
    return directory


@pytest.fixture
def mount_a(shared_cluster: LocalCluster, tmp_path: Path, run_directory: Path) -> Iterator[Path]:
    with mounted(shared_cluster, tmp_path / "a") as path:
        yield path


def daemon_of(mountpoint: Path) -> Daemon:
    found = Daemon.load(default_file(real_path(str(mountpoint)), ".pid"))
    assert found is not None
    return found


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    opened = os.open(path, flags, 0o644)
    try:
        yield opened
    finally:
        os.close(opened)


def test_open_files_directories_and_mappings_go_on(mount_a: Path) -> None:
    old = daemon_of(mount_a)
    names = [f"n{number:04}" for number in range(3000)]
    (mount_a / "many").mkdir()
    for name in names:
        (mount_a / "many" / name).touch()
    (mount_a / "mapped").write_bytes(b"m" * 8192)
    with (
        descriptor(mount_a / "both", os.O_RDWR | os.O_CREAT) as both,
        descriptor(mount_a / "gone", os.O_RDWR | os.O_CREAT) as gone,
        descriptor(mount_a / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND) as log,
        descriptor(mount_a / "mapped", os.O_RDWR) as mapped,
        mmap.mmap(mapped, 8192) as memory,
        os.scandir(mount_a / "many") as listing,
    ):
        os.write(both, b"before ")
        os.write(gone, b"unlinked")
        (mount_a / "gone").unlink()
        os.write(log, b"one\n")
        memory[0:3] = b"new"
        seen = [next(listing).name for _ in range(100)]

        take_over(str(mount_a))

        new = daemon_of(mount_a)
        assert new.pid != old.pid
        os.write(both, b"after")
        assert os.pread(both, 100, 0) == b"before after"
        assert os.pread(gone, 100, 0) == b"unlinked"
        os.pwrite(gone, b"U", 0)
        os.fsync(gone)
        assert os.pread(gone, 100, 0) == b"Unlinked"
        os.write(log, b"two\n")
        assert memory[0:4] == b"newm"
        memory[8191:] = b"!"
        memory.flush()
        assert [*seen, *(entry.name for entry in listing)] == names
        wait_until(lambda: not old.alive(), timeout_s=60, what="the end of the old daemon")
        assert os.pread(gone, 100, 0) == b"Unlinked"
        os.write(both, b" all")
    assert (mount_a / "both").read_bytes() == b"before after all"
    assert (mount_a / "log").read_bytes() == b"one\ntwo\n"
    assert (mount_a / "mapped").read_bytes() == b"new" + b"m" * 8188 + b"!"
    assert daemon_of(mount_a).pid == new.pid, "the old one did not take the new one's pid file away"


def test_locks_stay_held_and_waits_go_on(mount_a: Path, shared_cluster: LocalCluster, tmp_path: Path) -> None:
    with (
        mounted(shared_cluster, tmp_path / "b") as mount_b,
        descriptor(mount_a / "flock", os.O_RDWR | os.O_CREAT) as mine,
        descriptor(mount_b / "flock", os.O_RDWR) as other,
        descriptor(mount_a / "records", os.O_RDWR | os.O_CREAT) as records,
        descriptor(mount_b / "records", os.O_RDWR) as wanted,
    ):
        fcntl.flock(mine, fcntl.LOCK_EX)
        fcntl.lockf(wanted, fcntl.LOCK_EX, 10)
        waited: list[BaseException | None] = []

        def wait() -> None:
            try:
                fcntl.lockf(records, fcntl.LOCK_EX, 10)
                waited.append(None)
            except BaseException as e:
                waited.append(e)

        thread = threading.Thread(target=wait)
        thread.start()
        try:
            wait_until(lambda: waits_in_fcntl(thread), timeout_s=30, what="the wait for the lock")
            for _ in range(2):
                take_over(str(mount_a))
                with pytest.raises(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
                assert not waited
        finally:
            fcntl.lockf(wanted, fcntl.LOCK_UN, 10)
            thread.join(60)
        assert waited == [None]
        with pytest.raises(BlockingIOError):
            fcntl.lockf(wanted, fcntl.LOCK_EX | fcntl.LOCK_NB, 5)
        fcntl.flock(mine, fcntl.LOCK_UN)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def waits_in_fcntl(thread: threading.Thread) -> bool:
    """Whether a thread of this process is blocked in fcntl(2)."""
    return Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().startswith("72 ")


def test_programs_that_work_do_not_notice(mount_a: Path) -> None:
    stop, failures, rounds = threading.Event(), [], [0, 0]

    def work(number: int) -> None:
        home = mount_a / f"work-{number}"
        home.mkdir()
        with descriptor(home / "kept", os.O_RDWR | os.O_CREAT) as kept:
            while not stop.is_set():
                data = f"{number}-{rounds[number]}".encode()
                try:
                    os.pwrite(kept, data, 0)
                    os.ftruncate(kept, len(data))
                    (home / "new").write_bytes(data)
                    (home / "new").replace(home / "last")
                    if os.pread(kept, 100, 0) != data or (home / "last").read_bytes() != data:
                        failures.append(f"{data!r} was not read again")
                except OSError as e:
                    failures.append(repr(e))
                rounds[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            before = list(rounds)
            take_over(str(mount_a))
            wait_until(
                lambda before=before: all(now > was + 1 for now, was in zip(rounds, before, strict=True)),
                timeout_s=60,
                what="further work",
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert failures == []


def test_a_successor_that_dies_leaves_the_mount_to_its_predecessor(mount_a: Path) -> None:
    old = daemon_of(mount_a)
    with descriptor(mount_a / "file", os.O_RDWR | os.O_CREAT) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, b"one")
        with Predecessor(door_file(real_path(str(mount_a)))) as predecessor:
            state, descriptors = predecessor.hand_over(bytes(16))
            for device in descriptors:
                os.close(device)
        assert len(json.loads(state)["handles"]) == 1
        os.write(file, b" two")
        assert os.pread(file, 100, 0) == b"one two"
        with descriptor(mount_a / "file", os.O_RDWR) as again, pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert daemon_of(mount_a).pid == old.pid


@pytest.fixture
def no_tracker() -> Iterator[None]:
    """Python keeps a process that watches over shared memory: end it with the test."""
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@contextmanager
def looping(mount: Path, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that reads and writes through rings until `directory`/stop is there."""
    process = subprocess.Popen([sys.executable, LOOP, mount, directory], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def await_rounds(process: subprocess.Popen[str], directory: Path, more: int, name: str = "rounds") -> None:
    """Wait until it has done `more` rounds than now."""
    file = directory / name

    def rounds() -> int:
        return int(file.read_text() or "0") if file.exists() else 0

    wanted = rounds() + more
    wait_until(lambda: process.poll() is not None or rounds() >= wanted, timeout_s=120, what="further rounds")
    if process.poll() is not None:
        pytest.fail(str(process.communicate()))


def links(mount: Path) -> dict[str, tuple[object, ...]]:
    """What processes announced, all that is to be seen of it."""
    seen = {}
    for entry in os.scandir(mount / "3fs-virt" / "iovs"):
        with contextlib.suppress(FileNotFoundError):  # withdrawn meanwhile
            found = entry.stat(follow_symlinks=False)
            seen[entry.name] = (os.readlink(entry.path), found.st_ino, found.st_uid, found.st_mtime_ns)
    return seen


def test_programs_with_rings_do_not_notice(mount_a: Path, tmp_path: Path, no_tracker: None) -> None:
    with looping(mount_a, tmp_path) as process:
        await_rounds(process, tmp_path, 2)
        before = links(mount_a)
        assert len(before) == 4
        for _ in range(2):
            take_over(str(mount_a))
            await_rounds(process, tmp_path, 3)
            assert links(mount_a) == before
        (tmp_path / "stop").touch()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert links(mount_a) == {}


def test_what_a_killed_process_announced_to_a_predecessor_is_withdrawn(mount_a: Path, tmp_path: Path) -> None:
    with looping(mount_a, tmp_path) as process:
        await_rounds(process, tmp_path, 1)
        take_over(str(mount_a))
        assert len(links(mount_a)) == 4
        process.kill()
        process.wait()
        wait_until(lambda: links(mount_a) == {}, timeout_s=30, what="the withdrawal of what it announced")


def test_any_number_of_pieces_of_memory_goes_on(mount_a: Path, no_tracker: None) -> None:
    (mount_a / "file").write_bytes(b"abcd" * 1024)
    memory = SharedMemory(create=True, size=4096)
    announced = [mount_a / "3fs-virt" / "iovs" / str(uuid.uuid4()) for _ in range(PIECES)]
    for link in announced:
        link.symlink_to(f"/dev/shm/{memory.name}")
    iov = h3.make_iovec(memory, str(mount_a))
    memory.unlink()
    before = links(mount_a)
    assert len(before) == PIECES + 1
    with registered(mount_a / "file", os.O_RDONLY) as file:
        take_over(str(mount_a))
        assert links(mount_a) == before
        ring = make_ring(mount_a)
        assert one(ring, iov[:], file, 0) == 4096
        assert memory.buf == b"abcd" * 1024
        for link in announced:
            link.unlink()
        assert one(ring, iov[:10], file, 2) == 10
    del ring
    iov.withdraw()
    assert links(mount_a) == {}
    del iov
    memory.close()


def test_a_successor_that_dies_leaves_rings_to_its_predecessor(mount_a: Path, tmp_path: Path) -> None:
    with looping(mount_a, tmp_path) as process:
        for _ in range(2):
            await_rounds(process, tmp_path, 2)
            with Predecessor(door_file(real_path(str(mount_a)))) as predecessor:
                state, descriptors = predecessor.hand_over(bytes(16))
                for descriptor in descriptors:
                    os.close(descriptor)
            assert len(json.loads(state)["virt"]["links"]) == 4
        await_rounds(process, tmp_path, 2)
        take_over(str(mount_a))
        await_rounds(process, tmp_path, 2)
        (tmp_path / "stop").touch()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


@contextmanager
def busy(mount: Path, directory: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes that use the mount until `directory`/stop is there; one of them waits for the lock of `locked`."""
    command = [sys.executable, BUSY]
    running = {
        kind: subprocess.Popen([*command, kind, mount, directory], stdout=subprocess.PIPE, text=True) for kind in KINDS
    }
    try:
        for kind, process in running.items():
            await_rounds(process, directory, 0 if kind == "locking" else 2, kind)
        yield running
    finally:
        for process in running.values():
            process.kill()
            # One whose call is never answered cannot even be killed.
            process.wait(timeout=60)
            assert process.stdout is not None
            process.stdout.close()


@contextmanager
def locked(mount: Path, directory: Path) -> Iterator[int]:
    """A file with a lock, on a mount that may end."""
    home = home_of("locking", mount, directory)
    home.mkdir()
    opened = os.open(home / "locked", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX)
        yield opened
    finally:
        with contextlib.suppress(OSError):
            os.close(opened)


@contextmanager
def successor_at(step: str, mount: Path) -> Iterator[None]:
    """A successor that has come to a step of its takeover, and is killed there."""
    command = [sys.executable, SUCCESSOR, mount, step]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{step}\n"
        yield
    finally:
        process.kill()
        process.communicate()


def has_device(daemon: Daemon) -> bool:
    """Whether a daemon has the device of the kernel open."""
    for opened in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(opened) == "/dev/fuse":
                return True
    return False


def test_programs_do_not_notice_a_successor_that_is_killed_before_it_has_the_mount(
    mount_a: Path, tmp_path: Path
) -> None:
    old = daemon_of(mount_a)
    with (
        locked(mount_a, tmp_path) as lock,
        looping(mount_a, tmp_path) as ring,
        busy(mount_a, tmp_path) as running,
    ):
        for step in BEFORE:
            with successor_at(step, mount_a):
                pass
            await_rounds(ring, tmp_path, 2)
            for kind in running.keys() - {"locking"}:
                await_rounds(running[kind], tmp_path, 3, kind)
        assert daemon_of(mount_a).pid == old.pid
        fcntl.lockf(lock, fcntl.LOCK_UN)
        await_rounds(running["locking"], tmp_path, 1, "locking")
        take_over(str(mount_a))
        (tmp_path / "stop").touch()
        assert {kind: process.wait(60) for kind, process in running.items()} == dict.fromkeys(KINDS, 0)
        _, errors = ring.communicate(timeout=60)
        assert ring.returncode == 0, errors


@pytest.mark.parametrize("step", AFTER)
def test_calls_end_when_a_successor_is_killed_that_has_the_mount(
    shared_cluster: LocalCluster, tmp_path: Path, run_directory: Path, step: str
) -> None:
    with mounted(shared_cluster, tmp_path / step) as mount:
        old = daemon_of(mount)
        with (
            locked(mount, tmp_path),
            looping(mount, tmp_path) as ring,
            busy(mount, tmp_path) as running,
        ):
            with successor_at(step, mount):
                wait_until(lambda: not has_device(old), timeout_s=30, what="the departure of the old daemon")
                assert old.alive(), "the device is closed before the daemon ends"
            assert {kind: process.wait(60) for kind, process in running.items()} == dict.fromkeys(KINDS, 3)
            told = {process.stdout.readline() for process in running.values() if process.stdout is not None}
            assert told <= {"ENOTCONN\n", "ECONNABORTED\n"}
            ring.communicate(timeout=60)
            assert ring.returncode == 1
    with mounted(shared_cluster, tmp_path / step) as mount:
        last = int((tmp_path / "writing").read_text())
        for name in ("written", "whole"):
            assert (home_of("writing", mount, tmp_path) / name).read_bytes() in (block(last) * 16, block(last + 1) * 16)


def test_options_may_change_but_not_what_the_kernel_was_told(mount_a: Path) -> None:
    with pytest.raises(Fs3Error, match="read_only holds as long as the mount"):
        take_over(str(mount_a), options=lambda old: parse_options("ro", base=old))
    take_over(str(mount_a), options=lambda old: parse_options("max_memory_bytes=64MiB", base=old))
    with Predecessor(door_file(real_path(str(mount_a)))) as predecessor:
        assert predecessor.parameters()["options"]["max_memory_bytes"] == 64 << 20
    (mount_a / "works").write_bytes(b"x")


def test_there_has_to_be_a_mount(tmp_path: Path) -> None:
    with pytest.raises(Fs3Error, match="no fs3 is mounted"):
        take_over(str(tmp_path))
