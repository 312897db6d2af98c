"""The KV cache beside redis, memcached and local files, in one run: `make bench ARGS="--only kv"`, or this file alone.

One client, one thread. Every store first takes and gives every value, so that its memory was used before, and what it
gives is compared; then all are measured in turn, several times, and the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import kv_peers
from kv_peers import Store, Unavailable

import fs3
import fs3.kvcache
from fs3.testing import measure
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.measure import MIB, Measured, Meter

# What is measured: its name, bytes of a value, keys at a time.
KINDS = (("1 MiB", MIB, 1), ("64 KiB", 64 << 10, 1), ("16 of 64 KiB", 64 << 10, 16))
# Values of a size that are put and got in turn: more than the processor's caches hold.
VALUES = 64
TIMES = 3
# What a store may keep; all values take a part of it.
STORE_MIB = 512
DURABLE_TIMEOUT_S = 30.0
# Namespaces on disks are measured with values of the first kind only: each put waits for three replicas.
DURABLE = "fs3, durable"
# What must be reached now, in times the rate of redis by its usual client; the goal is 2.
RATIO_FLOOR = 0.5


class Fs3:
    """A namespace of the KV cache, in memory or on disks."""

    def __init__(self, cache: fs3.kvcache.KVCache, pids: list[int]) -> None:
        self.name = DURABLE if cache.namespace.durable else "fs3"
        self.pids = pids
        self._cache = cache

    def put(self, keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
        """`put`, or `put_batch` for several."""
        stored = [self._cache.put(keys[0], values[0])] if len(keys) == 1 else self._cache.put_batch(keys, values)
        if not all(stored):
            raise OSError("a value was not stored")

    def get(self, keys: Sequence[bytes], targets: Sequence[memoryview]) -> Sequence[memoryview]:
        """`get_into`, or `get_batch_into` for several."""
        if len(keys) == 1:
            found = [self._cache.get_into(keys[0], targets[0])]
        else:
            found = self._cache.get_batch_into(keys, targets)
        for key, length, target in zip(keys, found, targets, strict=True):
            if length != len(target):
                raise KeyError(key)
        return targets


@dataclass(frozen=True)
class KvRow:
    """One kind of work by all stores."""

    work: str
    found: dict[str, Measured]

    def ratio(self, peer: str = "redis") -> float | None:
        """How many times the rate of a peer; None where it was not measured."""
        return self.found["fs3"].rate_of(self.found[peer]) if peer in self.found else None

    def missed(self) -> bool:
        """Whether the peer was measured and the floor is not reached."""
        ratio = self.ratio()
        return ratio is not None and ratio < RATIO_FLOOR

    def cells(self, stores: Sequence[str]) -> list[str]:
        """For the table."""
        ratio = self.ratio()
        rates = [_cell(self.found[name]) if name in self.found else "-" for name in stores]
        compared = "not measured" if ratio is None else f"{ratio:.2f}, {self.ratio('redis, raw'):.2f}"
        return [self.work, *rates, compared, f"{RATIO_FLOOR:g}", "NO" if self.missed() else "yes"]

    def record(self) -> dict[str, object]:
        """For JSON."""
        ratio = self.ratio()
        stores = {name: m.record() for name, m in self.found.items()}
        return {**stores, "ratio": None if ratio is None else round(ratio, 3)}


def _cell(m: Measured) -> str:
    return f"{m.mb_per_s:,.0f} MB/s, {m.p50_us:,.0f} / {m.p99_us:,.0f} µs, {m.cpu_s_per_gib:.2f} s/GiB"


def say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _values(size: int, count: int) -> list[memoryview]:
    whole = memoryview(bytearray(os.urandom(size * count)))
    return [whole[i * size : (i + 1) * size] for i in range(count)]


def _pass(store: Store, work: str, batch: int, values: list[memoryview], total_bytes: int) -> Measured:
    """Put or get values in turn until `total_bytes` have been moved."""
    size = len(values[0])
    keys = [b"%d-%d" % (size, i) for i in range(len(values))]
    groups = [(keys[i : i + batch], values[i : i + batch]) for i in range(0, len(values), batch)]
    room = memoryview(bytearray(size * batch))
    targets = [room[i * size : (i + 1) * size] for i in range(batch)]
    calls = max(1, total_bytes // (size * batch))
    meter, times_s = Meter(store.pids), []
    with meter:
        for call in range(calls):
            some_keys, some_values = groups[call % len(groups)]
            began = time.perf_counter()
            if work == "put":
                store.put(some_keys, some_values)
            else:
                store.get(some_keys, targets)
            times_s.append(time.perf_counter() - began)
    times_s.sort()
    p50, p99 = times_s[len(times_s) // 2], times_s[len(times_s) * 99 // 100]
    return meter.result(bytes_=calls * batch * size, operations=calls, p50_us=1e6 * p50, p99_us=1e6 * p99)


def _warm(store: Store, batch: int, values: list[memoryview]) -> None:
    """Every value once in and out, compared."""
    size = len(values[0])
    for start in range(0, len(values), batch):
        keys = [b"%d-%d" % (size, i) for i in range(start, start + batch)]
        store.put(keys, values[start : start + batch])
        found = store.get(keys, [memoryview(bytearray(size)) for _ in keys])
        if list(found) != values[start : start + batch]:
            raise AssertionError(f"{store.name} gave other bytes than it was given")


def compare(stores: Sequence[Store], total_bytes: int, times: int = TIMES) -> list[KvRow]:
    """All kinds of work by all stores in turn; `total_bytes` are moved in each pass."""
    rows = []
    for name, size, batch in KINDS:
        values = _values(size, VALUES)
        chosen = [store for store in stores if store.name != DURABLE or name == KINDS[0][0]]
        for store in chosen:
            _warm(store, batch, values)
        for work in ("put", "get"):
            say(f"KV cache and its peers: {work} {name}")
            turns = [[_pass(store, work, batch, values, total_bytes) for store in chosen] for _ in range(times + 1)]
            # The first turn warms.
            found = zip(chosen, zip(*turns[1:], strict=True), strict=True)
            rows.append(KvRow(f"{work} {name}", {store.name: measure.middle(passes) for store, passes in found}))
    return rows


def run(directory: Path, total_bytes: int, times: int = TIMES) -> list[KvRow]:
    """Measure on a cluster of its own in `directory`; peers that cannot be had are left out, and it is said."""
    cluster = LocalCluster.create(directory / "kv-cluster", ClusterSpec())
    try:
        cluster.up()
        with ExitStack() as stack:
            return compare(_stores(stack, cluster, directory), total_bytes, times)
    finally:
        cluster.down()


def _stores(stack: ExitStack, cluster: LocalCluster, directory: Path) -> list[Store]:
    """fs3 and its peers, which end with `stack`."""
    fs = stack.enter_context(fs3.connect(cluster.url, token=cluster.token))
    cache = stack.enter_context(fs3.kvcache.open(fs, "/kv", capacity=STORE_MIB * MIB))
    # A put may wait for a disk that is busy with something else.
    durable = stack.enter_context(fs3.kvcache.open(fs, "/kv-durable", durable=True, timeout=DURABLE_TIMEOUT_S))
    stores: list[Store] = [Fs3(cache, cluster.pids()), Fs3(durable, cluster.pids())]
    for peer in (kv_peers.redis, kv_peers.memcached):
        try:
            stores += stack.enter_context(peer(STORE_MIB))
        except Unavailable as e:
            say(f"not measured: {e}")
    files = directory / "kv-files"
    files.mkdir()
    stack.callback(shutil.rmtree, files)
    return [*stores, kv_peers.Files(files)]


def table(rows: list[KvRow]) -> list[list[str]]:
    """Header and cells; a store's cell says rate, median and 99th percentile of a call, CPU of client and server."""
    stores = list(rows[0].found)
    return [["KV cache", *stores, "× redis, × raw", "floor", "met"], *(row.cells(stores) for row in rows)]


def record(rows: list[KvRow]) -> dict[str, object]:
    """For JSON."""
    return {row.work: row.record() for row in rows}


def main() -> int:
    """Exit status 1 when a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=256, help="how much each pass moves")
    parser.add_argument("--times", type=int, default=TIMES, help="passes, of which the median counts")
    parser.add_argument("--dir", help="where to work")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.size_mib < 1 or arguments.times < 1:
        parser.error("--size-mib and --times must be at least 1")
    directory = Path(tempfile.mkdtemp(prefix="fs3-bench-", dir=arguments.dir))
    try:
        rows = run(directory, arguments.size_mib * MIB, arguments.times)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if arguments.json:
        print(json.dumps(record(rows), indent=2))
    else:
        cells = table(rows)
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        for row in cells:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 1 if any(row.missed() for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
