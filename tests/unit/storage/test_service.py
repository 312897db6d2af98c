"""The shell of a storage process around a stand-in for the engine."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from fs3.core.config import MgmtdConfig, StorageConfig
from fs3.core.errors import Fs3Error
from fs3.kv.memory import MemoryKv
from fs3.mgmtd.ops.change_settings import change_settings
from fs3.mgmtd.service import MgmtdService
from fs3.storage.service import StorageService, Surroundings
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import ChangeSettingsRequest
from fs3.v1.routing_pb2 import LocalState, PublicState, Routing
from fs3.v1.storage_pb2 import EngineStatus

LEASE_MS = 60_000
SERVING = PublicState.PUBLIC_STATE_SERVING


class StandIn:
    """Keeps what the shell told it and reports what the test wants."""

    def __init__(self, config_json: str) -> None:
        self.config: dict[str, Any] = json.loads(config_json)
        self.routing = Routing()
        self.serve_until_ns = 0
        self.stopped = False
        self.broken = ""

    def start(self) -> int:
        return 4242

    def apply_routing(self, routing: bytes) -> None:
        self.routing = Routing.FromString(routing)

    def renew_lease(self, serve_until_monotonic_ns: int) -> None:
        self.serve_until_ns = max(self.serve_until_ns, serve_until_monotonic_ns)

    def status(self) -> bytes:
        status = EngineStatus(routing_version=self.routing.version)
        for chain in self.routing.chains:
            for target in chain.targets:
                if target.target_id // 1000 == self.config["node_id"]:
                    local = LocalState.LOCAL_STATE_OFFLINE if self.broken else LocalState.LOCAL_STATE_UPTODATE
                    status.targets.add(
                        target_id=target.target_id,
                        chain_id=chain.chain_id,
                        chain_version=chain.version,
                        local_state=local,
                        error=self.broken,
                    )
        return status.SerializeToString()

    def stop(self) -> None:
        self.stopped = True


class World:
    """A manager, and storage shells that can be started."""

    def __init__(self, tmp_path: Path, address: str, manager: MgmtdService) -> None:
        self.tmp_path = tmp_path
        self.address = address
        self.manager = manager
        self.engines: list[StandIn] = []

    def config(self, **changes: Any) -> StorageConfig:
        values: dict[str, Any] = {
            "cluster_id": "c1",
            "token": "t",
            "mgmtd": (self.address,),
            "data_dir": str(self.tmp_path / "node"),
            "disks": (str(self.tmp_path / "disk"),),
            "ready_file": str(self.tmp_path / "ready.json"),
            **changes,
        }
        return StorageConfig(**values)

    def make(self, config_json: str) -> StandIn:
        self.engines.append(StandIn(config_json))
        return self.engines[-1]

    async def start(self, **changes: Any) -> tuple[asyncio.Task[None], asyncio.Event]:
        service = StorageService(self.config(**changes), Surroundings(make_engine=self.make))
        stop = asyncio.Event()
        task = asyncio.create_task(service.run(stop))
        ready = asyncio.create_task(service.ready.wait())
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            ready.cancel()
            await task
        return task, stop

    @property
    def routing(self) -> Routing:
        assert self.manager.manager is not None
        return self.manager.manager.routing


def run(tmp_path: Path, body: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        config = MgmtdConfig(
            cluster_id="c1", token="t", kv="memory:", replicas=1, lease_ms=LEASE_MS, heartbeat_ms=50, targets_per_disk=2
        )
        store = MemoryKv()
        manager, stop = MgmtdService(config, store=store), asyncio.Event()
        task = asyncio.create_task(manager.run(stop))
        await manager.ready.wait()
        try:
            async with asyncio.timeout(20):
                await body(World(tmp_path, manager.address, manager))
        finally:
            stop.set()
            await task
            await store.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def test_a_storage_process_registers_serves_reports_and_leaves(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        task, stop = await world.start()
        (engine,) = world.engines
        assert json.loads((tmp_path / "ready.json").read_text())["frame_port"] == 4242
        assert engine.config["node_id"] == 1
        assert engine.config["disks"][0]["path"] == str(tmp_path / "disk")
        assert (world.routing.nodes[0].frame_port, world.routing.nodes[0].host) == (4242, "127.0.0.1")
        await until(lambda: len(engine.routing.chains) == 2)
        assert world.routing.disks[0].capacity_bytes > 0
        assert [t.state for c in engine.routing.chains for t in c.targets] == [SERVING, SERVING]
        stop.set()
        await task
        assert engine.stopped
        assert not any(t.state == SERVING for c in world.routing.chains for t in c.targets)

    run(tmp_path, body)


def test_the_lease_counts_from_the_sending_of_a_heartbeat(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        before_ns = time.monotonic_ns()
        task, stop = await world.start()
        (engine,) = world.engines
        await until(lambda: engine.serve_until_ns > 0)
        first_ns = engine.serve_until_ns
        assert before_ns < first_ns - LEASE_MS * 500_000 < time.monotonic_ns()
        await until(lambda: engine.serve_until_ns > first_ns)
        stop.set()
        await task

    run(tmp_path, body)


def test_the_level_of_what_the_engine_logs_follows_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[str] = []
    monkeypatch.setattr("fs3.storage.service.change_engine_log", levels.append)

    async def body(world: World) -> None:
        task, stop = await world.start(log_level="error")
        manager = world.manager.manager
        assert manager is not None
        await change_settings(manager, ChangeSettingsRequest(values={"log_level": "debug"}))
        await until(lambda: levels == ["debug"])
        await change_settings(manager, ChangeSettingsRequest(unset=["log_level"]))
        await until(lambda: levels == ["debug", "error"])
        stop.set()
        await task

    root = logging.getLogger()
    before = root.level
    try:
        run(tmp_path, body)
    finally:
        root.setLevel(before)


def test_a_failing_target_is_reported_before_the_next_heartbeat_is_due(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        task, stop = await world.start()
        (engine,) = world.engines
        await until(lambda: len(engine.routing.chains) == 2)
        engine.broken = "the disk is on fire"
        await until(lambda: not any(t.state == SERVING for c in world.routing.chains for t in c.targets))
        stop.set()
        await task

    run(tmp_path, body)


def test_a_restarted_process_keeps_its_node_id_and_targets(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        for _ in range(2):
            task, stop = await world.start()
            await until(lambda: len(world.engines[-1].routing.targets) == 2)
            stop.set()
            await task
        assert [e.config["node_id"] for e in world.engines] == [1, 1]
        assert len(world.routing.nodes) == 1

    run(tmp_path, body)


def test_a_wrong_token_is_one_clear_error_and_no_engine(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        with pytest.raises(Fs3Error) as refused:
            await world.start(token="wrong")
        assert refused.value.code == Code.CODE_UNAUTHENTICATED
        assert not world.engines

    run(tmp_path, body)


def test_an_engine_that_does_not_start_is_an_error_and_leaves_no_lock(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        make = world.make

        def failing(config_json: str) -> StandIn:
            engine = make(config_json)

            def start() -> int:
                raise OSError(98, "the port is taken")

            engine.start = start  # type: ignore[method-assign]
            return engine

        service = StorageService(world.config(), Surroundings(make_engine=failing))
        with pytest.raises(OSError, match="the port is taken"):
            await service.run(asyncio.Event())
        task, stop = await world.start()
        stop.set()
        await task

    run(tmp_path, body)
