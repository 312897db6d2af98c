"""The simulated world as the driver sees it: storage engines, disks, data network and clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fs3.storage.engine import StorageEngine


class World(Protocol):
    """All times are virtual nanoseconds since the world began. The native one is ``fs3.native.SimWorld``.

    Chaos lives in the world: from the beginning it kills, pauses and cuts off nodes, and says so through ``events``.
    A world may have ``missing(target_id) -> str`` as well: what acknowledged data a target lacks, "" for nothing.
    """

    def now_ns(self) -> int:
        """Return the time up to which the world has run."""

    def run_until(self, time_ns: int) -> None:
        """Run everything that happens up to that time."""

    def engine(self, node: int, config_json: str) -> StorageEngine:
        """Make the engine of the present process of node 0 .. nodes - 1; its methods raise when that is gone."""

    def events(self) -> Sequence[tuple[int, str, int]]:
        """Return what happened to nodes since the last call: (time, crashed | started | paused | resumed, node).

        At first every node is started.
        """

    def delays(self, sender: str, receiver: str) -> Sequence[int]:
        """Draw what becomes of a message between "node0", "mgmtd0", "meta0", ...: the delays of its copies."""

    def publish_routing(self, routing: bytes) -> None:
        """Tell the data clients of a newer routing."""

    def set_load(self, on: bool) -> None:
        """Let clients work, or no more."""

    def heal(self) -> None:
        """End all faults: partitions are over, every node comes back."""

    def quiescent(self) -> bool:
        """Tell whether every operation of the clients has ended."""

    def violation(self) -> str:
        """Return the first violated property in words, or ""."""

    def check(self) -> str:
        """Check everything that can be checked at the end; like ``violation``."""

    def trace_hash(self) -> int:
        """Return a hash of everything that happened."""

    def trace(self) -> Sequence[str]:
        """Return the last things that happened, in words."""

    def statistics(self) -> dict[str, int]:
        """Count faults and operations by kind."""
