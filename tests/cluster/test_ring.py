"""User-space I/O through the shared-memory ring of a mount (docs/usrbio.md): C programs, Python, and hostile ones."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

import hf3fs_fuse.io as h3
import hf3fs_py_usrbio
from fs3.core.errors import NotFound
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.mounts import directory_of_all, mounted
from tests.cluster.test_mount_semantics import failure

MIB = 1 << 20
NOBODY = 65534
SYS_FUTEX = 202
FUTEX_WAKE = 1
SOURCE = Path(__file__).parent.parent / "ring" / "ring.c"


@pytest.fixture(scope="module")
def mount(shared_cluster: LocalCluster) -> Iterator[Path]:
    """A mount that every user may use."""
    with directory_of_all() as base, mounted(shared_cluster, base / "a", "allow_other") as path:
        path.chmod(0o777)
        yield path


@pytest.fixture(autouse=True)
def no_tracker() -> Iterator[None]:
    """Python keeps a process that watches over shared memory: end it with the test."""
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.fixture
def directory(mount: Path, request: pytest.FixtureRequest) -> Path:
    path = mount / request.node.name.replace("[", "-").replace("]", "")
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program, compiled and linked as any other."""
    built = tmp_path_factory.mktemp("c") / "ring"
    prefix = Path(sys.prefix)
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{prefix}/include", str(SOURCE), "-o", str(built)]
    command += [f"-L{prefix}/lib", "-lhf3fs_api_shared", f"-Wl,-rpath,{prefix}/lib"]
    subprocess.run(command, check=True)
    return built


@contextmanager
def shared(bytes_: int) -> Iterator[SharedMemory]:
    memory = SharedMemory(create=True, size=bytes_)
    try:
        yield memory
    finally:
        memory.close()
        memory.unlink()


@contextmanager
def registered(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o644)
    h3.register_fd(fd)
    try:
        yield fd
    finally:
        h3.deregister_fd(fd)
        os.close(fd)


def one(ring: h3.ioring, iov: object, fd: int, offset: int) -> int:
    """One I/O from beginning to end."""
    ring.prepare(iov, ring.for_read, fd, offset)  # type: ignore[attr-defined, arg-type]
    (done,) = ring.submit().wait(min_results=1, timeout=timedelta(seconds=30))
    return done.result


def make_ring(mount: Path, entries: int = 8, for_read: bool = True, **options: int) -> h3.ioring:
    ring = h3.make_ioring(str(mount), entries, for_read, **options)
    ring.for_read = for_read  # type: ignore[attr-defined]
    return ring


def announced(mount: Path) -> list[str]:
    return os.listdir(mount / "3fs-virt" / "iovs")


@pytest.mark.parametrize("check", ["batches", "errors", "memory", "cut"])
def test_programs_in_c_work_as_on_3fs(mount: Path, program: Path, directory: Path, check: str) -> None:
    result = subprocess.run([program, check, mount, directory], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert announced(mount) == []
    assert os.listdir(mount)


def test_whole_files_are_read_in_pieces_and_by_callback(mount: Path, directory: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    path = directory / "file"
    path.write_bytes(data)
    assert h3.read_file(str(path)) == data
    assert h3.read_file(str(path), str(mount), block_size=MIB, off=5) == data[5:]
    seen: list[tuple[int, bytes]] = []
    assert h3.read_file(str(path), block_size=MIB, cb=lambda part, at: seen.append((at, bytes(part)))) is None
    assert b"".join(part for _, part in seen) == data
    assert [at for at, _ in seen] == [0, MIB, 2 * MIB, 3 * MIB]
    (directory / "empty").touch()
    assert h3.read_file(str(directory / "empty")) == b""
    assert h3.extract_mount_point(str(path)) == str(mount) == h3.extract_mount_point(str(mount))
    assert h3.extract_mount_point("/tmp") is None
    assert announced(mount) == []


def test_memory_may_be_unlinked_once_it_is_announced(mount: Path, directory: Path) -> None:
    (directory / "file").write_bytes(b"abc" * 5000)
    memory = SharedMemory(create=True, size=MIB)
    iov = h3.make_iovec(memory, str(mount), block_size=4096)
    memory.unlink()
    assert announced(mount)[0].endswith(".b4096")
    ring = make_ring(mount, timeout=10, priority=h3.IorPriority.HIGH)
    with registered(directory / "file", os.O_RDONLY) as fd:
        part = iov[4096:8192]
        assert one(ring, part, fd, 3) == 4096
        assert bytes(memoryview(part)) == (b"abc" * 5000)[3:4099]
        assert failure(ring.prepare, iov[100:5000], True, fd, 0) == errno.EINVAL
        iov[0:3] = b"xyz"
        assert bytes(memory.buf[:3]) == b"xyz"
        assert len(part) == 4096
        assert part.base_off == 4096
        with memory.buf[8192:8200] as window:
            assert iov.iov.slice_by(window).base_off == 8192
    with pytest.raises(ValueError, match="step"):
        iov[::2]
    del part
    memory.close()


def test_results_carry_what_was_given_with_them_in_order(mount: Path, directory: Path) -> None:
    (directory / "file").write_bytes(bytes(range(256)) * 64)
    ring = make_ring(mount, entries=16)
    with shared(MIB) as memory, registered(directory / "file", os.O_RDONLY) as fd:
        iov = h3.make_iovec(memory, str(mount))
        for n in range(16):
            ring.prepare(iov[n * 10 : n * 10 + 10], True, fd, n, userdata=("io", n))
        assert failure(ring.prepare, iov[:1], True, fd, 0) == errno.EAGAIN
        ring.submit()
        done = ring.wait(min_results=10, max_results=10)
        done += ring.wait(min_results=6, timeout=timedelta(seconds=30))
        assert [(d.userdata, d.result) for d in done] == [(("io", n), 10) for n in range(16)]
        assert bytes(memory.buf[150:160]) == bytes(range(15, 25))
        assert ring.wait(timeout=timedelta(0)) == []
        assert ring.wait(min_results=1, timeout=timedelta(milliseconds=20)) == []


def test_a_ring_and_the_other_ways_to_a_file_see_each_other_at_once(mount: Path, directory: Path) -> None:
    reads, writes = make_ring(mount), make_ring(mount, for_read=False)
    path = directory / "file"
    path.write_bytes(b"0" * 3 * MIB)
    with shared(MIB) as memory, registered(path, os.O_RDWR) as fd, open(path, "r+b", buffering=0) as other:
        iov = h3.make_iovec(memory, str(mount))
        mapped = mmap.mmap(other.fileno(), 3 * MIB)
        for round_ in range(10):
            at = round_ * 200_000
            written = bytes([65 + round_]) * 1000
            # Kept by the mount, not written yet.
            os.pwrite(other.fileno(), written, at)
            assert one(reads, iov[:1000], fd, at) == 1000
            assert bytes(memory.buf[:1000]) == written
            memory.buf[:1000] = written.lower()
            assert one(writes, iov[:1000], fd, at + 500) == 1000
            assert os.pread(other.fileno(), 1500, at) == written[:500] + written.lower()
            assert mapped[at : at + 1500] == written[:500] + written.lower()
            # What was written before by the mount does not come back later.
            os.fsync(other.fileno())
            assert one(reads, iov[:1500], fd, at) == 1500
            assert bytes(memory.buf[:1500]) == written[:500] + written.lower()
        # A longer file is longer for everybody.
        assert one(writes, iov[:100], fd, 5 * MIB) == 100
        assert os.fstat(other.fileno()).st_size == path.stat().st_size == 5 * MIB + 100
        assert os.pread(other.fileno(), 10, 4 * MIB) == bytes(10)
        os.truncate(path, 10)
        assert one(reads, iov[:100], fd, 0) == 10
        assert hf3fs_py_usrbio.force_fsync(fd) == 0
        mapped.close()


def test_another_mount_sees_what_a_ring_wrote_after_close(
    shared_cluster: LocalCluster, mount: Path, directory: Path, tmp_path: Path
) -> None:
    writes = make_ring(mount, for_read=False)
    with mounted(shared_cluster, tmp_path / "other") as elsewhere, shared(MIB) as memory:
        memory.buf[:] = b"r" * MIB
        iov = h3.make_iovec(memory, str(mount))
        with registered(directory / "file", os.O_RDWR | os.O_CREAT) as fd:
            for n in range(4):
                writes.prepare(iov, False, fd, n * MIB)
            assert [d.result for d in writes.submit().wait(min_results=4)] == [MIB] * 4
        assert (elsewhere / directory.name / "file").read_bytes() == b"r" * 4 * MIB


def test_several_descriptors_of_a_file_are_registered_and_holes_made(mount: Path, directory: Path) -> None:
    path = directory / "file"
    path.write_bytes(b"x" * MIB)
    ring = make_ring(mount)
    with (
        shared(MIB) as memory,
        registered(path, os.O_RDONLY) as one_fd,
        registered(path, os.O_RDWR) as two_fd,
    ):
        iov = h3.make_iovec(memory, str(mount))
        os.rename(path, directory / "renamed")
        assert one(ring, iov[:], one_fd, 0) == one(ring, iov[:], two_fd, 0) == MIB
        hf3fs_py_usrbio.punch_hole(two_fd, [0], [4096])
        hf3fs_py_usrbio.punch_hole(str(directory / "renamed"), [8192], [12288])
        assert one(ring, iov[:], one_fd, 0) == MIB
        assert bytes(memory.buf[:16384]) == (bytes(4096) + b"x" * 4096) * 2
        hf3fs_py_usrbio.hardlink(str(directory / "renamed"), str(directory / "other"))
        assert (directory / "other").stat().st_nlink == 2
        readonly = make_ring(mount, for_read=False)
        assert failure(readonly.prepare, iov[:], False, one_fd, 0) == errno.EACCES


@contextmanager
def staying(program: Path, mount: Path, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with memory, a ring, and a wait that does not end by itself."""
    process = subprocess.Popen([program, "stay", mount, directory], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_what_a_killed_process_announced_is_withdrawn(mount: Path, program: Path, directory: Path) -> None:
    with staying(program, mount, directory) as process:
        assert len(announced(mount)) == 2
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(
            lambda: announced(mount) == [], timeout_s=30, what="the withdrawal of what a killed process announced"
        )
    for leftover in Path("/dev/shm").glob("hf3fs-iov-*"):
        leftover.unlink()
    assert (directory / "stay").read_bytes() == b""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_waits_end_when_the_daemon_does(
    shared_cluster: LocalCluster, program: Path, tmp_path: Path, end: signal.Signals
) -> None:
    mountpoint = tmp_path / f"m{end}"
    # One that is told to end takes its mount away.
    with suppress(NotFound), mounted(shared_cluster, mountpoint) as path:
        daemon = json.loads((shared_cluster.directory / f"mount-{path.name}.pid").read_text())["pid"]
        with staying(program, path, path) as process:
            os.kill(daemon, end)
            assert process.stdout is not None
            assert process.stdout.readline() == f"{-errno.ENOTCONN}\n"
    for leftover in Path("/dev/shm").glob("hf3fs-iov-*"):
        leftover.unlink()


def test_waits_in_python_end_when_the_daemon_is_killed(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    with mounted(shared_cluster, tmp_path / "m") as path:
        daemon = json.loads((shared_cluster.directory / f"mount-{path.name}.pid").read_text())["pid"]
        ring = make_ring(path, io_depth=4)
        fd = os.open(path / "file", os.O_RDWR | os.O_CREAT)
        with shared(4096) as memory:
            iov = h3.make_iovec(memory, str(path))
            h3.register_fd(fd)
            # One of a batch of four does not begin.
            ring.prepare(iov[:], True, fd, 0)
            os.kill(daemon, signal.SIGKILL)
            wait = functools.partial(ring.submit().wait, min_results=1, timeout=timedelta(seconds=60))
            assert failure(wait) == errno.ENOTCONN
            h3.deregister_fd(fd)
            del iov
        with suppress(OSError):
            os.close(fd)


def as_user(uid: int, call: Callable[..., object], *arguments: object) -> int | None:
    """The errno that a call fails with as another user."""
    os.seteuid(uid)
    try:
        return failure(call, *arguments)
    finally:
        os.seteuid(0)


def test_memory_of_others_and_what_is_no_memory_is_refused(mount: Path, tmp_path: Path) -> None:
    def link(name: str | None = None) -> Path:
        return mount / "3fs-virt" / "iovs" / (name or str(uuid.uuid4()))

    with shared(4096) as memory:
        target = f"/dev/shm/{memory.name}"
        assert as_user(NOBODY, os.symlink, target, link()) == errno.EACCES
        os.chmod(target, 0o666)
        assert as_user(NOBODY, os.symlink, target, link()) == errno.EACCES
        for name in ("x", "..", f"{uuid.uuid4()}.b", f"{uuid.uuid4()}.r1", f"{uuid.uuid4()}.r0.n4"):
            assert failure(os.symlink, target, link(name)) in (errno.EINVAL, errno.EEXIST), name
        mine = link()
        os.symlink(target, mine)
        assert os.readlink(mine) == target
        assert failure(os.symlink, target, mine) == errno.EEXIST
        assert failure(os.symlink, target, link(f"{mine.name}.b4096")) == errno.EEXIST
        assert as_user(NOBODY, os.unlink, mine) in (errno.EPERM, errno.EACCES)
        os.unlink(mine)
    (tmp_path / "file").write_bytes(b"x" * 4096)
    os.mkfifo("/dev/shm/fs3-test-fifo")
    try:
        for bad, expected in [
            ("/dev/shm/absent", errno.ENOENT),
            (str(tmp_path / "file"), errno.EINVAL),
            ("/dev/shm/../shm/x", errno.EINVAL),
            ("/dev/shm/fs3-test-fifo", errno.EINVAL),
        ]:
            assert failure(os.symlink, bad, link()) == expected, bad
    finally:
        os.unlink("/dev/shm/fs3-test-fifo")
    assert announced(mount) == []


def in_child(call: Callable[[], bool], uid: int = 0) -> bool:
    """What a call answers in a forked child, as user `uid`."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            status = 0 if call() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_uses_what_it_inherits_in_a_ring_of_its_own(mount: Path, directory: Path) -> None:
    (directory / "file").write_bytes(b"s" * 4096)
    ring = make_ring(mount)
    with shared(4096) as memory, registered(directory / "file", os.O_RDONLY) as fd:
        iov = h3.make_iovec(memory, str(mount))

        def child() -> bool:
            refused = failure(ring.prepare, iov[:], True, fd, 0) == errno.EINVAL
            return refused and one(make_ring(mount), iov[:100], fd, 0) == 100

        assert in_child(child)
        assert bytes(memory.buf[:101]) == b"s" * 100 + b"\0"
        assert one(ring, iov[:], fd, 0) == 4096
        # Memory that was withdrawn is nobody's.
        iov.withdraw()
        assert one(ring, iov[:], fd, 0) == -errno.EINVAL


def test_another_user_has_own_rights_and_not_the_memory_of_others(mount: Path, directory: Path) -> None:
    (directory / "public").write_bytes(b"p" * 4096)
    (directory / "private").write_bytes(b"s" * 4096)
    (directory / "private").chmod(0o600)
    with shared(4096) as roots:
        theirs = h3.make_iovec(roots, str(mount))
        known = Path(theirs.link).name

        def child() -> bool:
            ring = make_ring(mount)
            with shared(4096) as memory, registered(directory / "public", os.O_RDONLY) as fd:
                mine = h3.make_iovec(memory, str(mount))
                stolen = hf3fs_py_usrbio.iovec(memory.buf, known, str(mount))
                return (
                    one(ring, mine[:], fd, 0) == 4096
                    and bytes(memory.buf) == b"p" * 4096
                    and one(ring, stolen[:], fd, 0) == -errno.EINVAL
                    and failure(os.open, directory / "private", os.O_RDONLY) == errno.EACCES
                    and failure(os.unlink, theirs.link) in (errno.EPERM, errno.EACCES)
                )

        assert in_child(child, NOBODY)
        assert bytes(roots.buf) == bytes(4096)


class RawRing:
    """A ring that is written without the library."""

    def __init__(self, mount: Path) -> None:
        self.memory = SharedMemory(create=True, size=hf3fs_py_usrbio.ioring.size_for_entries(4))
        self.link = mount / "3fs-virt" / "iovs" / f"{uuid.uuid4()}.r0.n4"
        self.put(0, struct.pack("<QII", 0x6673332D72696E67, 1, 4))

    def put(self, at: int, data: bytes) -> None:
        self.memory.buf[at : at + len(data)] = data

    def number(self, at: int) -> int:
        return struct.unpack("<q", self.memory.buf[at : at + 8])[0]

    def run(self, submissions: list[bytes]) -> list[int]:
        """Announce it with these; their results."""
        self.put(256, b"".join(submissions))
        self.put(64, struct.pack("<Q", len(submissions)))
        os.symlink(f"/dev/shm/{self.memory.name}", self.link)
        wait_until(lambda: self.number(128) == len(submissions), timeout_s=30, what="the end of all")
        return [self.number(512 + 8 * n) for n in range(len(submissions))]

    def end(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.link)
        self.memory.close()
        self.memory.unlink()


def token_of(fd: int) -> int:
    """The number by which rings of this process name an open file."""
    answer = bytearray(8)
    fcntl.ioctl(fd, 0x80086840, answer)
    return int.from_bytes(answer, "little")


def test_a_hostile_ring_gets_errors_and_cannot_name_files_of_other_processes(mount: Path, directory: Path) -> None:
    (directory / "file").write_bytes(b"f" * 4096)
    read_end, write_end = os.pipe()
    with open(directory / "file", "rb", buffering=0) as file:

        def child() -> bool:
            os.write(write_end, token_of(file.fileno()).to_bytes(8, "little"))
            return True

        assert in_child(child)
        others = int.from_bytes(os.read(read_end, 8), "little")
        mine = token_of(file.fileno())
        assert token_of(file.fileno()) == mine != others
        ring = RawRing(mount)
        nowhere = struct.pack("<QQ16sQQQ", 0, 4096, bytes(16), 0, 0, 0)
        try:
            results = ring.run([struct.pack("<Q", token) + nowhere for token in (others, mine, 0)] + [os.urandom(64)])
            assert results == [-errno.EBADF, -errno.EINVAL, -errno.EBADF, -errno.EBADF]
        finally:
            ring.end()
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("cut", [False, True])
def test_a_ring_with_impossible_counters_or_without_its_file_does_no_harm(
    mount: Path, directory: Path, cut: bool
) -> None:
    (directory / "file").write_bytes(b"f" * 4096)
    ring = RawRing(mount)
    try:
        ring.run([bytes(64)])
        if cut:
            os.truncate(f"/dev/shm/{ring.memory.name}", 0)
            os.unlink(ring.link)
        else:
            ring.put(64, struct.pack("<QI", 1 << 60, 7))
            # The daemon sleeps on this word, unless it has seen the change.
            word = ctypes.c_uint32.from_buffer(ring.memory.buf, 72)
            ctypes.CDLL(None).syscall(SYS_FUTEX, ctypes.byref(word), FUTEX_WAKE, 1)
            del word
            closed = functools.partial(ring.number, 144)
            wait_until(lambda: closed() & 0xFFFFFFFF == errno.EINVAL, timeout_s=30, what="the end of the ring")
    finally:
        ring.end()
    assert h3.read_file(str(directory / "file")) == b"f" * 4096
