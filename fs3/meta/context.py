"""What an operation may know besides its transaction and its request, and the signals it gives to its runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fs3.meta.ids import IdAllocator
from fs3.v1.disk_meta_pb2 import PendingTruncation
from fs3.v1.meta_pb2 import Layout, StatfsResponse


class Placement(Protocol):
    """Where files are put. Reads the newest routing."""

    def file_layout(self, requested: Layout | None, inherited: Layout) -> Layout:
        """A complete layout for a new file. Raises UNAVAILABLE before chains exist, INVALID_ARGUMENT."""

    def directory_layout(self, requested: Layout | None, inherited: Layout) -> Layout:
        """What a new directory passes on; zero fields are defaults. Raises INVALID_ARGUMENT."""

    def space(self) -> StatfsResponse:
        """Capacity and free space as a user counts, in bytes; the inode count is left out."""


class TruncationPending(Exception):
    """The chunks of `inode` have to be cut before the operation can go on."""

    def __init__(self, inode: int) -> None:
        super().__init__(f"inode {inode:#x} has a pending truncation")
        self.inode = inode


class LengthUnknown(Exception):
    """The end of the last chunk of `inode` has to be asked of storage before the operation can go on."""

    def __init__(self, inode: int, layout: Layout, truncate_version: int) -> None:
        super().__init__(f"the length of inode {inode:#x} has to be queried")
        self.inode = inode
        self.layout = layout
        self.truncate_version = truncate_version


@dataclass(frozen=True, slots=True)
class Cut:
    """A truncation whose chunks this process is to cut."""

    inode: int
    layout: Layout
    pending: PendingTruncation


class OpContext:
    """One request. The same object serves every run of its transaction; :meth:`begin` resets what a run sets.

    ``measured`` maps (inode, truncate version) to the length that storage reported. ``cut``: what the runner is to
    cut after the commit. ``collect``: there is new work for the garbage collector. ``renew``: an open for writing
    also writes the client's keepalive record. ``counter_shard``: which shard of counters this server adds to.
    ``relocked``: the inode whose locks changed, 0: none.
    """

    __slots__ = (
        "_spare_ids",
        "_used_ids",
        "collect",
        "counter_shard",
        "cut",
        "ids",
        "instance_id",
        "keepalive_ms",
        "measured",
        "new_session",
        "now_ns",
        "placement",
        "relocked",
        "renew",
        "renewed_client",
        "session_ms",
    )

    def __init__(
        self,
        *,
        now_ns: int,
        ids: IdAllocator,
        placement: Placement,
        instance_id: bytes,
        counter_shard: int,
        new_session: SessionSource,
        session_ms: int,
    ) -> None:
        self.now_ns = now_ns
        self.ids = ids
        self.placement = placement
        self.instance_id = instance_id
        self.counter_shard = counter_shard
        self.new_session = new_session
        self.session_ms = session_ms
        self.keepalive_ms = session_ms // 4
        self.measured: dict[tuple[int, int], int] = {}
        self.cut: Cut | None = None
        self.collect = False
        self.renew = True
        self.renewed_client = b""
        self.relocked = 0
        self._spare_ids: list[int] = []
        self._used_ids: list[int] = []

    def begin(self) -> None:
        """A new run of the transaction starts; ids that an earlier run took are used again."""
        self.cut = None
        self.collect = False
        self.renewed_client = b""
        self.relocked = 0
        if self._used_ids:
            self._spare_ids, self._used_ids = self._used_ids[::-1] + self._spare_ids, []

    async def new_inode(self, directory: int) -> int:
        """An unused inode id for an entry of `directory`."""
        ino = self._spare_ids.pop() if self._spare_ids else await self.ids.take(directory)
        self._used_ids.append(ino)
        return ino


class SessionSource(Protocol):
    """Makes session ids."""

    def __call__(self) -> bytes:
        """16 random bytes."""
