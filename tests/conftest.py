"""Rules for every test: what it starts it ends. A test that leaves a process, a mount or a thread behind fails."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

MARK = "FS3_TEST_MARK"
SETTLE_S = 10.0
# Threads of libraries that live as long as the process by design.
LASTING_THREADS = ("grpc", "_channel_spin", "fs3-native", "tokio", "fdb-network-thread")
# gRPC's asyncio poller is named after its target.
LASTING_TARGETS = ("(_poll_wrapper)",)


def pytest_configure() -> None:
    """Mark this run's environment, so that every descendant can be recognised, daemons included."""
    os.environ[MARK] = uuid.uuid4().hex


def marked_processes() -> dict[int, str]:
    """Pid and command line of the processes that this run started, itself excluded."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:
                    found[int(entry.name)] = command
        except OSError:
            continue
    return found


def mounts_below(directory: Path) -> set[str]:
    """Mount points below `directory`."""
    mounted = (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines())
    return {path for path in mounted if path.startswith(f"{directory}/")}


def lasting(thread: threading.Thread) -> bool:
    """Whether a thread belongs to a library that never ends it."""
    by_library = thread.name.startswith(LASTING_THREADS) or thread.name.endswith(LASTING_TARGETS)
    return by_library or not thread.is_alive()


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail a test that leaves something running, and end it."""
    base = tmp_path_factory.getbasetemp()
    threads, processes, mounts = set(threading.enumerate()), set(marked_processes()), mounts_below(base)
    yield
    deadline = time.monotonic() + SETTLE_S
    while True:
        left_threads = [t for t in threading.enumerate() if t not in threads and not lasting(t)]
        left_processes = {pid: c for pid, c in marked_processes().items() if pid not in processes}
        left_mounts = mounts_below(base) - mounts
        if not (left_threads or left_processes or left_mounts) or time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for pid in left_processes:
        os.kill(pid, signal.SIGKILL)
    assert not left_threads, f"threads left behind: {left_threads}"
    assert not left_processes, f"processes left behind (killed now): {left_processes}"
    assert not left_mounts, f"mounts left behind: {left_mounts}"
