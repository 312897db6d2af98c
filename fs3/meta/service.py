"""The process: opens the store, joins the cluster, serves both doors, runs the workers."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import uuid
from pathlib import Path
from typing import Final

import grpc.aio

from fs3 import __version__
from fs3.core.clock import RealClock
from fs3.core.config import MetaConfig
from fs3.core.errors import error
from fs3.core.routing import News
from fs3.core.service import LogLevel, run_service, write_ready
from fs3.kv.api import KvError, KvStore
from fs3.kv.open import open_store
from fs3.meta.background import Background
from fs3.meta.doors import frame_handlers, grpc_handlers
from fs3.meta.engine import Engine
from fs3.meta.fsck.jobs import FsckJobs
from fs3.meta.placement import RoutingPlacement
from fs3.meta.routing import RoutingHolder
from fs3.meta.storage_client import StorageClient
from fs3.rpc.client import Peers
from fs3.rpc.grpc_server import listen, make_server
from fs3.rpc.mgmtd_client import MgmtdClient, NodeHooks, NodeSession
from fs3.rpc.server import FrameServer, Identity
from fs3.v1.frame_pb2 import Code, Role
from fs3.v1.routing_pb2 import Node

log = logging.getLogger("fs3.meta.service")

JOIN_S: Final = 60.0
GRPC_GRACE_S: Final = 2.0
_UUID_NAMESPACE: Final = uuid.UUID("5ba9c1e4-6f0d-4f7c-9c1b-0d2f5b8c7a31")


def run(config: MetaConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code. To be called from the main thread.

    A wrong configuration, an unreachable cluster manager or a store that cannot be opened ends it with one line.
    """
    return run_service(
        lambda stop: _main(config, stop),
        name="meta",
        log_level=config.log_level,
        ready_file=config.ready_file,
        expected=(KvError,),
    )


async def _main(config: MetaConfig, stop: asyncio.Event) -> None:
    store = open_store(config.kv)
    try:
        await serve(config, store, stop)
    finally:
        await store.close()


async def serve(config: MetaConfig, store: KvStore, stop: asyncio.Event) -> None:
    """Join the cluster and serve from `store` until `stop` is set. The store stays open. Raises Fs3Error, OSError."""
    token = config.secret()
    node = Node(
        uuid=node_uuid(config),
        role="meta",
        host=config.host,
        incarnation=secrets.token_bytes(16),
        pid=os.getpid(),
        version=__version__,
    )
    peers = Peers(role=Role.ROLE_META, cluster_id=config.cluster_id, token=token, peer_id=node.uuid)
    manager = MgmtdClient(config.mgmtd, token, config.cluster_id)
    try:
        holder = RoutingHolder()
        server = MetaServer(config, store, StorageClient(peers, holder, RealClock(), node.incarnation), holder)
        try:
            await server.listen(token)
            node.frame_port, node.grpc_port = server.frame_port, server.grpc_port

            log_level = LogLevel(config.log_level)

            def take(news: News) -> None:
                holder.take(*news)
                log_level.follow(holder.settings)

            session = NodeSession(manager, node, hooks=NodeHooks(on_routing=take))
            server.joined(await session.register(timeout_s=JOIN_S))
            await _serve_joined(config, server, session, stop)
        finally:
            await server.stop()
    finally:
        await manager.close()
        await peers.close()


async def _serve_joined(config: MetaConfig, server: MetaServer, session: NodeSession, stop: asyncio.Event) -> None:
    membership = asyncio.create_task(session.run(), name="fs3-meta-membership")
    stopped = asyncio.create_task(stop.wait(), name="fs3-meta-stop")
    try:
        node_id = session.node.node_id
        write_ready(
            config.ready_file,
            host=config.host,
            frame_port=server.frame_port,
            grpc_port=server.grpc_port,
            node_id=node_id,
        )
        log.info(
            "node %d serves metadata at %s:%d (frames), %d (gRPC)",
            node_id,
            config.host,
            server.frame_port,
            server.grpc_port,
        )
        await asyncio.wait({membership, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if membership.done():
            membership.result()
    finally:
        membership.cancel()
        stopped.cancel()
        await asyncio.gather(membership, stopped, return_exceptions=True)
        await session.unregister()


def node_uuid(config: MetaConfig) -> bytes:
    """The node's identity: kept in ``data_dir``, or else derived from what makes the node unique. Raises OSError."""
    if not config.data_dir:
        name = f"{config.cluster_id}/meta/{config.host}:{config.frame_port or os.getpid()}"
        return uuid.uuid5(_UUID_NAMESPACE, name).bytes
    directory = Path(config.data_dir)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "node_uuid"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "w", encoding="ascii") as handle:
            handle.write(uuid.uuid4().hex + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    try:
        return uuid.UUID(path.read_text(encoding="ascii").strip()).bytes
    except ValueError:
        raise error(
            Code.CODE_INVALID_ARGUMENT, f"{path} holds no uuid: restore it, or remove it to make a new node"
        ) from None


class MetaServer:
    """Both doors and the workers over one engine, without membership. Belongs to one event loop."""

    def __init__(self, config: MetaConfig, store: KvStore, storage: StorageClient, holder: RoutingHolder) -> None:
        self._config = config
        self._holder = holder
        placement = RoutingPlacement(
            holder, chunk_bytes=config.chunk_bytes, stripe=config.stripe, seed=secrets.randbelow(1 << 16)
        )
        self.engine = Engine(store, storage, placement, session_ms=config.session_ms, gc_delay_ms=config.gc_delay_ms)
        self._background = Background(self.engine, holder)
        self._audits = FsckJobs(self.engine, storage)
        self._frames: FrameServer | None = None
        self._grpc: grpc.aio.Server | None = None
        self.frame_port = 0
        self.grpc_port = 0

    async def listen(self, token: str) -> None:
        """Make the root directory if need be, and open both doors. Raises OSError, KvError."""
        config = self._config
        await self.engine.bootstrap()
        identity = Identity(config.cluster_id, Role.ROLE_META, token=token, version=__version__)
        frames = self._frames = FrameServer(identity, frame_handlers(self.engine, self._holder, self._audits))
        self.frame_port = await frames.start(config.host, config.frame_port)
        self._grpc = make_server(token=token, cluster_id=config.cluster_id)
        self._grpc.add_generic_rpc_handlers((grpc_handlers(self.engine, self._holder),))
        self.grpc_port = await listen(self._grpc, config.host, config.grpc_port)

    def joined(self, node_id: int) -> None:
        """The node has its id: the workers start."""
        if self._frames is not None:
            self._frames.identity = dataclasses.replace(self._frames.identity, node_id=node_id)
        self._background.node_id = node_id
        self._background.start()

    async def stop(self) -> None:
        """Stop the workers, let running requests finish for a short while, close both doors."""
        await self._audits.stop()
        await self._background.stop()
        if self._frames is not None:
            await self._frames.stop()
        if self._grpc is not None:
            await self._grpc.stop(GRPC_GRACE_S)
