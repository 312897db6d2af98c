"""Runs the same operations on two directories, compares after each, and makes a failing script short."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.posix.operations import WORK, Drawer, Operation, describe, same

ROOT: Final = Path(__file__).resolve().parents[2]
# uid, gid, supplementary groups
USERS: Final = {"root": (0, 0), "user": (12345, 12345, 23456)}
SHRINK_RUNS_MAX: Final = 300
TICK_POLL_S: Final = 0.0005
# Of Linux; Python has no name for it.
CLOCK_REALTIME_COARSE: Final = 5

# What a snapshot shows, by path.
Tree = dict[str, list[Any]]


@dataclass(frozen=True)
class Divergence:
    """Where the two differ: after `script`, whose last operation did it."""

    script: list[Operation]
    difference: str

    def __str__(self) -> str:
        lines = [f"  {json.dumps(operation)},  # {describe(operation)}" for operation in self.script]
        return "\n".join(["the file systems differ after the last of", *lines, self.difference])


class Side:
    """One file system: a process per user, all in the same directory."""

    def __init__(self, name: str, base: Path, workers: dict[str, subprocess.Popen[str]]) -> None:
        self.name = name
        self._base = base
        self._workers = workers
        self._runs = 0

    @classmethod
    @contextmanager
    def open(cls, name: str, base: Path) -> Iterator[Side]:
        """Start the processes; they end with the block."""
        with ExitStack() as stack:
            workers = {}
            for user, ids in USERS.items():
                command = [sys.executable, "-m", "tests.posix.worker", *map(str, ids)]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                pipe = subprocess.PIPE
                worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)
                workers[user] = worker
                stack.callback(_end, worker)
            yield cls(name, base, workers)

    def _ask(self, user: str, order: list[Any]) -> Any:
        worker = self._workers[user]
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(order) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {user} on {self.name} ended over {order}")
        return json.loads(line)

    def begin(self) -> None:
        """Go to a new, empty directory that everybody may write, in another one."""
        self._runs += 1
        directory = self._base / f"run-{self._runs}"
        for path in (directory, directory / WORK):
            path.mkdir()
            path.chmod(0o777)
        self._chdir(directory / WORK)

    def _chdir(self, directory: Path) -> None:
        for user in self._workers:
            self._ask(user, ["chdir", str(directory)])

    def perform(self, operation: Operation) -> list[Any]:
        """Do it as its user."""
        outcome: list[Any] = self._ask(operation[0], operation)
        return outcome

    def snapshot(self) -> Tree:
        """Everything there is."""
        found: Tree = self._ask("root", ["snapshot"])
        return found


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()


Next = Callable[[Tree], Operation | None]


def run(sides: tuple[Side, Side], following: Next) -> Divergence | None:
    """Do what `following` says, given what there is, until it says None; returns the first difference."""
    for side in sides:
        side.begin()
    script: list[Operation] = []
    trees = [side.snapshot() for side in sides]
    while (operation := following(trees[0])) is not None:
        script.append(operation)
        _wait_for_tick()
        outcomes = [side.perform(operation) for side in sides]
        before, trees = trees, [side.snapshot() for side in sides]
        if not same(outcomes[0], outcomes[1]):
            return Divergence(script, _told(sides, outcomes))
        shown = [_visible(then, now) for then, now in zip(before, trees, strict=True)]
        if shown[0] != shown[1]:
            return Divergence(script, _tree_difference(sides, shown))
    return None


def _wait_for_tick() -> None:
    """Wait until the clock that local file systems take their times from has moved."""
    since_s = time.clock_gettime(CLOCK_REALTIME_COARSE)
    while time.clock_gettime(CLOCK_REALTIME_COARSE) == since_s:
        time.sleep(TICK_POLL_S)


def _visible(before: Tree, after: Tree) -> Tree:
    """What has to be equal: of times it is whether they moved, since clocks differ."""
    shown: Tree = {}
    for path, (*attributes, times) in after.items():
        then = before[path][-1] if path in before else None
        moved = (
            "" if then is None else [name for name, a, b in zip(("mtime", "ctime"), then, times, strict=True) if a != b]
        )
        shown[path] = [*attributes, moved]
    return shown


def _told(sides: tuple[Side, Side], outcomes: list[list[Any]]) -> str:
    shown = [f"{os.strerror(code) if code else 'success'} {'' if value is None else value}" for code, value in outcomes]
    return "\n".join(f"{side.name}: {text}" for side, text in zip(sides, shown, strict=True))


def _tree_difference(sides: tuple[Side, Side], trees: list[Tree]) -> str:
    paths = [path for path in sorted(trees[0].keys() | trees[1].keys()) if trees[0].get(path) != trees[1].get(path)]
    pairs = list(zip(sides, trees, strict=True))
    return "\n".join(f"{side.name}: {path} {tree.get(path)}" for path in paths[:5] for side, tree in pairs)


def drawn(seed: int, count: int) -> Next:
    """`count` operations of a seed."""
    rng = random.Random(seed)
    drawer = Drawer(rng)
    left = count

    def following(tree: Tree) -> Operation | None:
        nonlocal left
        left -= 1
        drawer.learn(tree)
        return drawer.operation() if left >= 0 else None

    return following


def scripted(script: list[Operation]) -> Next:
    """The operations of a list."""
    left = iter(script)
    return lambda _: next(left, None)


def shrunk(sides: tuple[Side, Side], found: Divergence) -> Divergence:
    """A shorter script that makes a difference, too: parts are left out, first large ones, then single operations."""
    runs = 0
    size = max(1, len(found.script) // 2)
    while True:
        at = 0
        shorter = False
        while at < len(found.script) and runs < SHRINK_RUNS_MAX:
            script = found.script[:at] + found.script[at + size :]
            runs += 1
            attempt = run(sides, scripted(script))
            if attempt is None:
                at += size
            else:
                found, shorter = attempt, True
        if runs >= SHRINK_RUNS_MAX or (size == 1 and not shorter):
            return found
        size = max(1, size // 2)
