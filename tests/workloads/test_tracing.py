"""Traces show what was done, when, and by whom, on the clock of the PyTorch profiler."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import fs3
import fs3.kvcache
from fs3.testing.cluster import LocalCluster
from fs3.tracing.files import read_trace

FILE_BYTES = 3 << 20
PIECE_BYTES = 64 << 10
# How far clocks that are read in different ways may be apart.
APART_US = 2_000.0

Event = dict[str, Any]


@pytest.fixture(scope="module")
def fs(shared_cluster: LocalCluster) -> Iterator[fs3.FileSystem]:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
        fs.makedirs("/traced")
        with fs.open("/traced/file", "wb", chunk_bytes=64 << 10) as file:
            file.write(os.urandom(FILE_BYTES))
        yield fs


def complete(path: Path, category: str = "fs3") -> list[Event]:
    return [e for e in read_trace(path)["traceEvents"] if e["ph"] == "X" and e.get("cat") == category]


def track_names(path: Path) -> dict[Any, str]:
    events = read_trace(path)["traceEvents"]
    return {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}


def end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def within(inner: Event, outer: Event, apart_us: float = 0.01) -> bool:
    return bool(inner["ts"] >= outer["ts"] - apart_us and end(inner) <= end(outer) + apart_us)


def test_operations_say_what_was_read_and_when_and_failures_why(fs: fs3.FileSystem, tmp_path: Path) -> None:
    out, read = tmp_path / "trace.json", []
    with fs3.trace(out):
        with fs.open("/traced/file", "rb", buffering=0) as file:
            for offset in (0, 300_000, FILE_BYTES - 10):
                buffer = bytearray(PIECE_BYTES)
                before_ns = time.time_ns()
                count = file.pread_into(buffer, offset)
                read.append((offset, count, before_ns, time.time_ns()))
        with pytest.raises(FileNotFoundError):
            fs.stat("/traced/none")
        with fs.open("/traced/new", "wb", buffering=0) as file:
            file.write(b"abc")
    base_ns = read_trace(out)["baseTimeNanoseconds"]
    events = complete(out)
    assert [e["name"] for e in events] == [
        *("fs3.open", "fs3.read", "fs3.read", "fs3.read", "fs3.close"),
        *("fs3.stat", "fs3.create", "fs3.write", "fs3.close"),
    ]
    assert {(e["pid"], e["tid"]) for e in events} == {(os.getpid(), threading.get_native_id())}
    for event, (offset, count, before_ns, after_ns) in zip(events[1:4], read, strict=True):
        arguments = event["args"]
        assert (arguments["path"], arguments["offset"], arguments["bytes"]) == ("/traced/file", offset, count)
        assert (before_ns - base_ns) / 1000 - APART_US <= event["ts"]
        assert end(event) <= (after_ns - base_ns) / 1000 + APART_US
    assert events[5]["args"] | {"path": "/traced/none", "error": "NOT_FOUND"} == events[5]["args"]
    assert events[7]["args"]["bytes"] == 3


def test_requests_are_within_their_operation_and_bring_its_bytes(
    fs: fs3.FileSystem, shared_cluster: LocalCluster, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    with fs.open("/traced/file", "rb", buffering=0) as file, fs3.trace(out):
        file.pread_into(bytearray(FILE_BYTES), 0)
        fs.read_many([(file, offset, bytearray(100)) for offset in range(0, FILE_BYTES, PIECE_BYTES)])
    read, many = complete(out)
    requests = [e for e in complete(out, "fs3.request") if e["name"] == "storage.read"]
    nodes = {node.node_id for node in shared_cluster.routing().nodes}
    for operation, received, ranges in ((read, FILE_BYTES, None), (many, 0, FILE_BYTES // PIECE_BYTES)):
        mine = [e for e in requests if e["args"]["operation"] == operation["args"]["operation"]]
        assert mine
        assert all(within(e, operation) for e in mine)
        assert {e["args"]["node"] for e in mine} <= nodes
        useful = [e for e in mine if "hedge" not in e["args"] and "error" not in e["args"]]
        assert sum(e["args"]["chunks"] for e in useful) >= FILE_BYTES // (64 << 10)
        assert sum(e["args"]["received"] for e in useful) >= received
        assert operation["args"].get("count") == ranges
    assert (many["name"], many["args"]["path"]) == ("fs3.read_many", "/traced/file")


def test_threads_and_awaited_calls_have_their_own_tracks(
    fs: fs3.FileSystem, shared_cluster: LocalCluster, tmp_path: Path
) -> None:
    out, started = tmp_path / "trace.json", threading.Barrier(3)

    def stat() -> int:
        started.wait(30)
        fs.stat("/traced/file")
        return threading.get_native_id()

    async def gather() -> None:
        async with await fs3.connect_async(shared_cluster.url, token=shared_cluster.token) as other:
            await asyncio.gather(*(other.stat("/traced/file") for _ in range(8)))

    with fs3.trace(out), ThreadPoolExecutor(3, thread_name_prefix="loader") as pool:
        threads = set(pool.map(lambda _: stat(), range(3)))
        asyncio.run(gather())
    events, names = complete(out), track_names(out)
    assert all(e["name"] == "fs3.stat" for e in events)
    assert {e["tid"] for e in events if e["tid"] in threads} == threads
    assert all(names[thread].startswith("loader") for thread in threads)
    awaited = [e for e in events if e["tid"] not in threads]
    assert len(awaited) == 8
    assert all(names[e["tid"]].startswith("fs3 awaited by MainThread #") for e in awaited)
    for track in {e["tid"] for e in awaited}:
        shown = sorted((e for e in awaited if e["tid"] == track), key=lambda e: float(e["ts"]))
        assert all(end(a) <= b["ts"] for a, b in pairwise(shown))


def test_batches_of_the_key_value_cache_say_what_was_found(fs: fs3.FileSystem, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    keys = [f"key-{number}" for number in range(8)]
    with fs3.kvcache.open(fs, "/traced/cache", capacity=16 << 20) as cache, fs3.trace(out):
        assert all(cache.put_batch(keys, [b"value"] * len(keys)))
        assert cache.get_batch([*keys, "none"])[-1] is None
    put, get = complete(out)
    assert (put["name"], get["name"]) == ("fs3.kv_put_batch", "fs3.kv_get_batch")
    assert put["args"] | {"count": 8, "hits": 8, "bytes": 40} == put["args"]
    assert get["args"] | {"count": 9, "hits": 8, "bytes": 40} == get["args"]
    for operation, name, chunks in ((put, "storage.kv_put", 8), (get, "storage.kv_get", 9)):
        requests = [e for e in complete(out, "fs3.request") if e["name"] == name]
        assert {e["args"]["operation"] for e in requests} == {operation["args"]["operation"]}
        assert all(within(e, operation) and e["args"]["node"] for e in requests)
        assert sum(e["args"]["chunks"] for e in requests) >= chunks


def test_a_read_from_a_node_that_hangs_shows_the_second_request_that_answered(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    out = tmp_path / "trace.json"
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        with fs.open("/file", "wb", chunk_bytes=64 << 10) as file:
            file.write(bytes(FILE_BYTES))
        with fs.open("/file", "rb", buffering=0) as file:
            cluster.kill("storage-1", signal.SIGSTOP)
            try:
                with fs3.trace(out):
                    # One chunk after the other: a third of them are read from the node first.
                    for offset in range(0, FILE_BYTES, 64 << 10):
                        assert file.pread_into(bytearray(10), offset) == 10
            finally:
                cluster.kill("storage-1", signal.SIGCONT)
    requests = complete(out, "fs3.request")
    hedges = [e for e in requests if "hedge" in e["args"]]
    assert hedges
    for hedge in hedges:
        pair = [e for e in requests if e["args"]["operation"] == hedge["args"]["operation"]]
        if "error" not in hedge["args"]:
            first = next(e for e in pair if "hedge" not in e["args"])
            assert first["args"]["node"] != hedge["args"]["node"]
            assert first["ts"] < hedge["ts"]
    assert any(e["args"].get("error") == "given up" for e in requests)


def test_memory_is_bounded_and_the_file_says_what_is_missing(fs: fs3.FileSystem, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    with fs3.trace(out, events_max=10):
        for _ in range(50):
            fs.stat("/traced/file")
    operations, requests = complete(out), complete(out, "fs3.request")
    assert len(operations) + len(requests) == 10
    assert read_trace(out)["fs3"]["dropped_events"] == 90
    assert operations[-1]["args"]["operation"] == 50


def test_one_trace_at_a_time_and_none_in_a_forked_child(fs: fs3.FileSystem, tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    with fs3.trace(out) as trace:
        with pytest.raises(RuntimeError, match="already"):
            fs3.trace(tmp_path / "other").start()
        child = os.fork()
        if child == 0:
            try:
                # The end of its parent's trace writes nothing; a trace of its own does.
                trace.stop()
                with fs3.trace(tmp_path / "child.json"):
                    pass
                os._exit(out.exists())
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        fs.stat("/traced/file")
    assert [e["name"] for e in complete(out)] == ["fs3.stat"]
    assert complete(tmp_path / "child.json") == []


def test_a_missing_trace_to_merge_is_an_error_that_leaves_the_own_one(fs: fs3.FileSystem, tmp_path: Path) -> None:
    trace = fs3.trace(tmp_path / "own.json", merge=tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"), trace:
        fs.stat("/traced/file")
    with pytest.raises(ValueError, match="what went wrong"), trace:
        fs.stat("/traced/file")
        raise ValueError("what went wrong")
    assert len(complete(tmp_path / "own.json")) == 1


def test_a_trace_merges_with_that_of_the_pytorch_profiler(fs: fs3.FileSystem, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    out, torch_out = tmp_path / "both.json", tmp_path / "torch.json"
    buffers = [bytearray(PIECE_BYTES) for _ in range(8)]
    with fs3.trace(out, merge=torch_out):
        with torch.profiler.profile() as profiler, fs.open("/traced/file", "rb", buffering=0) as file:
            for number, buffer in enumerate(buffers):
                with torch.profiler.record_function("load"):
                    file.pread_into(buffer, number * PIECE_BYTES)
                with torch.profiler.record_function("compute"):
                    torch.frombuffer(buffer, dtype=torch.uint8).float().sum().item()
        profiler.export_chrome_trace(str(torch_out))
    apart_ns = read_trace(out)["baseTimeNanoseconds"] - read_trace(torch_out)["baseTimeNanoseconds"]
    before = [e["ts"] for e in complete(torch_out, "user_annotation")]
    assert [e["ts"] + apart_ns / 1000 for e in complete(out, "user_annotation")] == pytest.approx(before, abs=0.01)
    reads = [e for e in complete(out) if e["name"] == "fs3.read"]
    annotations = complete(out, "user_annotation")
    loads = [e for e in annotations if e["name"] == "load"]
    assert len(reads) == len(loads) == len(buffers)
    whole = {"ts": min(e["ts"] for e in annotations), "dur": 0.0}
    whole["dur"] = max(map(end, annotations)) - whole["ts"]
    for number, (read, load) in enumerate(zip(reads, loads, strict=True)):
        assert read["args"]["offset"] == number * PIECE_BYTES
        assert (read["pid"], read["tid"]) == (load["pid"], load["tid"])
        assert within(read, load, APART_US)
        assert within(read, whole, APART_US)
    assert any(e["name"] == "aten::sum" for e in complete(out, "cpu_op"))
