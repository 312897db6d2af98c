"""Search embeddings that lie on fs3: an inverted file of compressed vectors, then exact distances of the best.

For a batch of queries two batches of random reads: the inverted lists nearest to the queries, and the full vectors of
the candidates, by id. Prints the recall against an exact search, and how fast both are.

    fs3 up && python examples/embedding_search/search.py "fs3://127.0.0.1:7000/search?token_file=fs3-cluster/token"
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fs3
from fs3.data import RecordDataset, RecordWriter

Floats = NDArray[np.float32]
SHARDS = 4
BLOCK = 4096


def make_vectors(count: int, dimensions: int, seed: int) -> Floats:
    """Vectors of length 1 in loose clusters, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(max(8, count // 20), dimensions))
    found = centres[rng.integers(0, len(centres), count)] + rng.normal(scale=1.0, size=(count, dimensions))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def k_means(sample: Floats, lists: int, rounds: int = 8) -> Floats:
    """Centroids of length 1."""
    centroids = sample[np.random.default_rng(2).choice(len(sample), lists, replace=False)].copy()
    for _ in range(rounds):
        nearest = (sample @ centroids.T).argmax(axis=1)
        for number in range(lists):
            members = sample[nearest == number]
            if len(members):
                mean = members.sum(axis=0)
                centroids[number] = mean / np.linalg.norm(mean)
    return centroids


def build(fs: fs3.FileSystem, count: int, dimensions: int, lists: int) -> None:
    """Write the vectors, one record each, and the index: a record of ids and one-byte codes for each list."""
    vectors = make_vectors(count, dimensions, seed=1)
    fs.makedirs("/vectors", exist_ok=True)
    fs.makedirs("/index", exist_ok=True)
    for shard, part in enumerate(np.array_split(vectors, SHARDS)):
        with RecordWriter(f"/vectors/{shard}.fs3r", fs=fs) as writer:
            for vector in part:
                writer.write(vector)
    centroids = k_means(vectors[: 50 * lists], lists)
    nearest = np.concatenate([(part @ centroids.T).argmax(axis=1) for part in np.array_split(vectors, SHARDS)])
    scale = float(np.abs(vectors).max()) / 127
    about = {"dimensions": dimensions}
    with RecordWriter("/index/lists.fs3r", fs=fs, fields=["ids", "codes"], metadata=about) as writer:
        for number in range(lists):
            ids = np.flatnonzero(nearest == number).astype(np.int64)
            writer.write({"ids": ids, "codes": np.rint(vectors[ids] / scale).astype(np.int8)})
    with fs.open("/index/centroids", "wb", buffering=0) as file:
        file.write(centroids)


class Index:
    """The index and the vectors on a cluster; only the centroids are in memory."""

    def __init__(self, fs: fs3.FileSystem) -> None:
        self.vectors = RecordDataset("/vectors", fs=fs, reuse=True)
        self.lists = RecordDataset("/index/lists.fs3r", fs=fs, reuse=True)
        self.dimensions = self.lists.metadata()["dimensions"]
        self.centroids = np.empty((len(self.lists), self.dimensions), np.float32)
        fs.read_into("/index/centroids", self.centroids)
        self.reads = self.bytes = 0

    def read(self, dataset: RecordDataset, numbers: NDArray[np.int64]) -> list[Any]:
        """A batch of records by number, counted."""
        batch = dataset.__getitems__(numbers.tolist())
        self.reads += len(batch)
        self.bytes += int(
            sum(part.nbytes for one in batch for part in (one.values() if isinstance(one, dict) else [one]))
        )
        return batch

    def search(self, queries: Floats, k: int, probes: int, candidates: int) -> NDArray[np.int64]:
        """The ids of the `k` nearest of each query, best first."""
        near = np.argpartition(-(queries @ self.centroids.T), probes, axis=1)[:, :probes]
        wanted = np.unique(near)
        lists = dict(zip(wanted.tolist(), self.read(self.lists, wanted), strict=True))
        scored: list[list[tuple[NDArray[np.int64], Floats]]] = [[] for _ in queries]
        for number in wanted.tolist():
            rows = np.flatnonzero((near == number).any(axis=1))
            ids = lists[number]["ids"].view(np.int64)
            codes = lists[number]["codes"].view(np.int8).reshape(-1, self.dimensions).astype(np.float32)
            # Not scaled back: only the order counts.
            for row, scores in zip(rows.tolist(), queries[rows] @ codes.T, strict=True):
                scored[row].append((ids, scores))
        best = []
        for parts in scored:
            ids, scores = (np.concatenate(side) for side in zip(*parts, strict=True))
            best.append(ids[np.argsort(-scores)[:candidates]])
        known = np.unique(np.concatenate(best))
        vectors = np.stack(self.read(self.vectors, known)).view(np.float32)
        found = np.full((len(queries), k), -1, np.int64)
        for row, (query, ids) in enumerate(zip(queries, best, strict=True)):
            scores = vectors[np.searchsorted(known, ids)] @ query
            top = ids[np.argsort(-scores)[:k]]
            found[row, : len(top)] = top
        return found

    def exact(self, queries: Floats, k: int) -> NDArray[np.int64]:
        """As :meth:`search`, by reading every vector; in any order."""
        ids = np.empty((len(queries), 0), np.int64)
        scores = np.empty((len(queries), 0), np.float32)
        for start in range(0, len(self.vectors), BLOCK):
            numbers = np.arange(start, min(start + BLOCK, len(self.vectors)))
            block = np.stack(self.read(self.vectors, numbers)).view(np.float32)
            scores = np.hstack([scores, queries @ block.T])
            ids = np.hstack([ids, np.broadcast_to(numbers, (len(queries), len(numbers)))])
            kept = np.argpartition(-scores, min(k, scores.shape[1] - 1), axis=1)[:, :k]
            ids, scores = np.take_along_axis(ids, kept, 1), np.take_along_axis(scores, kept, 1)
        return ids


def main() -> None:
    """Build the index unless it is there, search, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", help="the cluster, and the directory to work in (default: FS3_URL)")
    parser.add_argument("--vectors", type=int, default=50_000, help="how many there are")
    parser.add_argument("--dimensions", type=int, default=256)
    parser.add_argument("--lists", type=int, default=256, help="inverted lists of the index")
    parser.add_argument("--queries", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64, help="queries at a time")
    parser.add_argument("--probes", type=int, default=16, help="lists that are read for a query")
    parser.add_argument("--candidates", type=int, default=50, help="vectors that are read for a query")
    parser.add_argument("-k", type=int, default=10, help="how many are searched for")
    arguments = parser.parse_args()
    with fs3.connect(arguments.url) as fs:
        if not fs.exists("/index/centroids"):
            build(fs, arguments.vectors, arguments.dimensions, arguments.lists)
        index = Index(fs)
        print(f"{len(index.vectors)} vectors of {index.dimensions} numbers, {len(index.lists)} lists")
        queries = make_vectors(arguments.queries, index.dimensions, seed=3)
        results = {}
        for name in ("exact", "index"):
            index.reads = index.bytes = 0
            start = time.perf_counter()
            if name == "exact":
                results[name] = index.exact(queries, arguments.k)
            else:
                batches = np.array_split(queries, -(-len(queries) // arguments.batch))
                found = [index.search(b, arguments.k, arguments.probes, arguments.candidates) for b in batches]
                results[name] = np.concatenate(found)
            seconds = time.perf_counter() - start
            print(
                f"{name}: {len(queries) / seconds:,.0f} queries/s, {index.reads / seconds:,.0f} reads/s, "
                f"{index.bytes / 1e6 / seconds:,.0f} MB/s"
            )
        pairs = zip(results["exact"], results["index"], strict=True)
        hits = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in pairs)
        print(f"recall@{arguments.k}: {hits / results['exact'].size:.3f}")


if __name__ == "__main__":
    main()
