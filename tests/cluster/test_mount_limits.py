"""A mount under pressure and in bad company: many files and readers, a killed daemon, services that do not answer."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs3.fuse import umount
from fs3.fuse.table import Daemon, mounted_at
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.conftest import MakeCluster
from tests.cluster.mounts import mounted
from tests.cluster.test_mount_semantics import failure

PATIENCE_S = 60.0
MIB = 1 << 20


def daemon_of(cluster: LocalCluster, mountpoint: Path) -> int:
    """The process behind a mount made by `mounted`."""
    daemon = Daemon.load(cluster.directory / f"mount-{mountpoint.name}.pid")
    assert daemon is not None
    return daemon.pid


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


def open_files(mountpoint: Path) -> int:
    count = json.loads((mountpoint / "3fs-virt" / "stats").read_text())["open_files"]
    assert isinstance(count, int)
    return count


@contextlib.contextmanager
def descriptors(count: int) -> Iterator[None]:
    """Let this process have so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(hard, count)))
    except (ValueError, PermissionError):
        pytest.skip(f"this user may not have {count} descriptors")
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_may_have_ten_thousand_files_open(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    files, copies = 500, 20
    with mounted(shared_cluster, tmp_path / "many") as mountpoint, descriptors(files * copies + 500):
        pid = daemon_of(shared_cluster, mountpoint)
        before = memory_bytes(pid)
        (mountpoint / "many").mkdir()
        paths = [mountpoint / "many" / f"{n:04}" for n in range(files)]
        opened = []
        try:
            for path in paths:
                path.write_bytes(path.name.encode())
            for _ in range(copies):
                opened += [os.open(path, os.O_RDONLY) for path in paths]
            assert open_files(mountpoint) == files * copies
            assert memory_bytes(pid) - before < files * copies * 8192 + 64 * MIB
            for at in range(0, len(opened), 37):
                assert os.pread(opened[at], 10, 0) == paths[at % files].name.encode()
        finally:
            for descriptor in opened:
                os.close(descriptor)
        wait_until(lambda: open_files(mountpoint) == 0, timeout_s=PATIENCE_S, what="all files to be closed")


READERS = """
import hashlib, os, sys
path, digest, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def read():
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest() == digest
children = []
for _ in range(count):
    child = os.fork()
    if child == 0:
        os.posix_fadvise(os.open(path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        os._exit(0 if read() else 1)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_many_readers_and_writers_at_once_stay_within_the_memory_limit(
    shared_cluster: LocalCluster, tmp_path: Path
) -> None:
    with mounted(shared_cluster, tmp_path / "readers", "max_memory=16MiB") as mountpoint:
        pid = daemon_of(shared_cluster, mountpoint)
        content = os.urandom(8 * MIB)
        (mountpoint / "large").write_bytes(content)
        before = memory_bytes(pid)
        digest = hashlib.sha256(content).hexdigest()
        command = [sys.executable, "-c", READERS, str(mountpoint / "large"), digest, "120"]
        writers = [
            subprocess.Popen(["dd", "if=/dev/zero", f"of={mountpoint}/w{n}", "bs=1M", "count=8", "status=none"])
            for n in range(4)
        ]
        try:
            assert subprocess.run(command, timeout=PATIENCE_S * 2, check=False).returncode == 0
            assert [writer.wait(timeout=PATIENCE_S) for writer in writers] == [0] * 4
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
        # Besides the limit: what is on its way in the client (32 MiB), stacks, and what the allocator keeps.
        assert memory_bytes(pid, "VmHWM") - before < 16 * MIB + 32 * MIB + 48 * MIB


def test_a_killed_daemon_is_an_error_that_umount_clears(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    point = tmp_path / "killed"
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.suppress(OSError))  # the second umount of the block
        mountpoint = stack.enter_context(mounted(shared_cluster, point))
        (mountpoint / "kept").write_text("closed before")
        descriptor = os.open(mountpoint / "kept", os.O_RDONLY)
        os.kill(daemon_of(shared_cluster, mountpoint), signal.SIGKILL)
        wait_until(
            lambda: failure(os.stat, mountpoint) == errno.ENOTCONN, timeout_s=PATIENCE_S, what="the mount to be dead"
        )
        assert failure(os.pread, descriptor, 1, 0) in (errno.ENOTCONN, None)  # from the page cache perhaps
        assert failure(os.open, mountpoint / "kept", os.O_RDONLY) == errno.ENOTCONN
        os.close(descriptor)
        umount(str(mountpoint))
        assert mounted_at(str(mountpoint)) is None
    with mounted(shared_cluster, point) as again:
        assert (again / "kept").read_text() == "closed before"


def seconds_until_error(call: object, *arguments: object) -> tuple[int | None, float]:
    begun = time.monotonic()
    return failure(call, *arguments), time.monotonic() - begun


def test_services_that_are_dead_are_an_error_in_time(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster()
    with mounted(cluster, tmp_path / "mnt", "op_timeout_s=4,cache=none") as mountpoint:
        (mountpoint / "file").write_bytes(b"x" * MIB)
        reader = os.open(mountpoint / "file", os.O_RDONLY)
        try:
            killed = [service.name for service in cluster.services() if service.kind in ("storage", "meta")]
            for name in killed[::-1]:
                if name != "meta-1":
                    cluster.kill(name)
            code, took = seconds_until_error(os.pread, reader, 4096, 0)
            assert code is not None
            assert took < PATIENCE_S
            cluster.kill("meta-1")
            for call in (os.stat, os.listdir):
                code, took = seconds_until_error(call, mountpoint / "file" if call is os.stat else mountpoint)
                assert code is not None
                assert took < PATIENCE_S
        finally:
            os.close(reader)
        for name in killed:
            cluster.start(name)
        cluster.wait_serving()

        def is_back() -> bool:
            return failure(os.stat, mountpoint / "file") is None

        wait_until(is_back, timeout_s=PATIENCE_S, what="the mount to work again")


BLOCKED = """
import os, sys
how, path = sys.argv[1:]
descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
print("ready", flush=True)
sys.stdin.readline()
print("going", flush=True)
if how == "read":
    os.pread(descriptor, 4096, 0)
elif how == "stat":
    os.stat(path)
else:
    os.open(path + how, os.O_RDONLY)
print("done", flush=True)
"""


def test_a_process_that_waits_for_a_dead_cluster_can_be_killed(make_cluster: MakeCluster, tmp_path: Path) -> None:
    cluster = make_cluster()
    # So long that an operation that cannot be given up would fail this test.
    with mounted(cluster, tmp_path / "mnt", "op_timeout_s=150,cache=none") as mountpoint:
        path = mountpoint / "file"
        path.write_bytes(b"x" * 4096)
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", BLOCKED, how, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for how in ("read", "stat", "open")
        ]
        stopped = [pid for kind in ("storage", "meta") for pid in cluster.pids(kind)]
        try:
            for process in processes:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            for process in processes:
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                assert process.stdout.readline() == "going\n"
                wait_until(lambda p=process: in_the_kernel(p.pid), timeout_s=PATIENCE_S, what="it to wait")
                # Signals that it handles or ignores change nothing.
                os.kill(process.pid, signal.SIGCHLD)
                process.kill()
                assert process.wait(timeout=PATIENCE_S) == -signal.SIGKILL
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
            for process in processes:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    if pipe is not None:
                        pipe.close()
        wait_until(lambda: failure(os.stat, path) is None, timeout_s=PATIENCE_S, what="the mount to work again")


def in_the_kernel(pid: int) -> bool:
    """Whether a process waits for the answer of a FUSE request."""
    try:
        return "request_wait_answer" in Path(f"/proc/{pid}/stack").read_text()
    except OSError:
        # Not to be seen by this user: that it sleeps has to do.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "SD"
