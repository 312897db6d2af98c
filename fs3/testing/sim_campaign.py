"""Runs many seeds of the simulator on all cores, and prints the one command that replays what failed."""

from __future__ import annotations

import argparse
import concurrent.futures
import faulthandler
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fs3.mgmtd import chains
from fs3.testing.sim_plan import draw
from fs3.testing.simulator import WORLDS, Report, simulate

# A seed that takes longer than this is a hang; its worker is ended with a traceback on stderr.
SEED_WALL_S_MAX: Final = 300
PROGRESS_S: Final = 10.0
# Every so many seeds one is run twice, in different processes, and must leave the same trace.
TWICE_EVERY: Final = 16
TRACE_LINES: Final = 40
SEED_BITS: Final = 32


@dataclass(frozen=True)
class Task:
    """What a worker is asked for."""

    seed: int
    world: str
    hours: float | None
    canary: bool
    verbose: bool = False
    given: str = ""

    def command(self) -> str:
        """Write the command that does the same again."""
        words = ["python -m fs3.testing.simulator", f"--seed {self.seed}"]
        words += [f"--hours {self.hours:g}"] if self.hours is not None else []
        words += [f"--world {self.world}"] if self.world != WORLDS[0] else []
        words += ["--canary"] if self.canary else []
        words += [f"--given '{self.given}'"] if self.given else []
        return " ".join(words)


@dataclass
class Summary:
    """What a campaign showed."""

    world: str
    seeds: int = 0
    repeated: int = 0
    virtual_s: float = 0.0
    wall_s: float = 0.0
    operations: int = 0
    decisions: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, report: Report) -> None:
        """Count one seed in."""
        self.seeds += 1
        self.virtual_s += report.virtual_s
        self.operations += report.operations
        self.decisions += report.decisions
        self.faults.update(report.faults)

    def line(self) -> str:
        """Say it in one line."""
        hours = self.virtual_s / 3600
        return (
            f"{self.seeds} seeds, {hours:.1f} simulated hours in {self.wall_s:.0f} s "
            f"({self.virtual_s / max(self.wall_s, 1e-9):.0f} x real time), {self.operations} operations, "
            f"{self.decisions} decisions, {self.faults.total()} faults, {self.repeated} run twice, "
            f"{len(self.failures)} failures"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return {
            "world": self.world,
            "seeds": self.seeds,
            "run_twice": self.repeated,
            "hours": self.virtual_s / 3600,
            "wall_s": self.wall_s,
            "operations": self.operations,
            "decisions": self.decisions,
            "faults": dict(sorted(self.faults.items())),
            "failures": self.failures,
        }


def run_seed(task: Task) -> Report:
    """Simulate one seed in this process."""
    if task.canary:
        _break_a_rule()
    return simulate(draw(task.seed, hours=task.hours, given=task.given), task.world, verbose=task.verbose)


def _run_in_worker(task: Task) -> Report:
    faulthandler.dump_traceback_later(SEED_WALL_S_MAX, exit=True)
    try:
        return run_seed(task)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _break_a_rule() -> None:
    """Let targets serve as soon as they are back: a simulation that does not notice is worth nothing."""

    def syncing(step: chains._Step) -> None:
        for target in step.old(chains.SYNCING):
            step.new[target] = chains.SERVING if step.alive(target) else chains.OFFLINE

    chains._Step.syncing = syncing  # type: ignore[method-assign, assignment]


def first_seed() -> int:
    """Choose where to begin: by the commit, so that each has seeds of its own and the same ones each time."""
    try:
        root = Path(__file__).resolve().parent
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        return int(found.stdout[: SEED_BITS // 4], 16)
    except (OSError, subprocess.CalledProcessError, ValueError):
        return int.from_bytes(os.urandom(SEED_BITS // 8))


class Campaign:
    """Many seeds on several processes, until enough hours, enough seeds, no time left, or (unless told) a failure."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.summary = Summary(args.world)
        self._args = args
        self._began_s = time.monotonic()
        self._said_s = self._began_s
        self._hashes: dict[int, str] = {}

    def _tasks(self) -> Iterator[Task]:
        args = self._args
        first = first_seed() if args.first is None else args.first
        for number in range(args.seeds or sys.maxsize):
            seed = (first + number) % (1 << SEED_BITS)
            yield Task(seed, args.world, None, args.canary, given=args.given)
            if number % TWICE_EVERY == 0:
                yield Task(seed, args.world, None, args.canary, given=args.given)

    def _enough(self) -> bool:
        args, summary = self._args, self.summary
        return bool(
            (summary.failures and not args.keep_going)
            or (args.hours and summary.virtual_s >= args.hours * 3600)
            or (args.seconds and time.monotonic() - self._began_s >= args.seconds)
        )

    def run(self) -> Summary:
        """Run; unless told otherwise nothing new is begun after a failure."""
        tasks = self._tasks()
        running: dict[concurrent.futures.Future[Report], Task] = {}
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            self._args.jobs, mp_context=context, max_tasks_per_child=64
        ) as pool:
            while True:
                while len(running) < self._args.jobs and not self._enough():
                    task = next(tasks, None)
                    if task is None:
                        break
                    running[pool.submit(_run_in_worker, task)] = task
                if not running:
                    break
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    self._take(running.pop(future), future)
                self._progress()
        self.summary.wall_s = time.monotonic() - self._began_s
        return self.summary

    def _take(self, task: Task, future: concurrent.futures.Future[Report]) -> None:
        try:
            report = future.result()
        except Exception as exc:  # What a worker raises is a failure of its seed, of whatever kind.
            report = Report(task.seed, task.world, {}, violated="the simulator itself", violation=repr(exc))
        before = self._hashes.pop(task.seed, None)
        if before is None:
            self.summary.add(report)
            self._hashes[task.seed] = report.trace_hash
        else:
            self.summary.repeated += 1
            if report.passed and before != report.trace_hash:
                report.violated = "same seed, same trace"
                report.violation = f"trace {before} the first time, {report.trace_hash} the second"
        if not report.passed:
            self.summary.failures.append({**report.to_json(), "command": task.command()})

    def _progress(self) -> None:
        now_s = time.monotonic()
        if now_s - self._said_s >= PROGRESS_S:
            self._said_s = now_s
            self.summary.wall_s = now_s - self._began_s
            print(f"sim: {self.summary.line()}", file=sys.stderr, flush=True)


def describe(failure: dict[str, Any]) -> str:
    """Write a failure for a person: the last events, what is wrong, how to see it again."""
    return "\n".join(
        [
            *failure["trace"][-TRACE_LINES:],
            f"seed {failure['seed']} violates: {failure['violated']}",
            f"  {failure['violation']}",
            f"  at {failure['at_s']:.3f} s of virtual time",
            f"replay: {failure['command']}",
        ]
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fs3.testing.simulator", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this seed alone")
    parser.add_argument("--first", type=int, help="begin with this seed (default: by the commit)")
    parser.add_argument("--seeds", type=int, default=0, help="run so many seeds")
    parser.add_argument("--hours", type=float, help="simulated hours: of the one seed, or of all seeds together")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so many seconds of real time")
    parser.add_argument("--world", choices=WORLDS, default=WORLDS[0], help="native storage and clients, or the model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--keep-going", action="store_true", help="go on after a failure")
    parser.add_argument("--verbose", action="store_true", help="with --seed: print every event")
    parser.add_argument("--given", default="", help="fields of the plan that the seed does not decide, as JSON")
    parser.add_argument("--canary", action="store_true", help="break a rule on purpose; this must fail")
    args = parser.parse_args(argv)
    if args.seed is None and not (args.seeds or args.hours or args.seconds):
        args.hours = 10.0
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; 0 when every property held."""
    args = _arguments(argv)
    if args.seed is not None:
        return _one(args)
    summary = Campaign(args).run()
    if args.json:
        print(json.dumps(summary.to_json()))
    else:
        for failure in summary.failures:
            print(describe(failure))
        print(summary.line())
    return 1 if summary.failures else 0


def _one(args: argparse.Namespace) -> int:
    task = Task(args.seed, args.world, args.hours, args.canary, args.verbose, args.given)
    report = run_seed(task)
    if args.json:
        print(json.dumps({**report.to_json(), "command": task.command()}))
    else:
        if args.verbose and report.passed:
            print("\n".join(report.trace))
        if not report.passed:
            failure = {**report.to_json(), "command": task.command()}
            print("\n".join(report.trace) if args.verbose else "", describe(failure), sep="\n")
        summary = Summary(args.world, wall_s=report.wall_s)
        summary.add(report)
        print(f"seed {report.seed}: {'ok' if report.passed else 'FAILED'}, trace {report.trace_hash}; {summary.line()}")
    return 0 if report.passed else 1
