"""Mutation suite: every seeded bug of tests/mutants/*.toml must be caught, by simulation or by the tests it names.

The bugs are mutant schemata (Untch, Offutt and Harrold, 1993): in a scratch copy of the sources each replacement holds
the original and the bug behind a run-time switch, `mutant!("name")`, so that one build holds all Rust mutants and the
product holds none. Python mutants are substituted in the source as the child process imports it.

    tools/mutants.py                    all mutants, and the unmutated code under the same budget
    tools/mutants.py early_ack no_dedupe    only these
    tools/mutants.py --list             what there is
    tools/mutants.py --check            only whether every mutant still fits the sources

Exit status 1 when a mutant survives, the unmutated code fails, or a text to find is not in its file exactly once.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANIFESTS = ROOT / "tests" / "mutants"
SWITCH = "FS3_MUTANT"
PROFILE = "mutants"
CHILD = ROOT / "tools" / "mutant_child.py"
CLEAN = "(none)"
# CPU seconds that a mutant may live, and that the unmutated code runs with every oracle.
BUDGET_S = 40.0
# How many budgets a mutant has to outlive: a slow machine tries fewer seeds in one.
SURVIVAL = 4
# A seed that takes more CPU seconds does not end any more; the second limit is of real time, for one that waits.
SEED_CPU_S_MAX = 30
SEED_S_MAX = 900.0
# Characters told of a violation.
TEXT_MAX = 150
# Appended to a manifest-free crate that all others use.
SWITCH_RUST = f"""
/// Whether the seeded bug `name` is switched on in this process.
pub fn mutant(name: &str) -> bool {{
    static ON: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    ON.get_or_init(|| std::env::var("{SWITCH}").ok()).as_deref() == Some(name)
}}
"""
PROFILE_TOML = f"""
[profile.{PROFILE}]
inherits = "dev"
opt-level = 1
debug = false
"""


@dataclass(frozen=True)
class Edit:
    """One replacement in one file."""

    file: str
    find: str
    replace: str

    @property
    def is_python(self) -> bool:
        """Tell whether it is substituted at import."""
        return self.file.endswith(".py")


@dataclass(frozen=True)
class Mutant:
    """One seeded bug."""

    name: str
    property: str
    why: str
    oracle: str
    edits: tuple[Edit, ...]
    options: str = ""
    """What the world is like, or the cluster, JSON; drawn from the seed where it does not say."""
    seed: int = 1
    """The first seed to try: one that is known to show the bug, so that a run is quick. Those after it follow."""

    @property
    def rust(self) -> list[Edit]:
        """The edits behind the switch."""
        return [edit for edit in self.edits if not edit.is_python]

    @property
    def python(self) -> list[Edit]:
        """The edits that are substituted at import."""
        return [edit for edit in self.edits if edit.is_python]


@dataclass
class Outcome:
    """What became of a mutant."""

    mutant: str
    property: str
    oracle: str
    caught: bool
    seeds: int
    seconds: float
    text: str


def load(folder: Path = MANIFESTS) -> list[Mutant]:
    """Read the manifests. Raises ValueError for one that makes no sense."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text())["mutant"]:
            edits = entry.get("edit") or [{key: entry[key] for key in ("file", "find", "replace")}]
            mutant = Mutant(
                name=entry["name"],
                property=entry["property"],
                why=entry["why"],
                oracle=entry.get("oracle", "world"),
                edits=tuple(Edit(**edit) for edit in edits),
                options=entry.get("options", ""),
                seed=entry.get("seed", 1),
            )
            switch = f'mutant!("{mutant.name}")'
            if not all(switch in edit.replace for edit in mutant.rust):
                raise ValueError(f"{path.name}: mutant {mutant.name} does not use {switch}")
            mutants.append(mutant)
    names = [m.name for m in mutants]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise ValueError(f"two mutants have one name: {', '.join(sorted(twice))}")
    return mutants


def misfits(mutants: Iterable[Mutant], root: Path = ROOT) -> list[str]:
    """Say which texts to find are not in their files exactly once."""
    found = []
    for mutant in mutants:
        for edit in mutant.edits:
            path = root / edit.file
            count = path.read_text().count(edit.find) if path.exists() else 0
            if count != 1:
                found.append(f"{mutant.name}: the text to find is {count} times in {edit.file}, not once")
    return found


def mutated(source: str, edits: Iterable[Edit]) -> str:
    """Apply all edits of one file; their texts are looked for in the original."""
    spans = sorted((source.index(edit.find), edit) for edit in edits)
    out, at = [], 0
    for start, edit in spans:
        if start < at:
            raise ValueError(f"two mutants change the same text of {edit.file}: {edit.find!r}")
        out += [source[at:start], edit.replace]
        at = start + len(edit.find)
    return "".join([*out, source[at:]])


def cache_folder() -> Path:
    """Say where the scratch copy and its build are kept between runs, outside the checkout."""
    if chosen := os.environ.get("FS3_MUTANTS_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fs3" / "mutants"


class Scratch:
    """A copy of the Rust sources that holds every mutant, and its build."""

    def __init__(self, folder: Path, mutants: list[Mutant]) -> None:
        self.folder = folder
        self.mutants = mutants
        self.binaries: dict[str, Path] = {}

    def write(self) -> None:
        """Bring the copy up to date; files that did not change keep their times, so that builds are incremental."""
        edits: dict[str, list[Edit]] = {}
        for mutant in self.mutants:
            for edit in mutant.rust:
                edits.setdefault(edit.file, []).append(edit)
        wanted = {p.relative_to(ROOT) for top in ("native", "proto") for p in sources(ROOT / top)}
        for path in wanted:
            content = (ROOT / path).read_bytes()
            if str(path) in edits:
                text = mutated(content.decode(), edits[str(path)])
                crate = "crate" if "fs3-core" in path.parts else "fs3_core"
                content = re.sub(r"\bmutant!\(", f"{crate}::mutant(", text).encode()
            if str(path) == "native/crates/fs3-core/src/lib.rs":
                content += SWITCH_RUST.encode()
            if str(path) == "native/Cargo.toml":
                content += PROFILE_TOML.encode()
            target = self.folder / path
            if not target.exists() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        for top in ("native", "proto"):
            for path in list(sources(self.folder / top)):
                if path.relative_to(self.folder) not in wanted:
                    path.unlink()

    def build(self, oracles: Iterable[Oracle]) -> None:
        """Build what the oracles run, once for all mutants. Raises SystemExit when it does not compile."""
        for oracle in oracles:
            if not oracle.cargo:
                continue
            command = [
                "cargo",
                *oracle.cargo,
                "--locked",
                "--profile",
                PROFILE,
                "-q",
                "--message-format=json-render-diagnostics",
            ]
            env = {**os.environ, "CARGO_TARGET_DIR": str(self.folder / "target")}
            done = subprocess.run(command, cwd=self.folder / "native", env=env, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise SystemExit("the mutated sources do not compile; see above")
            for line in done.stdout.splitlines():
                message = json.loads(line)
                if message.get("reason") == "compiler-artifact" and message.get("executable"):
                    self.binaries[message["target"]["name"]] = Path(message["executable"])


def sources(folder: Path) -> Iterable[Path]:
    """List the files that a build needs."""
    for path in folder.rglob("*"):
        if path.is_file() and "target" not in path.relative_to(folder).parts:
            yield path


@dataclass(frozen=True)
class Oracle:
    """A simulation, or tests, that may catch a mutant; one process per seed."""

    name: str
    cargo: tuple[str, ...]
    binary: str
    arguments: tuple[str, ...]
    # "{seed}" and "{next}" stand for the seed and the one after it.
    environment: dict[str, str]
    # Seeds that the unmutated code has to pass, and after which a mutant has survived.
    seeds: int
    # The mutant's options, JSON, go into this variable of the environment, or behind this flag; where it is "*" they
    # are further arguments.
    options: str = ""
    # The Python module to run where there is no binary.
    module: str = ""

    def command(self, scratch: Scratch, seed: int, options: str) -> list[str]:
        """Make the command line of one seed."""
        arguments = [a.format(seed=seed) for a in self.arguments]
        if options and self.options == "*":
            arguments += options.split()
        elif options and self.options.startswith("--"):
            arguments += [self.options, options]
        if self.module:
            return [sys.executable, str(CHILD), self.module, *arguments]
        return [str(scratch.binaries[self.binary]), *arguments]

    def variables(self, seed: int, options: str) -> dict[str, str]:
        """Make the environment of one seed."""
        variables = {k: v.format(seed=seed, next=seed + 1) for k, v in self.environment.items()}
        if options and not self.options.startswith(("--", "*")):
            variables[self.options] = options
        return variables


ORACLES = {
    oracle.name: oracle
    for oracle in (
        Oracle(
            name="chain",
            cargo=("test", "--no-run", "-p", "fs3-chain", "--test", "simulation"),
            binary="simulation",
            arguments=("--test-threads=1",),
            environment={"FS3_CHAIN_SEED": "{seed}"},
            seeds=150,
        ),
        Oracle(
            name="store",
            cargo=("test", "--no-run", "-p", "fs3-io", "--test", "model"),
            binary="model",
            arguments=("--test-threads=1", "power_loss"),
            environment={"FS3_CRASH_SEEDS": "{seed}..{next}"},
            seeds=40,
        ),
        Oracle(
            name="kills",
            cargo=("test", "--no-run", "-p", "fs3-io", "--test", "kills"),
            binary="kills",
            arguments=("--test-threads=1", "killed_at_any_moment"),
            environment={"FS3_KILL_SEEDS": "{seed}..{next}"},
            seeds=40,
        ),
        Oracle(
            name="faults",
            cargo=("test", "--no-run", "-p", "fs3-io", "--test", "faults"),
            binary="faults",
            arguments=("--test-threads=1", "failed_sync"),
            environment={},
            seeds=1,
        ),
        Oracle(
            name="resync",
            cargo=("test", "--no-run", "-p", "fs3-storage", "--test", "resync"),
            binary="resync",
            arguments=("--test-threads=1", "a_repeated_write"),
            environment={},
            seeds=1,
        ),
        Oracle(
            name="world",
            cargo=("test", "--no-run", "-p", "fs3-sim", "--test", "world"),
            binary="world",
            arguments=("--test-threads=1", "under_faults"),
            environment={"FS3_SIM_SEED": "{seed}"},
            seeds=60,
            options="FS3_SIM_OPTIONS",
        ),
        Oracle(
            name="cluster",
            cargo=(),
            binary="",
            arguments=("--world", "model", "--jobs", "1", "--seed", "{seed}", "--hours", "0.2"),
            environment={},
            seeds=60,
            options="--given",
            module="fs3.testing.simulator",
        ),
        Oracle(
            name="metadata",
            cargo=(),
            binary="",
            arguments=("-q", "-x", "-p", "no:cacheprovider"),
            environment={},
            seeds=1,
            options="*",
            module="pytest",
        ),
    )
}


def run_seed(mutant: Mutant | None, oracle: Oracle, scratch: Scratch, seed: int, options: str) -> tuple[str, float]:
    """Run one seed. Returns what was violated, empty when nothing was, and the CPU seconds it took."""
    env = {**os.environ, **oracle.variables(seed, options), "RUST_BACKTRACE": "0", "PYTHONPATH": str(ROOT)}
    env.pop(SWITCH, None)
    if mutant:
        env[SWITCH] = mutant.name
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        limit = ["/bin/sh", "-c", f'ulimit -t {SEED_CPU_S_MAX}; exec "$@"', "sh"]
        command = [*limit, *oracle.command(scratch, seed, options)]
        child = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        watchdog = threading.Timer(SEED_S_MAX, child.kill)
        watchdog.start()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        watchdog.cancel()
        output.seek(0)
        found = "" if child.returncode == 0 else explanation(output.read())
    if child.returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        found = f"no end within {SEED_CPU_S_MAX} s of CPU time"
    return found, usage.ru_utime + usage.ru_stime


def attempt(mutant: Mutant | None, oracle: Oracle, scratch: Scratch, budget_s: float) -> Outcome:
    """Run seeds until one fails, the budget of CPU time is spent or there are no more.

    A seed that fails with a mutant has to pass without it; else nothing is caught.
    """
    spent_s, tried, found = 0.0, 0, ""
    options, seed = (mutant.options, mutant.seed) if mutant else ("", 1)
    while not found and spent_s < budget_s and tried < oracle.seeds:
        found, cpu_s = run_seed(mutant, oracle, scratch, seed + tried, options)
        spent_s += cpu_s
        tried += 1
    if found and mutant and (alarm := run_seed(None, oracle, scratch, mutant.seed + tried - 1, options)[0]):
        return Outcome(CLEAN, f"no false alarm where {mutant.name} is", oracle.name, True, tried, spent_s, alarm)
    return Outcome(
        mutant=mutant.name if mutant else CLEAN,
        property=mutant.property if mutant else "no false alarm",
        oracle=oracle.name,
        caught=bool(found),
        seeds=tried,
        seconds=spent_s,
        text=found,
    )


def explanation(output: str) -> str:
    """Pick the line that says what was violated."""
    lines = [line.strip() for line in output.splitlines()]
    for at, line in enumerate(lines):
        if line.startswith("FS3_SIM_SEED="):
            return line.partition(": ")[2][:TEXT_MAX] or line[:TEXT_MAX]
        if " violates: " in line and at + 1 < len(lines):
            return f"{line.partition(' violates: ')[2]}: {lines[at + 1]}"[:TEXT_MAX]
        if "panicked at" in line and "Option::unwrap" not in line and at + 1 < len(lines):
            return lines[at + 1][:TEXT_MAX]
    if failed := [line for line in lines if line.startswith("FAILED ")]:
        return failed[0].partition("::")[2][:TEXT_MAX]
    told = [line for line in lines if line]
    return told[-1][:TEXT_MAX] if told else "ended without a word"


def report(outcome: Outcome) -> None:
    """Print a line of the table."""
    o = outcome
    states = ("quiet", "FALSE ALARM") if o.mutant == CLEAN else ("SURVIVED", "caught")
    state = states[o.caught]
    print(
        f"{o.mutant:30} {state:11} {o.oracle:8} {o.seeds:4} seeds {o.seconds:6.1f} s  {o.property:34} {o.text}",
        flush=True,
    )


def run(chosen: list[Mutant], scratch: Scratch, budget_s: float, jobs: int, *, clean: bool) -> list[Outcome]:
    """Try all mutants, and the unmutated code with every oracle, several at a time."""
    # Where the mutants say what to run, it is run without each of them anyway.
    names = sorted({m.oracle for m in chosen if ORACLES[m.oracle].options != "*"})
    tasks = [(None, name, budget_s) for name in names] if clean else []
    tasks += [(m, m.oracle, SURVIVAL * budget_s) for m in chosen]  # type: ignore[misc]
    outcomes = []
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(attempt, m, ORACLES[name], scratch, budget) for m, name, budget in tasks]
        for future in as_completed(futures):
            outcomes.append(future.result())
            report(outcomes[-1])
    return outcomes


def main() -> int:
    """Run the suite; returns the exit status."""
    parser = argparse.ArgumentParser(description="Seeded bugs that the simulation must catch.")
    parser.add_argument("names", nargs="*", help="mutants to try; all when none is named")
    parser.add_argument("--list", action="store_true", help="print the mutants")
    parser.add_argument("--check", action="store_true", help="only check that every mutant fits the sources")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds per mutant (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--no-clean", action="store_true", help="do not run the unmutated code")
    parser.add_argument("--oracle", choices=sorted(ORACLES), help="try this one instead of each mutant's own")
    args = parser.parse_args()
    mutants = load()
    if wrong := misfits(mutants):
        print("\n".join(wrong))
        return 1
    if args.list or args.check:
        for mutant in mutants if args.list else ():
            print(f"{mutant.name:32} {mutant.property:44} {mutant.why}")
        return 0
    unknown = set(args.names) - {m.name for m in mutants}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [m for m in mutants if not args.names or m.name in args.names]
    if args.oracle:
        chosen = [replace(m, oracle=args.oracle) for m in chosen if m.rust or args.oracle == "cluster"]
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch = Scratch(folder, mutants)
        scratch.write()
        scratch.build(ORACLES[name] for name in sorted({m.oracle for m in chosen}))
        outcomes = run(chosen, scratch, args.budget, args.jobs, clean=not args.no_clean)
    wrong = [o for o in outcomes if o.caught != (o.mutant != CLEAN)]
    caught = sum(o.caught for o in outcomes if o.mutant != CLEAN)
    print(f"{caught} of {len(chosen)} mutants caught, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
