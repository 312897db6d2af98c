"""gRPC channels to fs3 services, and the one-shot calls that tools need."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from fs3.core.errors import error
from fs3.rpc.grpc_common import CLUSTER_KEY, OPTIONS, TOKEN_KEY, from_rpc_error
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import GetPrimaryRequest, ManagerStatus, ManagerStatusRequest, WatchRoutingRequest
from fs3.v1.mgmtd_pb2_grpc import MgmtdStub
from fs3.v1.routing_pb2 import Routing


def metadata(token: str, cluster_id: str) -> tuple[tuple[str, str], ...]:
    """Make the metadata every call carries."""
    return ((TOKEN_KEY, token), (CLUSTER_KEY, cluster_id))


def make_channel(address: str) -> grpc.aio.Channel:
    """Make an asyncio channel to host:port; it connects on first use and again after a loss."""
    return grpc.aio.insecure_channel(address, options=OPTIONS)


def fetch_routing(address: str, *, token: str, cluster_id: str = "", timeout_s: float = 5.0) -> Routing:
    """Ask the manager at `address` for its routing, blocking at most `timeout_s` seconds.

    Raises Fs3Error: UNAVAILABLE, TIMEOUT, UNAUTHENTICATED, NOT_PRIMARY (with the primary's address), ...
    """
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        stub: Any = MgmtdStub(channel)
        stream = stub.WatchRouting(
            WatchRoutingRequest(), timeout=timeout_s, metadata=metadata(token, cluster_id), wait_for_ready=False
        )
        try:
            for response in stream:
                if response.HasField("routing"):
                    routing: Routing = response.routing
                    return routing
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, address) from None
        finally:
            stream.cancel()
    return Routing()


def fetch_primary(address: str, *, token: str, cluster_id: str = "", timeout_s: float = 5.0) -> str:
    """Ask the manager at `address` who is primary, blocking at most `timeout_s` seconds; returns host:port.

    Raises Fs3Error: UNAVAILABLE, also when it knows of none, TIMEOUT, UNAUTHENTICATED, ...
    """
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        stub: Any = MgmtdStub(channel)
        try:
            response = stub.GetPrimary(GetPrimaryRequest(), timeout=timeout_s, metadata=metadata(token, cluster_id))
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, address) from None
    if not response.address:
        raise error(Code.CODE_UNAVAILABLE, f"the cluster manager at {address} knows of no primary")
    known: str = response.address
    return known


def fetch_status(address: str, *, token: str, cluster_id: str = "", timeout_s: float = 5.0) -> ManagerStatus:
    """Ask the manager at `address` what it counts, blocking at most `timeout_s` seconds. Raises as `fetch_routing`."""
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        stub: Any = MgmtdStub(channel)
        try:
            status: ManagerStatus = stub.GetStatus(
                ManagerStatusRequest(), timeout=timeout_s, metadata=metadata(token, cluster_id)
            )
        except grpc.RpcError as exc:
            raise from_rpc_error(exc, address) from None
    return status
