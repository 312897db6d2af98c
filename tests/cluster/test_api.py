"""The Python API on a real cluster: buffers, batches, threads, forks, spawned workers, errors, and no leaks."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fs3
from fs3.client import FileSystem
from fs3.testing.cluster import LocalCluster
from tests.unit.client.test_buffers import Tensor

WORKER_S = 60.0


@pytest.fixture(scope="module")
def fs(shared_cluster: LocalCluster) -> Iterator[FileSystem]:
    with fs3.connect(f"{shared_cluster.url}?token_file={shared_cluster.token_file}") as made:
        yield made


@pytest.fixture
def directory(fs: FileSystem, request: pytest.FixtureRequest) -> str:
    path = f"/{request.node.name}"
    fs.makedirs(path)
    return path


def make(fs: FileSystem, path: str, content: Any) -> None:
    with fs.open(path, "wb", buffering=0) as file:
        file.write(content)


# ---- buffers


def test_arrays_and_tensors_are_written_and_read_in_place(fs: FileSystem, directory: str) -> None:
    path = f"{directory}/f"
    whole = np.arange(300_000, dtype=np.float64)
    times = np.array(["2026-01-01", "2027-01-01"], "M8[s]")
    with fs.open(path, "wb+", buffering=0) as file:
        assert file.write(Tensor(whole)) == whole.nbytes
        assert file.pwritev([times, b"abc"], whole.nbytes) == times.nbytes + 3
        back, back_times, end = Tensor(np.empty_like(whole)), np.empty_like(times), bytearray(10)
        assert file.preadv([back, back_times, end], 0) == whole.nbytes + times.nbytes + 3
        assert np.array_equal(back.array, whole)
        assert np.array_equal(back_times, times)
        assert end == b"abc" + bytes(7)
        file.seek(8)
        one = np.empty(1)
        assert file.readinto(one) == 8
        assert (one[0], file.tell()) == (1.0, 16)
        assert fs.read_many([(file, 80, Tensor(one))]) == [8]
        assert one[0] == 10.0
        with pytest.raises(BufferError, match="contiguous"):
            file.pread_into(np.empty(4)[::2], 0)
        with pytest.raises(TypeError, match="no bytes"):
            file.pread_into(np.empty(4, object), 0)
    assert file.closed


def test_asyncio_has_the_same_vectors_and_batches(shared_cluster: LocalCluster, fs: FileSystem, directory: str) -> None:
    async def run() -> None:
        async with await fs3.connect_async(shared_cluster.url, shared_cluster.token) as afs:
            async with await afs.open(f"{directory}/f", "wb+") as file:
                assert await file.pwritev([b"0123", np.arange(4, dtype=np.uint8)], 0) == 8
                one, two = bytearray(6), Tensor(np.zeros(9, np.uint8))
                assert await file.preadv([one, two], 0) == 8
                assert (bytes(one), bytes(two.array)) == (b"0123\0\1", b"\2\3" + bytes(7))
                out = np.zeros(5, np.uint8)
                views = await afs.read_batch([(file, 2, 2), (f"{directory}/f", 0, 3)], out)
                assert [bytes(view) for view in views] == [b"23", b"012"]
                assert bytes(out) == b"23012"
            missing, found = await afs.read_batch([("/none", 0, 1), (f"{directory}/f", 6, None)], return_errors=True)
            assert isinstance(missing, FileNotFoundError)
            assert (missing.filename, bytes(found)) == ("/none", b"\2\3")
            with pytest.raises(FileNotFoundError) as caught:
                await afs.rename("/none", "/other")
            assert (caught.value.filename, caught.value.filename2) == ("/none", "/other")

    asyncio.run(run())


def test_batches_spread_over_files_come_in_the_callers_order(fs: FileSystem, directory: str) -> None:
    rng = np.random.default_rng(7)
    contents = [rng.bytes(int(size)) for size in rng.integers(0, 1 << 20, 40)]
    for number, content in enumerate(contents):
        make(fs, f"{directory}/{number}", content)
    ranges, expected = [], []
    for _ in range(300):
        number, offset, length = (int(n) for n in rng.integers(0, (len(contents), 1 << 20, 20_000)))
        ranges.append((f"{directory}/{number}", offset, length))
        expected.append(contents[number][offset : offset + length])
    out = np.zeros(sum(length for *_, length in ranges), np.uint8)
    for views in (fs.read_batch(ranges), fs.read_batch(ranges, out)):
        assert [bytes(view) for view in views] == expected
    at = 0
    for (*_, length), wanted in zip(ranges, expected, strict=True):
        assert bytes(out[at : at + len(wanted)]) == wanted
        at += length
    # Whole files, more than are opened at a time, and open ones of every kind.
    whole = fs.read_batch([(f"{directory}/{number % 40}", 0, None) for number in range(120)])
    assert [bytes(view) for view in whole] == contents * 3
    with fs.open(f"{directory}/1", "rb") as buffered, fs.open(f"{directory}/2", "rb", buffering=0) as raw:
        views = fs.read_batch([(raw, 1, None), (buffered, 2, None)])
    assert [bytes(view) for view in views] == [contents[2][1:], contents[1][2:]]


# ---- errors


def test_errors_name_paths_as_those_of_os_do(fs: FileSystem, directory: str, tmp_path: Path) -> None:
    make(fs, f"{directory}/f", b"x")
    (tmp_path / "f").touch()
    calls: list[tuple[Any, ...]] = [
        ("stat", "none"),
        ("lstat", "f/under"),
        ("listdir", "f"),
        ("scandir", "none"),
        ("mkdir", "none/under"),
        ("makedirs", "f"),
        ("remove", "none"),
        ("rmdir", "f"),
        ("chmod", "none", 0o600),
        ("truncate", "none", 1),
        ("readlink", "none"),
        ("readlink", "f"),
        ("getxattr", "none", "user.x"),
        ("statvfs", "none"),
        ("rename", "none", "other"),
        ("replace", "none", "other"),
        ("link", "none", "other"),
    ]
    for name, *arguments in calls:
        ours = [f"{directory}/{one}" if isinstance(one, str) and "." not in one else one for one in arguments]
        theirs = [str(tmp_path / one) if isinstance(one, str) and "." not in one else one for one in arguments]
        with pytest.raises(OSError) as expected:  # noqa: PT011 what it is, is compared below
            getattr(os, name)(*theirs)
        with pytest.raises(OSError) as got:  # noqa: PT011
            getattr(fs, name)(*ours)
        where = str(expected.value.filename).replace(str(tmp_path), directory)
        assert (got.value.errno, got.value.filename) == (expected.value.errno, where), name
        assert (got.value.filename2 is None) == (expected.value.filename2 is None), name
        assert type(expected.value) in type(got.value).__mro__
    with pytest.raises(FileNotFoundError, match=rf"\[Errno 2\] 'none' does not exist: '{directory}/none'"):
        fs.open(f"{directory}/none")
    (bad,) = fs.stat_many([f"{directory}/none"])
    assert isinstance(bad, OSError)
    assert bad.filename == f"{directory}/none"


def test_errors_of_open_files_name_them(fs: FileSystem, directory: str) -> None:
    path = f"{directory}/f"
    make(fs, path, b"x")
    with fs.open(path, "rb", buffering=0) as file:
        fs.remove(path)
        file.close()
    with fs.open(path, "wb", buffering=0) as file, pytest.raises(OSError) as caught:  # noqa: PT011
        file.truncate(1 << 62)
    assert caught.value.filename == path


# ---- threads, forks, workers


def test_many_threads_share_files_and_connection(fs: FileSystem, directory: str) -> None:
    path = f"{directory}/f"
    content = np.random.default_rng(1).bytes(4 << 20)
    make(fs, path, content)
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        barrier.wait()
        for _ in range(50):
            offset, length = (int(n) for n in rng.integers(0, 4 << 20, 2))
            assert file.pread(length, offset) == content[offset : offset + length]
            (view,) = fs.read_batch([(path, offset, 1000)])
            assert bytes(view) == content[offset : offset + 1000]
        make(fs, f"{directory}/{number}", bytes([number]))

    with fs.open(path, "rb", buffering=0) as file, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted(fs.listdir(directory)) == sorted(["f", *map(str, range(8))])


def test_a_forked_child_connects_anew_and_leaves_the_parents_files_alone(fs: FileSystem, directory: str) -> None:
    path = f"{directory}/f"
    make(fs, path, b"parent")
    # Threads of the parent hold locks while it forks.
    stop = threading.Event()
    busy = [threading.Thread(target=_stat_until, args=(fs, path, stop)) for _ in range(2)]
    for thread in busy:
        thread.start()
    file = fs.open(path, "rb+", buffering=0)
    try:
        children = [_fork(lambda number=number: _child(fs, file, path, number)) for number in range(4)]
        assert [_wait(child) for child in children] == [0] * 4
    finally:
        stop.set()
        for thread in busy:
            thread.join()
    # The parent's file and connection are as they were.
    assert file.pread(6, 0) == b"parent"
    file.close()
    assert sorted(fs.listdir(directory)) == ["child0", "child1", "child2", "child3", "f"]


def _stat_until(fs: FileSystem, path: str, stop: threading.Event) -> None:
    while not stop.is_set():
        fs.stat(path)


def _child(fs: FileSystem, file: Any, path: str, number: int) -> None:
    for attempt in (lambda: file.pread(1, 0), lambda: fs.read_batch([(file, 0, 1)])):
        with pytest.raises(RuntimeError, match="made before a fork; connect again in the child process"):
            attempt()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fs.stat(path).st_size, range(16))) == {6}
    (view,) = fs.read_batch([(path, 0, None)])
    assert bytes(view) == b"parent"
    make(fs, f"{os.path.dirname(path)}/child{number}", b"child")
    file.close()
    assert file.closed


def _fork(work: Any) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def _wait(child: int) -> int:
    timer = threading.Timer(WORKER_S, os.kill, (child, 9))
    timer.start()
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        timer.cancel()


WORKER = """
import pickle, sys
fs, path = pickle.load(sys.stdin.buffer)
try:
    fs.stat("/none")
except OSError as error:
    answer = bytes(fs.read_batch([(path, 0, None)])[0]), error
fs.close()
sys.stdout.buffer.write(pickle.dumps(answer))
"""


def test_another_process_gets_the_file_system_by_pickle(fs: FileSystem, directory: str) -> None:
    make(fs, f"{directory}/f", b"content")
    # As a spawned worker of a dataloader does.
    ran = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=pickle.dumps((fs, f"{directory}/f")),
        stdout=subprocess.PIPE,
        timeout=WORKER_S,
        check=True,
    )
    content, problem = pickle.loads(ran.stdout)
    assert content == b"content"
    assert isinstance(problem, FileNotFoundError)
    assert problem.filename == "/none"
    with pickle.loads(pickle.dumps(fs)) as again:
        assert again.listdir(directory) == ["f"]


# ---- leaks


def _held() -> tuple[int, int, int]:
    """KiB resident, descriptors, threads of this process."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]), len(os.listdir("/proc/self/fd")), int(status["Threads"])


def test_a_hundred_thousand_calls_leave_nothing_behind(
    shared_cluster: LocalCluster, fs: FileSystem, directory: str
) -> None:
    paths = [f"{directory}/{number}" for number in range(20)]
    for path in paths:
        make(fs, path, bytes(5000))
    out = np.empty(64 * 100, np.uint8)
    ranges = [(paths[number % 20], number, 100) for number in range(64)]

    async def overlapping() -> None:
        async with await fs3.connect_async(shared_cluster.url, shared_cluster.token) as afs:
            for _ in range(4):
                await asyncio.gather(*(afs.stat(path) for path in paths), return_exceptions=True)
                await afs.read_batch(ranges, out)

    def one_round() -> int:
        fs.stat_many([*paths, *(["/none"] * 300)])
        for _ in range(15):
            fs.read_batch(ranges, out)
        with fs.open(paths[0], "rb+", buffering=0) as file:
            fs.read_many([(file, 0, out)] * 500)
            for _ in range(200):
                file.pread(100, 0)
            fs.write_many([(file, 4096, b"x")] * 5)
        for _ in range(20):
            assert not fs.exists("/none/at/all")
        asyncio.run(overlapping())
        return 320 + 15 * 84 + 705 + 20 + 4 * 84 + 4

    calls = 0
    while calls < 10_000:
        calls += one_round()
    before = _held()
    while calls < 110_000:
        calls += one_round()
    after = _held()
    assert after[0] - before[0] < 24 << 10, f"memory grew from {before[0]} to {after[0]} KiB"
    assert after[1] <= before[1] + 2, f"descriptors grew from {before[1]} to {after[1]}"
    assert after[2] <= before[2] + 2, f"threads grew from {before[2]} to {after[2]}"
