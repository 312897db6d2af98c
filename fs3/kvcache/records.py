"""What a namespace says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fs3.kvcache.namespace import Namespace


class Entry(NamedTuple):
    """One value, as one of its replicas knows it. Ages in seconds: since it was put, and since it was put or read."""

    key: bytes
    bytes: int
    age_s: float
    idle_s: float


class Evicted(NamedTuple):
    """What was evicted, replicas counted each."""

    entries: int
    bytes: int


@dataclass(frozen=True)
class ClientStats:
    """What one handle did since it was opened in this process. Latencies in seconds, of calls of one key or many."""

    hits: int
    misses: int
    stored: int
    not_stored: int
    failures: int
    """Entries that could not be asked for or told: a node did not answer, or does not serve."""
    damaged: int
    """Entries that came and did not match their checksums; they count as misses."""
    get_calls: int
    get_p50_s: float
    get_p99_s: float
    put_calls: int
    put_p50_s: float
    put_p99_s: float


@dataclass(frozen=True)
class Stats:
    """A namespace: what its storage nodes counted since they started, and what they hold now.

    Entries and bytes count each piece of values larger than a chunk, and each replica in memory; those of a durable
    namespace count once. ``hits`` and ``misses`` are those of all clients, and count every replica that was asked.
    """

    hits: int
    misses: int
    puts: int
    removed: int
    evicted_capacity: int
    """Made room within the namespace's capacity."""
    evicted_memory: int
    """Made room for others on their node: in its memory, or of a durable namespace on its disk."""
    evicted_asked: int
    expired: int
    collisions: int
    """Gave way to another key of the same hash."""
    lost: int
    """Forgotten because their target stopped serving."""
    entries: int
    bytes: int
    nodes: int
    nodes_silent: int
    """Nodes that did not answer: what they hold is not counted."""
    capacity: int | None
    ttl: float | None
    replicas: int
    durable: bool
    client: ClientStats

    @property
    def evicted(self) -> int:
        """Entries that had to go, for whatever reason but their age."""
        return self.evicted_capacity + self.evicted_memory + self.evicted_asked

    @property
    def hit_rate(self) -> float:
        """Hits of this handle among its gets; 0.0 when there were none."""
        return self.client.hits / max(1, self.client.hits + self.client.misses)


_COUNTED = (
    "hits",
    "misses",
    "puts",
    "removed",
    "evicted_capacity",
    "evicted_memory",
    "evicted_asked",
    "expired",
    "collisions",
    "lost",
    "entries",
    "bytes",
    "nodes",
    "nodes_silent",
)


def stats_of(namespace: Namespace, counters: Mapping[str, int], calls: Mapping[str, Any]) -> Stats:
    """The counters of the nodes and of the handle together."""
    counted = {name: counters.get(name, 0) for name in _COUNTED}
    client = ClientStats(**calls)
    ttl = namespace.ttl_ms / 1000 if namespace.ttl_ms else None
    return Stats(
        **counted,
        capacity=namespace.capacity_bytes or None,
        ttl=ttl,
        replicas=namespace.replicas,
        durable=namespace.durable,
        client=client,
    )
