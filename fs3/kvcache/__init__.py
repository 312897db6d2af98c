"""A key-value cache on the memory of the storage nodes, for the attention KV of inference (docs/kvcache.md).

``cache = fs3.kvcache.open(fs, "/kv/llama")``; then ``put``, ``get``, ``exists`` and their batches. A namespace is a
directory: its permissions say who may read and write entries. No call but opening and configuring asks a metadata
service.
"""

from fs3.kvcache.aio import AsyncKVCache, open_async
from fs3.kvcache.cache import KVCache, namespaces, open
from fs3.kvcache.records import ClientStats, Entry, Evicted, Stats

__all__ = [
    "AsyncKVCache",
    "ClientStats",
    "Entry",
    "Evicted",
    "KVCache",
    "Stats",
    "namespaces",
    "open",
    "open_async",
]
