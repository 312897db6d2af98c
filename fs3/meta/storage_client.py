"""Chunk control over the frame protocol: remove, truncate and query through the chains."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from google.protobuf.message import Message

from fs3.core.clock import Clock
from fs3.core.errors import Fs3Error, error
from fs3.core.layout import chains_of
from fs3.meta.chunks import SPACE_FILES
from fs3.meta.clock import monotonic_s
from fs3.meta.routing import RoutingHolder, backoff
from fs3.v1.frame_pb2 import Code, Method
from fs3.v1.meta_pb2 import Layout
from fs3.v1.routing_pb2 import Chain
from fs3.v1.storage_pb2 import (
    ChunkInfo,
    ListChunksRequest,
    ListChunksResponse,
    QueryLastRequest,
    QueryLastResponse,
    RemoveRequest,
    RemoveResponse,
    TruncateChunkRequest,
    WriteResponse,
    WriterId,
)

# Requests in flight; each has a channel of its own, so that storage recognises a repeated one.
CHANNELS: Final = 256
REQUEST_S_MAX: Final = 5.0
BACKOFF_S_MIN: Final = 0.02
BACKOFF_S_MAX: Final = 1.0
LAST_INDEX: Final = 0xFFFF_FFFF

_CHUNK_ID = struct.Struct(">IQI")

# What another try cannot mend.
_FINAL: Final = frozenset(
    {
        Code.CODE_INTERNAL,
        Code.CODE_INVALID_ARGUMENT,
        Code.CODE_UNAUTHENTICATED,
        Code.CODE_WRONG_CLUSTER,
        Code.CODE_UNIMPLEMENTED,
        Code.CODE_MESSAGE_TOO_BIG,
    }
)

M = TypeVar("M", bound=Message)


class Caller(Protocol):
    """The part of :class:`fs3.rpc.client.Peers` that is used."""

    async def call(
        self, address: str, method: int, request: Message, response_class: type[M], timeout: float, payload: bytes = b""
    ) -> tuple[M, bytes]:
        """Send one request to `address`."""


class StorageClient:
    """:class:`fs3.meta.chunks.ChunkStore` over the network. Belongs to one event loop.

    Every request carries this client's WriterId; a repeated request carries the same, and so takes effect once.
    """

    def __init__(self, peers: Caller, holder: RoutingHolder, clock: Clock, client_id: bytes) -> None:
        self._peers = peers
        self._holder = holder
        self._clock = clock
        self._client_id = client_id
        self._sequence = 0
        self._channels = list(range(CHANNELS))

    def stripe(self, layout: Layout) -> list[int]:
        """See ChunkStore."""
        table = self._holder.view.tables.get((layout.table_id, layout.table_version))
        if table is None:
            raise error(
                Code.CODE_UNAVAILABLE,
                f"chain table {layout.table_id} version {layout.table_version} is not in the routing yet",
            )
        return chains_of(layout, table.chain_ids)

    async def remove(
        self, chain_id: int, inode: int, first_index: int, *, ends_s: float, space: int = SPACE_FILES
    ) -> int:
        """See ChunkStore."""

        def request(chain: Chain, target_id: int, writer: WriterId) -> RemoveRequest:
            return RemoveRequest(
                chain_id=chain_id,
                chain_version=chain.version,
                target_id=target_id,
                space=space,
                inode=inode,
                first_index=first_index,
                last_index=LAST_INDEX,
                writer=writer,
            )

        reply = await self._update(chain_id, Method.METHOD_STORAGE_REMOVE, request, RemoveResponse, ends_s)
        return 0 if reply is None else reply.removed_chunks

    async def truncate_chunk(
        self, chain_id: int, inode: int, index: int, *, chunk_bytes: int, length: int, ends_s: float
    ) -> None:
        """See ChunkStore."""

        def request(chain: Chain, target_id: int, writer: WriterId) -> TruncateChunkRequest:
            return TruncateChunkRequest(
                chain_id=chain_id,
                chain_version=chain.version,
                target_id=target_id,
                chunk_id=_CHUNK_ID.pack(SPACE_FILES, inode, index),
                chunk_bytes=chunk_bytes,
                length=length,
                writer=writer,
            )

        await self._update(chain_id, Method.METHOD_STORAGE_TRUNCATE, request, WriteResponse, ends_s)

    async def query_last(self, chain_id: int, inode: int, *, ends_s: float) -> tuple[int, int] | None:
        """See ChunkStore."""

        def request(chain: Chain, target_id: int) -> QueryLastRequest:
            return QueryLastRequest(
                chain_id=chain_id,
                chain_version=chain.version,
                target_id=target_id,
                space=SPACE_FILES,
                inode=inode,
            )

        method = Method.METHOD_STORAGE_QUERY_LAST
        reply = await self._call(chain_id, method, request, QueryLastResponse, ends_s, any_replica=True)
        return (reply.index, reply.length) if reply is not None and reply.found else None

    def chains(self) -> list[int]:
        """See :class:`fs3.meta.fsck.chunks.ChunkLister`."""
        return sorted(self._holder.view.chains)

    def replicas(self, chain_id: int) -> list[int]:
        """See ChunkLister."""
        view = self._holder.view
        chain = view.chains.get(chain_id)
        return [] if chain is None else view.serving(chain)

    async def list_chunks(
        self, chain_id: int, target_id: int, after: bytes, limit: int, *, ends_s: float
    ) -> list[ChunkInfo]:
        """See ChunkLister."""
        address = self._holder.view.address_of(target_id)
        if address is None:
            raise error(Code.CODE_UNAVAILABLE, f"target {target_id} of chain {chain_id} has no address")
        request = ListChunksRequest(chain_id=chain_id, target_id=target_id, after=after, limit=limit)
        method, left_s = Method.METHOD_STORAGE_LIST_CHUNKS, max(0.001, ends_s - monotonic_s(self._clock))
        return list((await self._peers.call(address, method, request, ListChunksResponse, left_s))[0].chunks)

    async def _update(
        self,
        chain_id: int,
        method: int,
        request: Callable[[Chain, int, WriterId], Message],
        response_class: type[M],
        ends_s: float,
    ) -> M | None:
        while not self._channels:
            if monotonic_s(self._clock) >= ends_s:
                raise error(Code.CODE_BUSY, f"{CHANNELS} requests to storage are in flight; try again later")
            await self._clock.sleep(BACKOFF_S_MIN)
        channel = self._channels.pop()
        self._sequence += 1
        writer = WriterId(client_id=self._client_id, channel=channel, sequence=self._sequence)
        try:
            return await self._call(
                chain_id, method, lambda chain, target: request(chain, target, writer), response_class, ends_s
            )
        finally:
            self._channels.append(channel)

    async def _call(
        self,
        chain_id: int,
        method: int,
        request: Callable[[Chain, int], Message],
        response_class: type[M],
        ends_s: float,
        *,
        any_replica: bool = False,
    ) -> M | None:
        """Ask the head, or any serving replica in turn, until it answers. None: there is no such chunk."""
        pause_s = BACKOFF_S_MIN
        last: Fs3Error | None = None
        attempt = 0
        while (left_s := ends_s - monotonic_s(self._clock)) > 0:
            view = self._holder.view
            chain = view.chains.get(chain_id)
            serving = [] if chain is None else view.serving(chain)
            target_id = serving[attempt % len(serving) if any_replica else 0] if serving else 0
            address = view.address_of(target_id) if serving else None
            if chain is None or address is None:
                last = error(Code.CODE_UNAVAILABLE, f"chain {chain_id} has no serving replica")
            else:
                message = request(chain, target_id)
                timeout_s = min(left_s, REQUEST_S_MAX)
                try:
                    return (await self._peers.call(address, method, message, response_class, timeout_s))[0]
                except Fs3Error as exc:
                    if exc.code == Code.CODE_CHUNK_NOT_FOUND:
                        return None
                    if exc.code in _FINAL:
                        raise
                    last = exc
            attempt += 1
            left_s = ends_s - monotonic_s(self._clock)
            await backoff(self._holder, view.version, self._clock, max(0.0, min(pause_s, left_s)))
            pause_s = min(pause_s * 2, BACKOFF_S_MAX)
        reason = "" if last is None else f": {last.message}"
        raise error(Code.CODE_UNAVAILABLE, f"chain {chain_id} did not answer in time{reason}", maybe_applied=True)
