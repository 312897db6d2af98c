"""Simulates a whole cluster in virtual time from one seed: the real managers, storage shells, storage and clients.

``python -m fs3.testing.simulator --seed 7`` runs one seed and says what was found; without ``--seed`` it runs many
of them (see sim_campaign.py). A seed's life: the cluster starts and clients work while machines crash, stand still and
are cut off, messages and commits are lost, disks fail and rot; then everything heals, and within a bound every chain
must serve in full and every operation must have ended; at the end the world is checked as a whole.

Everything that happens is decided by the seed: the same seed gives the same trace hash.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from fs3.kv.faults import KvFaults
from fs3.mgmtd.manager import Manager
from fs3.testing.sim_checks import CheckedKv, Checks
from fs3.testing.sim_control import ControlPlane
from fs3.testing.sim_plan import Plan
from fs3.testing.sim_world import World
from fs3.testing.virtual_loop import NS, Stuck, VirtualLoop, current_process
from fs3.testing.virtual_network import VirtualNetwork
from fs3.v1.routing_pb2 import PublicState

# How often the driver looks for violations and for the end of a phase, at pace 1.
LOOK_S: Final = 1.0
# Garbage is collected at these times and no others: what a collection ends is part of the run.
COLLECT_S: Final = 60.0
# What the world counts besides faults and operations.
NO_FAULTS = {"operations that succeeded", "virtual seconds"}
# Healing may take so many leases of nodes and of managers, and so many seconds besides.
HEAL_LEASES: Final = 12
HEAL_S: Final = 300.0
# The world's own checks at the end take at most so long, and the control plane stands still meanwhile.
CHECK_NS_MAX: Final = 400 * NS
LOG_LINES_MAX: Final = 200

WORLDS: Final = ("native", "model")


class Violated(Exception):
    """A property does not hold."""

    def __init__(self, what: str, text: str) -> None:
        super().__init__(f"{what}: {text}")
        self.what = what
        self.text = text


@dataclass
class Report:
    """What one seed showed."""

    seed: int
    world: str
    plan: dict[str, Any]
    violated: str = ""
    """The violated property; empty when there is none."""
    violation: str = ""
    at_s: float = 0.0
    """Virtual time of the violation."""
    virtual_s: float = 0.0
    wall_s: float = 0.0
    operations: int = 0
    decisions: int = 0
    epochs: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    trace_hash: str = ""
    heal_s: float = 0.0
    """Virtual time from the end of the faults until everything served."""
    trace: list[str] = field(default_factory=list)
    """The last events, when a property is violated."""

    @property
    def passed(self) -> bool:
        """Whether every property held."""
        return not self.violated

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return asdict(self)


class _Log(logging.Handler):
    """Keeps the last lines of the system under test, with virtual time and process; an error is a violation."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=LOG_LINES_MAX)
        self._simulation = simulation

    def emit(self, record: logging.LogRecord) -> None:
        process = current_process()
        who = process.name if process is not None else "driver"
        line = f"{self._simulation.loop.time():.3f} {who} {record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info:
            line += "\n" + logging.Formatter().formatException(record.exc_info)
        self.lines.append(line)
        if record.levelno >= logging.ERROR:
            self._simulation.fail("no internal error", line)


def make_world(kind: str, plan: Plan) -> World:
    """Make the world of a plan: the native one, or the model in Python. Raises ImportError without native module."""
    if kind == "model":
        from fs3.testing.model_world import ModelWorld

        return ModelWorld(plan.seed, plan.world_options())
    world: World = importlib.import_module("fs3.native").SimWorld(plan.seed, plan.world_options())
    return world


class Simulation:
    """One seed. Use once; belongs to one thread."""

    def __init__(self, plan: Plan, world: World, kind: str = "native", *, verbose: bool = False) -> None:
        self.plan = plan
        self.world = world
        self.loop = VirtualLoop(plan.seed, shuffle=plan.shuffle)
        self.loop.on_advance = self._advance
        self.loop.set_exception_handler(self._unhandled)
        self.network = VirtualNetwork(self.loop, world.delays, plan.seed)
        self.faults: Counter[str] = Counter()
        self.checks = Checks(self.fail, self)
        self.kv_faults = KvFaults(random.Random(f"kv {plan.seed}"))
        self.store = CheckedKv(now_ms=lambda: self.loop.now_ns // 1_000_000, faults=self.kv_faults, checks=self.checks)
        self.report = Report(plan.seed, kind, plan.to_json())
        self.control = ControlPlane(self)
        self._log = _Log(self)
        self._verbose = verbose
        self._chaos = False

    # -- what happens beside the loop ---------------------------------------------------------------------

    def _advance(self, until_ns: int) -> None:
        self.world.run_until(until_ns)
        # Processes that are killed or begun here see the time that it is.
        self.loop.now_ns = until_ns
        self.control.follow_world()

    @property
    def now_ns(self) -> int:
        """See sim_checks.Targets."""
        return self.loop.now_ns

    def missing(self, target_id: int) -> str:
        """See sim_checks.Targets; not every world can tell."""
        tell: Callable[[int], str] = getattr(self.world, "missing", lambda _: "")
        return tell(target_id)

    def serves_until_ns(self, target_id: int) -> int:
        """See sim_checks.Targets."""
        return self.control.serves_until_ns(target_id)

    def ended_ns(self, target_id: int) -> tuple[int, int]:
        """See sim_checks.Targets."""
        return self.control.ended_ns(target_id)

    def fail(self, what: str, text: str) -> None:
        """Note a violated property; the first one counts, and the run ends at the driver's next look."""
        if self.report.passed:
            self.report.violated = what
            self.report.violation = text
            self.report.at_s = self.loop.time()

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        exc = context.get("exception")
        if not loop.is_closed():
            self.fail("no internal error", f"{context.get('message')}: {type(exc).__name__}: {exc}")

    # -- the run ------------------------------------------------------------------------------------------

    def run(self) -> Report:
        """Simulate; returns what was found. Never raises for a violation."""
        began_s = time.perf_counter()
        with self._surroundings():
            try:
                self.loop.run_until_complete(self._phases())
            except Violated as exc:
                self.fail(exc.what, exc.text)
            except Stuck as exc:
                self.fail("liveness", str(exc))
            finally:
                self._fill_report()
                self.loop.close()
        self.report.wall_s = time.perf_counter() - began_s
        return self.report

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        logger = logging.getLogger("fs3")
        before = (logger.level, logger.propagate, logger.handlers[:])
        logger.handlers[:] = [self._log]
        logger.propagate = False
        if self._verbose:
            logger.setLevel(logging.INFO)
            self._log.setLevel(logging.INFO)
            self._log.lines = deque(maxlen=100_000)
        collects = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield
        finally:
            gc.unfreeze()
            if collects:
                gc.enable()
            logger.setLevel(before[0])
            logger.propagate = before[1]
            logger.handlers[:] = before[2]

    async def _phases(self) -> None:
        plan = self.plan
        collecting = self.loop.create_task(self._collect())
        self._chaos = True
        self._set_kv_faults()
        self.control.start()
        self.world.set_load(True)
        suffering = self.control.suffer(lambda: not self._chaos)
        await self._pass(plan.horizon_s)
        self._heal()
        began_s = self.loop.time()
        self.world.set_load(False)
        await self._until(
            lambda: self.world.quiescent() and self.all_serve(), self._bound_s(), "after healing everything serves"
        )
        self.report.heal_s = self.loop.time() - began_s
        for node in self.control.nodes:
            node.hold_lease(self.loop.now_ns + CHECK_NS_MAX)
        if found := self.world.check():
            raise Violated(*_split(found))
        for task in (collecting, *suffering):
            task.cancel()

    def _bound_s(self) -> float:
        return HEAL_S + HEAL_LEASES * (self.plan.lease_ms + self.plan.primary_lease_ms) / 1000

    def _set_kv_faults(self) -> None:
        plan, faults = self.plan, self.kv_faults
        faults.commit_conflict = plan.kv_conflict
        faults.commit_too_old = faults.read_too_old = plan.kv_too_old
        faults.unknown_applied = faults.unknown_not_applied = plan.kv_unknown / 2
        faults.read_unavailable = plan.kv_unavailable
        faults.delay_s_max = plan.kv_delay_s

    def _heal(self) -> None:
        self._chaos = False
        faults = self.kv_faults
        faults.commit_conflict = faults.commit_too_old = faults.read_too_old = 0.0
        faults.unknown_applied = faults.unknown_not_applied = faults.read_unavailable = faults.delay_s_max = 0.0
        self.world.heal()
        self.control.follow_world()
        self.control.heal()

    async def _collect(self) -> None:
        while True:
            await asyncio.sleep(COLLECT_S * self.plan.pace)
            gc.collect()

    def _look(self) -> None:
        if not self.report.passed:
            raise Violated(self.report.violated, self.report.violation)
        if found := self.world.violation():
            raise Violated(*_split(found))

    async def _pass(self, seconds: float) -> None:
        ends_s = self.loop.time() + seconds
        while self.loop.time() < ends_s:
            await asyncio.sleep(min(LOOK_S * self.plan.pace, ends_s - self.loop.time()))
            self._look()

    async def _until(self, condition: Callable[[], bool], bound_s: float, what: str) -> None:
        ends_s = self.loop.time() + bound_s
        while not condition():
            self._look()
            if self.loop.time() > ends_s:
                raise Violated("liveness", f"{what}: not within {bound_s:.0f} s; {self._situation()}")
            await asyncio.sleep(LOOK_S * self.plan.pace)

    def all_serve(self) -> bool:
        """Tell whether there is a primary, under it every target of every chain serves, and everybody knows."""
        primary = self.control.primary()
        if primary is None or len(primary.routing.chains) < self.plan.chains or _not_serving(primary):
            return False
        return self.control.settled(primary.routing.version)

    def _situation(self) -> str:
        primary = self.control.primary()
        if primary is None:
            return "there is no primary manager"
        lagging = _not_serving(primary)
        return f"chains not serving in full: {'; '.join(lagging) or 'none'}; operations pending: " + (
            "no" if self.world.quiescent() else "yes"
        )

    def _fill_report(self) -> None:
        report = self.report
        statistics = self.world.statistics()
        report.virtual_s = self.loop.time()
        report.operations = statistics.pop("operations", 0)
        report.decisions = self.checks.decisions
        report.epochs = self.checks.epochs
        faults = Counter(self.faults)
        faults.update({k: v for k, v in self.network.counts.items() if k != "control messages"})
        faults["store faults"] += self.kv_faults.injected
        faults.update({k: v for k, v in statistics.items() if k not in NO_FAULTS})
        report.faults = dict(sorted(faults.items()))
        trace = (self.network.trace * 0x100000001B3 ^ self.world.trace_hash() ^ self.checks.decisions) & (2**64 - 1)
        report.trace_hash = f"{trace:016x}"
        if not report.passed or self._verbose:
            report.trace = [*self.world.trace(), *self._log.lines]


def _split(found: str) -> tuple[str, str]:
    what, _, text = found.partition(": ")
    return what, text


def _not_serving(primary: Manager) -> list[str]:
    names = {v: n.removeprefix("PUBLIC_STATE_").lower() for n, v in PublicState.items()}
    return [
        f"chain {c.chain_id} ({', '.join(f'{t.target_id} {names[t.state]}' for t in c.targets)})"
        for c in primary.routing.chains
        if any(t.state != PublicState.PUBLIC_STATE_SERVING for t in c.targets)
    ]


def simulate(plan: Plan, kind: str = "native", *, verbose: bool = False) -> Report:
    """Simulate one plan in this process; see :class:`Simulation`."""
    return Simulation(plan, make_world(kind, plan), kind, verbose=verbose).run()


if __name__ == "__main__":
    from fs3.testing.sim_campaign import main

    sys.exit(main())
