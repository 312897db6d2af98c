"""Layouts of new files and directories, and the space of the cluster, from the routing."""

from __future__ import annotations

from typing import Final

from fs3.core import settings
from fs3.core.errors import error
from fs3.core.layout import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, check_layout
from fs3.meta.routing import RoutingHolder
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import Layout, StatfsResponse

# A file begins on so many chains, if there are, and is spread over more and more as it grows.
STRIPE_FIRST: Final = 16
STRIPE_MAX: Final = 128


class RoutingPlacement:
    """:class:`fs3.meta.context.Placement` over a RoutingHolder. Belongs to one event loop.

    `chunk_bytes` and `stripe` (0: STRIPE_FIRST chains, growing to STRIPE_MAX, as far as there are) are the
    defaults where the settings of the cluster say nothing.
    `seed` is where the first file's stripe begins; the next file's begins one chain further.
    """

    def __init__(self, holder: RoutingHolder, *, chunk_bytes: int, stripe: int = 0, seed: int = 0) -> None:
        self._holder = holder
        self._own_chunk_bytes = chunk_bytes
        self._own_stripe = stripe
        self._next = seed

    @property
    def _chunk_bytes(self) -> int:
        return settings.value_of(self._holder.settings, settings.CHUNK_BYTES, self._own_chunk_bytes)

    @property
    def _stripe(self) -> int:
        return settings.value_of(self._holder.settings, settings.STRIPE, self._own_stripe)

    def file_layout(self, requested: Layout | None, inherited: Layout) -> Layout:
        """See Placement. What `requested` leaves 0 comes from the directory, then from the cluster."""
        wish = requested or inherited
        view = self._holder.view
        if wish.table_version:
            table = view.tables.get((wish.table_id, wish.table_version))
        else:
            table = view.newest_table(wish.table_id)
        if table is None or not table.chain_ids:
            if requested is not None and (wish.table_id or wish.table_version):
                raise error(
                    Code.CODE_INVALID_ARGUMENT, f"there is no chain table {wish.table_id} version {wish.table_version}"
                )
            raise error(
                Code.CODE_UNAVAILABLE,
                "the cluster has no chains yet: start storage services and wait until `fs3 status` shows chains",
            )
        chains = len(table.chain_ids)
        stripe = wish.stripe or inherited.stripe or self._stripe
        if wish is inherited or not wish.stripe:
            stripe = min(stripe, chains)
        grows = not stripe and chains > STRIPE_FIRST
        first = wish.first
        if requested is None or not requested.table_version:
            first = self._next % chains
            self._next += 1
        layout = Layout(
            table_id=table.table_id,
            table_version=table.table_version,
            chunk_bytes=wish.chunk_bytes or inherited.chunk_bytes or self._chunk_bytes,
            stripe=0 if grows else stripe or chains,
            first=first,
            stripe_first=STRIPE_FIRST if grows else 0,
            stripe_max=min(chains, STRIPE_MAX) if grows else 0,
        )
        check_layout(layout, chains)
        return layout

    def directory_layout(self, requested: Layout | None, inherited: Layout) -> Layout:
        """See Placement."""
        if requested is None:
            return inherited
        size = requested.chunk_bytes
        if size and (size & (size - 1) or not CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX):
            raise error(Code.CODE_INVALID_ARGUMENT, f"chunk size {size} is not a power of two from 64 KiB to 64 MiB")
        table = self._holder.view.newest_table(requested.table_id)
        if table is not None and requested.stripe > len(table.chain_ids):
            chains = len(table.chain_ids)
            raise error(Code.CODE_INVALID_ARGUMENT, f"a stripe of {requested.stripe}: there are {chains} chains")
        return requested

    def space(self) -> StatfsResponse:
        """See Placement. 0 of everything before storage is there."""
        view = self._holder.view
        table = view.newest_table()
        replicas = max(1, table.replicas if table is not None else 1)
        disks = view.routing.disks
        return StatfsResponse(
            capacity_bytes=sum(disk.capacity_bytes for disk in disks) // replicas,
            free_bytes=sum(disk.free_bytes for disk in disks) // replicas,
            chunk_bytes=self._chunk_bytes,
        )
