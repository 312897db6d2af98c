"""The gRPC network as a dependency: the real one, and the shape that a simulated one has."""

from __future__ import annotations

from typing import Any, Protocol

import grpc.aio

from fs3.rpc.grpc_client import make_channel
from fs3.rpc.grpc_server import listen, make_server


class Network(Protocol):
    """Channels and servers of the control plane. Belongs to one event loop."""

    def connect(self, address: str) -> Any:
        """Make a channel to host:port, as ``grpc.aio.Channel``; it connects on first use and again after a loss."""

    def server(self, *, token: str, cluster_id: str) -> Any:
        """Make a server that checks token and cluster, as ``grpc.aio.Server``."""

    async def listen(self, server: Any, host: str, port: int) -> int:
        """Bind and start; returns the port. Raises OSError when the port is taken."""


class GrpcNetwork:
    """gRPC over the machine's network."""

    def connect(self, address: str) -> grpc.aio.Channel:
        """See Network."""
        return make_channel(address)

    def server(self, *, token: str, cluster_id: str) -> grpc.aio.Server:
        """See Network."""
        return make_server(token=token, cluster_id=cluster_id)

    async def listen(self, server: grpc.aio.Server, host: str, port: int) -> int:
        """See Network."""
        return await listen(server, host, port)
