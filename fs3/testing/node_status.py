"""Questions to all storage or metadata nodes of a cluster at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeVar

from google.protobuf.message import Message

from fs3.core.errors import Fs3Error
from fs3.rpc.client import Peers
from fs3.v1.frame_pb2 import Method, Role
from fs3.v1.meta_pb2 import MetaStatus, MetaStatusRequest
from fs3.v1.routing_pb2 import LocalState, Routing
from fs3.v1.storage_pb2 import EngineStatus, StatusRequest

if TYPE_CHECKING:
    from fs3.testing.cluster import LocalCluster

M = TypeVar("M", bound=Message)

CALL_S: Final = 2.0


def _addresses(routing: Routing, role: str) -> dict[int, str]:
    return {n.node_id: f"{n.host}:{n.frame_port}" for n in routing.nodes if n.role == role and n.frame_port}


def ask_storage(
    cluster: LocalCluster, routing: Routing, method: int, request: Message, response_class: type[M]
) -> dict[int, M | Fs3Error]:
    """Ask every storage node at the same time; its answer, or why there is none, by node id."""
    return _ask(cluster, _addresses(routing, "storage"), method, request, response_class)


def _ask(
    cluster: LocalCluster, addresses: dict[int, str], method: int, request: Message, response_class: type[M]
) -> dict[int, M | Fs3Error]:

    async def ask() -> dict[int, M | Fs3Error]:
        peers = Peers(role=Role.ROLE_CLIENT, cluster_id=cluster.cluster_id, token=cluster.token)

        async def one(address: str) -> M | Fs3Error:
            try:
                response, _ = await peers.call(address, method, request, response_class, CALL_S)
            except Fs3Error as e:
                return e
            return response

        try:
            answers = await asyncio.gather(*(one(address) for address in addresses.values()))
        finally:
            await peers.close()
        return dict(zip(addresses, answers, strict=True))

    return asyncio.run(ask())


def engine_statuses(cluster: LocalCluster, routing: Routing) -> dict[int, EngineStatus | Fs3Error]:
    """What every storage node says of itself, by node id."""
    return ask_storage(cluster, routing, Method.METHOD_STORAGE_STATUS, StatusRequest(), EngineStatus)


def meta_statuses(cluster: LocalCluster, routing: Routing) -> dict[int, MetaStatus | Fs3Error]:
    """What every metadata node says of itself, by node id."""
    addresses = _addresses(routing, "meta")
    return _ask(cluster, addresses, Method.METHOD_META_STATUS, MetaStatusRequest(), MetaStatus)


def unready(cluster: LocalCluster, routing: Routing) -> set[int]:
    """Give the targets of all chains that do not say of themselves that they serve.

    A process that has just been restarted does not, though the routing may still show its targets as serving.
    """
    ready = {
        t.target_id
        for status in engine_statuses(cluster, routing).values()
        if isinstance(status, EngineStatus)
        for t in status.targets
        if t.local_state == LocalState.LOCAL_STATE_UPTODATE
    }
    return {t.target_id for chain in routing.chains for t in chain.targets} - ready
