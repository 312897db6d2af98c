"""The shell of a storage process: identity, membership, lease; all data work is the native engine's.

Order of start: lock and identify the disks, register (which ends the earlier life's service), start the engine
under the node id, register its port. Order of the end: stop the engine, then say so to the manager.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fs3.core.clock import Clock, RealClock
from fs3.core.config import StorageConfig
from fs3.core.routing import News
from fs3.core.service import LogLevel, run_service, write_ready
from fs3.rpc.mgmtd_client import MgmtdClient, NodeHooks, NodeSession
from fs3.rpc.network import GrpcNetwork, Network
from fs3.storage.disks import NodeIdentity, open_node
from fs3.storage.engine import (
    EngineFactory,
    StorageEngine,
    change_engine_log,
    engine_config,
    log_engine,
    native_engine,
)
from fs3.v1.mgmtd_pb2 import TargetReport
from fs3.v1.routing_pb2 import Disk, LocalState, Node
from fs3.v1.storage_pb2 import EngineStatus

log = logging.getLogger("fs3.storage")

# How often the engine is asked whether something changed that the manager should hear of at once.
STATUS_S: Final = 0.25
REGISTER_S: Final = 30.0
UNSPECIFIED: Final = LocalState.LOCAL_STATE_UNSPECIFIED


def capacity(path: str) -> tuple[int, int]:
    """Return (capacity, free) bytes of the file system that holds `path`; (0, 0) when it cannot say."""
    try:
        found = os.statvfs(path)
    except OSError:
        return 0, 0
    return found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a storage process has of its machine; tests and simulation replace it."""

    make_engine: EngineFactory = native_engine
    network: Network = field(default_factory=GrpcNetwork)
    clock: Clock = field(default_factory=RealClock)
    rng: random.Random = field(default_factory=random.SystemRandom)
    open_node: Callable[[str, tuple[str, ...], str], NodeIdentity] = open_node
    capacity: Callable[[str], tuple[int, int]] = capacity
    pid: int = field(default_factory=os.getpid)
    status_s: float = STATUS_S


def _known(status: EngineStatus) -> dict[int, tuple[int, int]]:
    """Pick what there is to report: (local state, chain version) of every target that is open or has failed."""
    return {t.target_id: (t.local_state, t.chain_version) for t in status.targets if t.local_state != UNSPECIFIED}


class StorageService:
    """One storage node. Belongs to one event loop; the engine has threads of its own."""

    def __init__(self, config: StorageConfig, surroundings: Surroundings | None = None) -> None:
        self.config = config
        self._log_level = LogLevel(config.log_level, change_engine_log)
        self._around = surroundings or Surroundings()
        self.ready = asyncio.Event()
        self.session: NodeSession | None = None
        self._engine: StorageEngine | None = None
        self._identity: NodeIdentity | None = None
        self._reported: dict[int, tuple[int, int]] = {}
        self._errors: dict[int, str] = {}

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`. Raises Fs3Error, OSError for what a person has to fix."""
        token = self.config.secret()
        identity = self._identity = self._around.open_node(
            self.config.data_dir, self.config.disks, self.config.cluster_id
        )
        client = MgmtdClient(self.config.mgmtd, token, self.config.cluster_id, network=self._around.network)
        try:
            session = self.session = NodeSession(
                client, self._node(identity), self._disks(), self._hooks(), self._around.clock
            )
            starting = asyncio.create_task(self._start(session, token))
            stopped = asyncio.create_task(stop.wait())
            await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            else:
                stopped.cancel()
                await starting
                await self._serve(session, stop)
        finally:
            await self._end()
            await client.close()
            identity.close()

    def _node(self, identity: NodeIdentity) -> Node:
        return Node(
            uuid=identity.uuid,
            role="storage",
            host=self.config.host,
            incarnation=self._around.rng.randbytes(16),
            pid=self._around.pid,
            life=identity.life,
        )

    def _hooks(self) -> NodeHooks:
        return NodeHooks(report=self._report, on_routing=self._on_routing, on_accepted=self._on_accepted)

    async def _start(self, session: NodeSession, token: str) -> None:
        assert self._identity is not None
        # Without a port nobody sends anything here; from now on the earlier life's targets are out of service.
        node_id = await session.register(timeout_s=REGISTER_S)
        engine = self._around.make_engine(
            engine_config(
                self.config,
                node_id=node_id,
                node_uuid=self._identity.uuid,
                token=token,
                disks=self._identity.disks,
            )
        )
        port = await asyncio.to_thread(engine.start)
        self._engine = engine
        engine.apply_routing(session.routing.SerializeToString())
        session.node.frame_port = port
        await session.register(timeout_s=REGISTER_S)
        log.info("storage node %d on %s:%d, %d disks", node_id, self.config.host, port, len(self.config.disks))
        write_ready(self.config.ready_file, host=self.config.host, frame_port=port, node_id=node_id)
        self.ready.set()

    async def _serve(self, session: NodeSession, stop: asyncio.Event) -> None:
        """Heartbeat and watch the engine until `stop`; a task that ends early is a bug and ends the process."""
        tasks = {asyncio.create_task(session.run()), asyncio.create_task(self._watch_engine(session))}
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            for task in (*tasks, stopped):
                task.cancel()
            await asyncio.gather(*tasks, stopped, return_exceptions=True)

    async def _end(self) -> None:
        """Stop serving first, then tell the manager, so that nobody relies on this node after that."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        await asyncio.to_thread(engine.stop)
        if self.session is not None:
            await self.session.unregister()

    # -- what the session asks ----------------------------------------------------------------------------

    def _disks(self) -> list[Disk]:
        assert self._identity is not None
        out = []
        for disk in self._identity.disks:
            total, free = self._around.capacity(disk.path)
            out.append(Disk(uuid=disk.uuid, path=disk.path, capacity_bytes=total, free_bytes=free))
        return out

    def _status(self) -> EngineStatus:
        assert self._engine is not None
        return EngineStatus.FromString(self._engine.status())

    def _report(self) -> tuple[list[TargetReport], list[Disk]]:
        if self._engine is None:
            return [], []
        status = self._status()
        self._reported = _known(status)
        self._log_errors(status)
        targets = [
            TargetReport(
                target_id=t.target_id,
                local_state=t.local_state,  # type: ignore[arg-type]
                chain_version=t.chain_version,
                used_bytes=t.used_bytes,
                resync_done_chunks=t.resync_done_chunks,
                resync_total_chunks=t.resync_total_chunks,
            )
            for t in status.targets
            if t.target_id in self._reported
        ]
        if not status.disks:
            return targets, self._disks()
        disks = [Disk(uuid=d.uuid, capacity_bytes=d.capacity_bytes, free_bytes=d.free_bytes) for d in status.disks]
        return targets, disks

    def _log_errors(self, status: EngineStatus) -> None:
        errors = {t.target_id: t.error for t in status.targets if t.error and t.target_id in self._reported}
        for target, message in errors.items():
            if self._errors.get(target) != message:
                log.warning("target %d is not in service: %s", target, message)
        self._errors = errors

    def _on_routing(self, news: News) -> None:
        self._log_level.follow(news.routing.settings.values)
        if self._engine is not None:
            self._engine.apply_routing(news.routing.SerializeToString())

    def _on_accepted(self, sent_ns: int, lease_ms: int) -> None:
        if self._engine is not None and lease_ms:
            self._engine.renew_lease(sent_ns + lease_ms * 1_000_000 // 2)

    async def _watch_engine(self, session: NodeSession) -> None:
        """Send a heartbeat early when a target's state changed: resync done, a disk failed."""
        while True:
            await asyncio.sleep(self._around.status_s)
            if _known(self._status()) != self._reported:
                session.kick()


def run(config: StorageConfig) -> int:
    """Run a storage service until SIGTERM or SIGINT; returns the exit code. To be called from the main thread."""
    log_engine(config.log_level)
    return run_service(
        lambda stop: StorageService(config).run(stop),
        name="storage",
        log_level=config.log_level,
        ready_file=config.ready_file,
    )
