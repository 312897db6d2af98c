"""The cluster manager's process: the gRPC door, the lease, and the primary's life."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
from collections.abc import AsyncIterator, Coroutine
from typing import Any, Final, TypeVar

from fs3.core.clock import Clock, RealClock
from fs3.core.config import MgmtdConfig
from fs3.core.errors import Fs3Error, error
from fs3.core.service import run_service, write_ready
from fs3.kv import retry
from fs3.kv.api import KvError, KvStore, Transaction, TransactionFn
from fs3.kv.open import open_store
from fs3.mgmtd import lease
from fs3.mgmtd.manager import Manager
from fs3.mgmtd.ops.change_settings import change_settings
from fs3.mgmtd.ops.change_tags import change_tags
from fs3.mgmtd.ops.get_primary import get_primary
from fs3.mgmtd.ops.get_status import get_status
from fs3.mgmtd.ops.heartbeat import heartbeat
from fs3.mgmtd.ops.register import register
from fs3.mgmtd.ops.unregister import unregister
from fs3.mgmtd.ops.watch_routing import watch_routing
from fs3.mgmtd.state import LEASE_KEY, load
from fs3.rpc.network import GrpcNetwork, Network
from fs3.v1.disk_mgmtd_pb2 import ManagerLease
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import (
    ChangeSettingsRequest,
    ChangeTagsRequest,
    GetPrimaryRequest,
    GetPrimaryResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    ManagerStatus,
    ManagerStatusRequest,
    RegisterRequest,
    RegisterResponse,
    UnregisterRequest,
    UnregisterResponse,
    WatchRoutingRequest,
)
from fs3.v1.mgmtd_pb2_grpc import MgmtdServicer, add_MgmtdServicer_to_server
from fs3.v1.routing_pb2 import GetRoutingResponse, Node, Settings

log = logging.getLogger("fs3.mgmtd")

T = TypeVar("T")

# Without anything to hurry for, decisions are made so often in a heartbeat's time.
TICKS_PER_HEARTBEAT: Final = 2
# Decisions that follow each other at once are at least so far apart.
DECISION_PAUSE_S: Final = 0.005
STOP_GRACE_S: Final = 0.5
RELEASE_MS: Final = 1_000
# Parts of the primary lease: how often a holder renews, how often an observer looks.
RENEWALS_PER_LEASE: Final = 6
LOOKS_PER_LEASE: Final = 8


class _Servicer(MgmtdServicer):
    """The RPCs; each is a function in fs3/mgmtd/ops."""

    def __init__(self, service: MgmtdService) -> None:
        self._service = service
        self._changing: set[asyncio.Task[Any]] = set()

    async def Register(self, request: RegisterRequest, context: Any) -> RegisterResponse:
        """See ops/register.py."""
        return await self._see_through(register(self._service.primary(), request))

    async def Heartbeat(self, request: HeartbeatRequest, context: Any) -> HeartbeatResponse:
        """See ops/heartbeat.py."""
        return await heartbeat(self._service.primary(), request)

    async def WatchRouting(self, request: WatchRoutingRequest, context: Any) -> AsyncIterator[GetRoutingResponse]:
        """See ops/watch_routing.py."""
        async for response in watch_routing(self._service.primary(), request):
            yield response
        self._service.primary()

    async def GetPrimary(self, request: GetPrimaryRequest, context: Any) -> GetPrimaryResponse:
        """See ops/get_primary.py."""
        return get_primary(self._service.seen_lease(), self._service.config.cluster_id)

    async def Unregister(self, request: UnregisterRequest, context: Any) -> UnregisterResponse:
        """See ops/unregister.py."""
        return await self._see_through(unregister(self._service.primary(), request))

    async def ChangeSettings(self, request: ChangeSettingsRequest, context: Any) -> Settings:
        """See ops/change_settings.py."""
        return await self._see_through(change_settings(self._service.primary(), request))

    async def ChangeTags(self, request: ChangeTagsRequest, context: Any) -> Node:
        """See ops/change_tags.py."""
        return await self._see_through(change_tags(self._service.primary(), request))

    async def GetStatus(self, request: ManagerStatusRequest, context: Any) -> ManagerStatus:
        """See ops/get_status.py."""
        return get_status(self._service.primary())

    async def _see_through(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run `operation` to its end whatever becomes of the caller.

        gRPC cancels a handler when the deadline passes. A commit that is cut short may have reached the store, and
        the next one would build on records that are behind it.
        """
        task = asyncio.create_task(operation)
        self._changing.add(task)
        task.add_done_callback(self._changed)
        return await asyncio.shield(task)

    def _changed(self, task: asyncio.Task[Any]) -> None:
        self._changing.discard(task)
        if not task.cancelled():
            # Seen by the caller if there is one; what ends the primary has been logged.
            task.exception()


class MgmtdService:
    """One manager process, primary or standby. Belongs to one event loop."""

    def __init__(
        self,
        config: MgmtdConfig,
        *,
        store: KvStore | None = None,
        clock: Clock | None = None,
        network: Network | None = None,
        rng: random.Random | None = None,
        release: int = lease.RELEASE,
    ) -> None:
        """Make a manager; the keywords replace what it has of the machine, for tests and simulation."""
        self.config = config
        self.clock: Clock = clock or RealClock()
        self._network = network or GrpcNetwork()
        self._rng = rng or random.SystemRandom()
        self.manager: Manager | None = None
        self.address = ""
        self.port = 0
        self._own_store = store is None
        self._store = store
        self._holder = self._rng.randbytes(16)
        self._terms = 0
        self._trust = lease.Trust(0)
        self._observed: lease.Observed | None = None
        self._lease_ns = config.primary_lease_ms * 1_000_000
        self._own_release = release
        self._outdated = False
        self.ready = asyncio.Event()

    # -- for the RPCs -------------------------------------------------------------------------------------

    def seen_lease(self) -> ManagerLease:
        """Return the lease record as last seen."""
        if self.manager is not None:
            return self.manager.held
        if self._observed is None or self._observed.record is None:
            return ManagerLease()
        return ManagerLease.FromString(self._observed.record)

    def primary(self) -> Manager:
        """Return the manager if this process is certainly primary. Raises NOT_PRIMARY with what is known."""
        manager = self.manager
        if manager is not None and not manager.lost.is_set() and self._trust.valid(self.clock.monotonic_ns()):
            return manager
        seen = self.seen_lease()
        known = "" if seen.released or seen.address == self.address else seen.address
        raise error(
            Code.CODE_NOT_PRIMARY,
            f"this cluster manager is not primary{f'; {known} is' if known else ' and knows of none'}",
            primary=known,
        )

    # -- the process --------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`. Raises Fs3Error, OSError, KvError for what a person has to fix."""
        config = self.config
        token = config.secret()
        store = self._store or open_store(config.kv)
        self._store = store
        server = self._network.server(token=token, cluster_id=config.cluster_id)
        add_MgmtdServicer_to_server(_Servicer(self), server)
        try:
            self.port = await self._network.listen(server, config.host, config.grpc_port)
            self.address = f"{config.host}:{self.port}"
            log.info("cluster manager of %s on %s", config.cluster_id, self.address)
            ready = asyncio.create_task(self._write_ready())
            election = asyncio.create_task(self._elections(store))
            stopped = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait({election, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if election.done():
                    await election
            finally:
                for task in (ready, election, stopped):
                    task.cancel()
                await asyncio.gather(ready, election, stopped, return_exceptions=True)
                await self._release(store)
        finally:
            await server.stop(STOP_GRACE_S)
            if self._own_store:
                await store.close()

    async def _write_ready(self) -> None:
        await self.ready.wait()
        write_ready(self.config.ready_file, host=self.config.host, grpc_port=self.port)

    async def _elections(self, store: KvStore) -> None:
        """Watch the lease, take it when it is free, be primary until it is lost; again and again."""
        while True:
            try:
                held = await self._try_take(store)
            except KvError as exc:
                if not exc.retryable:
                    raise
                log.warning("the lease cannot be read: %s", exc)
                held = None
            if held is None:
                self.ready.set()
            else:
                try:
                    await self._be_primary(store, held)
                except Fs3Error as exc:
                    if exc.code not in (Code.CODE_NOT_PRIMARY, Code.CODE_UNAVAILABLE):
                        raise
                    log.warning("the lease was lost again at once: %s", exc.message)
                except KvError as exc:
                    if not exc.retryable:
                        raise
                    log.warning("the state cannot be read: %s", exc)
            await self.clock.sleep(self._lease_ns / 1e9 / LOOKS_PER_LEASE)

    async def _try_take(self, store: KvStore) -> ManagerLease | None:
        """Look at the lease once; take it when it is free. None while somebody else holds it."""
        sent_ns = self.clock.monotonic_ns()

        async def attempt(tx: Transaction) -> ManagerLease | None:
            record = await tx.get(LEASE_KEY)
            seen = self._observed = lease.observe(self._observed, record, sent_ns)
            self._note_outdated(lease.outdated(record, self._own_release))
            if self._outdated:
                return None
            # A holder that listened where this process listens now has ended.
            mine = record is not None and ManagerLease.FromString(record).address == self.address
            if not mine and not lease.may_take(seen, sent_ns, self._lease_ns):
                return None
            held = lease.taken(record, self._holder, self.address, self._own_release)
            tx.set(LEASE_KEY, held.SerializeToString())
            return held

        held = await self._run(store, attempt, self.config.primary_lease_ms, idempotent=False)
        if held is not None:
            self._trust = lease.Trust(0).after_renewal(sent_ns, self._lease_ns)
        return held

    def _note_outdated(self, outdated: bool) -> None:
        if outdated and not self._outdated:
            log.error("a cluster manager of a newer release has been primary: this one never will be; upgrade it")
        self._outdated = outdated

    async def _run(self, store: KvStore, fn: TransactionFn[T], deadline_ms: float, *, idempotent: bool) -> T:
        return await retry.run(store, fn, deadline_ms=deadline_ms, idempotent=idempotent, rng=self._rng)

    async def _be_primary(self, store: KvStore, held: ManagerLease) -> None:
        tx = store.transaction()
        try:
            state, records = await load(tx, self.config.cluster_id)
        finally:
            tx.cancel()
        history = self._next_history()
        manager = Manager(self.config, store, self.clock, held, state, records, self._rng, history=history)
        await manager.begin()
        self.manager = manager
        log.info("primary, epoch %d: %d nodes, %d chains", held.epoch, len(records.nodes), len(records.chains))
        self.ready.set()
        tasks = [asyncio.create_task(t) for t in (self._renewals(store, manager), self._decisions(manager))]
        lost = asyncio.create_task(manager.lost.wait())
        try:
            done, _ = await asyncio.wait({*tasks, lost}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            # First of all: nothing may be answered on the strength of a decision that is cut short here.
            manager.lose()
            for task in (*tasks, lost):
                task.cancel()
            await asyncio.gather(*tasks, lost, return_exceptions=True)
            self._observed = None

    def _next_history(self) -> int:
        """Name the routings of a new term; not by the store, which may be put back to what it was."""
        self._terms += 1
        drawn = hashlib.blake2b(self._holder + self._terms.to_bytes(8, "big"), digest_size=8)
        return int.from_bytes(drawn.digest(), "big") or 1

    async def _renewals(self, store: KvStore, manager: Manager) -> None:
        while True:
            await self.clock.sleep(self._lease_ns / 1e9 / RENEWALS_PER_LEASE)
            sent_ns = self.clock.monotonic_ns()
            following = lease.renewed(manager.held)

            async def renew(tx: Transaction, following: ManagerLease = following) -> bool:
                if not lease.holds(await tx.get(LEASE_KEY), following):
                    return False
                tx.set(LEASE_KEY, following.SerializeToString())
                return True

            try:
                held = await self._run(store, renew, self.config.primary_lease_ms / 2, idempotent=True)
            except KvError as exc:
                log.warning("the lease was not renewed: %s", exc)
                continue
            if not held:
                manager.lose("another cluster manager took the lease")
                return
            # Not copied into the old one: a message keeps the memory of all that was ever written to it.
            manager.held = following
            self._trust = self._trust.after_renewal(sent_ns, self._lease_ns)

    async def _decisions(self, manager: Manager) -> None:
        tick_s = self.config.heartbeat_ms / 1000 / TICKS_PER_HEARTBEAT
        while not manager.lost.is_set():
            try:
                if self._trust.valid(self.clock.monotonic_ns()):
                    await manager.decide()
            except Fs3Error as exc:
                if exc.code == Code.CODE_NOT_PRIMARY:
                    manager.lose(exc.message)
                    return
                log.warning("a decision did not become durable: %s", exc.message)
            await asyncio.sleep(DECISION_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(tick_s):
                    await manager.wait_kick()

    async def _release(self, store: KvStore) -> None:
        """Give the lease back, so that the next manager need not wait."""
        manager, self.manager = self.manager, None
        if manager is None:
            return

        async def give_back(tx: Transaction) -> None:
            if lease.holds(await tx.get(LEASE_KEY), manager.held):
                tx.set(LEASE_KEY, lease.released(manager.held).SerializeToString())

        with contextlib.suppress(KvError):
            await self._run(store, give_back, RELEASE_MS, idempotent=True)


def run(config: MgmtdConfig) -> int:
    """Run a cluster manager until SIGTERM or SIGINT; returns the exit code. To be called from the main thread."""
    return run_service(
        lambda stop: MgmtdService(config).run(stop),
        name="mgmtd",
        log_level=config.log_level,
        ready_file=config.ready_file,
        expected=(KvError,),
    )
