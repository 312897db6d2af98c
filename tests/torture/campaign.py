"""A campaign: cycles of overlapping faults under load, then everything is healed and compared."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import fs3
from fs3.client import FileSystem
from fs3.core.errors import Fs3Error
from fs3.testing.cluster import ClusterSpec
from fs3.testing.process import ProcessRef, spawn, wait_until
from fs3.testing.replicas import compare_settled_replicas
from tests.torture import faults, manifest, names
from tests.torture.board import Board
from tests.torture.cluster import CLIENT, TortureCluster
from tests.torture.content import CHUNK_BYTES, WrongBytes, slots_of, versions
from tests.torture.worker import Job, open_entries, path_of

ROOT = Path(__file__).resolve().parents[2]

# Short leases, so that a campaign meets many of them; a small read cache, so that disks are read; removed
# files go soon.
SPEC = ClusterSpec(
    lease_ms=3000,
    heartbeat_ms=300,
    targets_per_disk=2,
    chunk_bytes=CHUNK_BYTES,
    read_cache_bytes=4 << 20,
    gc_delay_ms=1000,
)
# Of the seeds, those that this divides have a cluster in which every acknowledged write is synced.
DURABLE_EVERY = 3
# And those whose members are all on one host, where they share memory and are not parted.
ONE_HOST_EVERY = 2
VERIFY_EVERY = 10
OVERLAP_MAX = 3
STAGGER_S = 1.0
POWER_CUT_SHARE = 0.3
DAMAGE_SHARE = 0.2
# Once everything is healed, every chain serves and every worker goes on within these bounds.
SERVING_S = 90.0
PROGRESS_S = 90.0
REST_S = 150.0


@dataclass(frozen=True)
class Team:
    """The client processes: how many of each kind."""

    writers: int = 2
    files_per_writer: int = 2
    mount_writers: int = 1
    readers: int = 2
    mount_readers: int = 1
    names: int = 1

    @property
    def files(self) -> int:
        """Slotted files in all."""
        return self.writers * self.files_per_writer + self.mount_writers

    @property
    def entries(self) -> dict[str, int]:
        """Numbers behind those of the files: of entries of the key-value cache, by their kind."""
        return {"durable-entries": self.files, "memory-entries": self.files + 1}


class Violation(AssertionError):
    """Something that must never happen has happened."""


@dataclass
class Report:
    """What a campaign did and found."""

    seed: int
    durable_writes: bool = False
    one_host: bool = False
    cycles: int = 0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    # Cycles with at least one kill -9, those of a power cut included.
    kill_cycles: int = 0
    processes_killed: int = 0
    power_cuts: int = 0
    images: int = 0
    unsynced_kept: int = 0
    unsynced_lost: int = 0
    unsynced_torn: int = 0
    names_lost: int = 0
    comparisons: int = 0
    chunks_compared: int = 0
    # Of what was read to compare it.
    shared_memory_bytes: int = 0
    acknowledged: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    late: int = 0
    disk_faults: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """For JSON."""
        return {**vars(self), "seconds": round(self.seconds, 1)}

    def table(self) -> str:
        """For people."""
        rows = [
            ("seed", self.seed),
            ("members", "on one host" if self.one_host else "in network namespaces"),
            ("acknowledged writes survive a power cut", "all" if self.durable_writes else "those that were synced"),
            ("cycles, seconds", f"{self.cycles}, {self.seconds:.0f}"),
            *((f"fault: {kind}", count) for kind, count in sorted(self.faults.items())),
            ("cycles with kill -9, processes killed", f"{self.kill_cycles}, {self.processes_killed}"),
            ("power cuts, images of disks", f"{self.power_cuts}, {self.images}"),
            (
                "unsynced changes kept, lost, torn; names lost",
                f"{self.unsynced_kept}, {self.unsynced_lost}, {self.unsynced_torn}; {self.names_lost}",
            ),
            *((f"disk: {kind}", count) for kind, count in sorted(self.disk_faults.items()) if count),
            *((f"acknowledged: {kind}", count) for kind, count in sorted(self.acknowledged.items())),
            ("refused to clients", self.refused),
            ("failed writes that took effect late", self.late),
            ("comparisons of everything, chunks", f"{self.comparisons}, {self.chunks_compared}"),
            ("bytes compared that came through shared memory", self.shared_memory_bytes),
            ("lost or wrong", "; ".join(self.lost) or 0),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


class Campaign:
    """One cluster under faults. Use as a context manager: whatever happens, everything it made is ended."""

    def __init__(
        self, directory: Path, seed: int, team: Team | None = None, say: Callable[[str], None] = print
    ) -> None:
        self.rng = random.Random(seed)
        self.report = Report(seed)
        self.say = say
        self.team = team or Team()
        self.notes = directory / "notes"
        self.notes.mkdir(parents=True)
        self.board = Board(self.notes / "board", self.team.files + len(self.team.entries))
        self.board.pause = True
        self.report.durable_writes = seed % DURABLE_EVERY == 0
        spec = replace(SPEC, durable_writes=self.report.durable_writes)
        self.report.one_host = seed % ONE_HOST_EVERY == 0
        self._ordinary = faults.ON_ONE_HOST if self.report.one_host else faults.ORDINARY
        self.cluster = TortureCluster.build(directory / "cluster", spec, seed, one_host=self.report.one_host)
        self.processes: dict[int, ProcessRef] = {}
        self._disturbed: set[str] = set()
        # Versions of entries that may be gone because disks were full.
        self._evictable: dict[int, int] = {}
        self._bags: dict[int, list[faults.Maker]] = {}
        self._began = time.monotonic()
        self.jobs = self._jobs(seed)

    @property
    def mount_files(self) -> list[int]:
        """The slotted files that are written through the mount."""
        return list(range(self.team.writers * self.team.files_per_writer, self.team.files))

    def _jobs(self, seed: int) -> list[Job]:
        team, jobs, number, file = self.team, [], 0, 0
        kinds = ["writer"] * team.writers + ["mount-writer"] * team.mount_writers
        kinds += ["reader"] * team.readers + ["mount-reader"] * team.mount_readers + ["names"] * team.names
        kinds += team.entries
        for kind in kinds:
            own = team.files_per_writer if kind == "writer" else 1 if kind == "mount-writer" else 0
            files, threads = list(range(file, file + own)), max(own, 1)
            if kind in team.entries:
                files, threads = [team.entries[kind]], 2
            jobs.append(
                Job(
                    kind=kind,
                    numbers=list(range(number, number + threads)),
                    files=team.files + len(team.entries),
                    slotted=team.files,
                    own_files=files,
                    mount_files=self.mount_files,
                    seed=seed,
                    url=self.cluster.url,
                    token=self.cluster.token,
                    directory=str(self.notes),
                    mountpoint=str(self.cluster.mountpoint),
                )
            )
            number += threads
            file += own
        return jobs

    def __enter__(self) -> Campaign:
        try:
            self.cluster.mount()
            for index in range(len(self.jobs)):
                self._start_worker(index)
            self._wait_rest()
            self._resume()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything."""
        self.board.stop = True
        for process in self.processes.values():
            process.kill()
        self._count_disk_faults()
        self.cluster.destroy()
        self.report.seconds = time.monotonic() - self._began
        self.board.close()

    # ---- workers

    def _start_worker(self, index: int) -> None:
        job = self.jobs[index]
        for number in job.numbers:
            self.board.rest(number, False)
        python = [*self.cluster.network.inside(CLIENT), sys.executable, "-m", "tests.torture.process", job.to_json()]
        self.processes[index] = spawn(python, log=self.notes / f"{job.kind}-{index}.log", env={"PYTHONPATH": str(ROOT)})

    def kill_worker(self) -> None:
        """kill -9 of a client process; it starts again."""
        index = self.rng.randrange(len(self.jobs))
        self.processes[index].kill()
        self.report.processes_killed += 1
        self._start_worker(index)

    def _numbers(self) -> list[int]:
        return [number for job in self.jobs for number in job.numbers]

    def _wait_rest(self) -> None:
        self.board.pause = True
        self._wait(lambda: all(map(self.board.rests, self._numbers())), REST_S, "the rest of all workers")

    def _resume(self) -> None:
        self.board.pause = False

    def _wait(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for what must happen; a worker that ended or found something ends it at once."""

        def checked() -> bool:
            self.check()
            return condition()

        try:
            wait_until(checked, timeout_s=timeout_s, what=what)
        except TimeoutError as e:
            raise Violation(f"liveness: {e}") from None

    def check(self) -> None:
        """Raise Violation when a worker found something, or ended."""
        found = manifest.lines(self.notes / "violations")
        if found:
            raise Violation("; ".join(f"{v['worker']}: {v['text']}" for v in found))
        for index, process in self.processes.items():
            if not process.alive():
                log = (self.notes / f"{self.jobs[index].kind}-{index}.log").read_text(errors="replace")
                raise Violation(f"the {self.jobs[index].kind} ended by itself: {log[-2000:]}")

    # ---- epochs

    def disturbed(self, storage: list[str]) -> None:
        """These storage services are about to be disturbed."""
        self._disturbed.update(storage)
        if storage and self.board.chains % 2 == 0:
            self.board.chains += 1

    def _calm(self) -> None:
        """After a disturbance; with one service disturbed, what one reader saw the next one must see."""
        if self.board.chains % 2 and len(self._disturbed) <= 1:
            self.board.chains += 1

    def power_cut(self) -> None:
        """Cut the power of all services and disks, and switch it on again; the services are not started."""
        # With durable writes nothing that was acknowledged goes with the power: for the workers there is no cut.
        self.board.power += not self.report.durable_writes
        running = len(self.cluster.pids())
        losses = self.cluster.power_cut(self.rng.randrange(1 << 30))
        self.board.power += not self.report.durable_writes
        self.report.processes_killed += running
        self.report.power_cuts += 1
        self.report.images += len(losses)
        for loss in losses.values():
            self.report.unsynced_kept += loss.kept
            self.report.unsynced_lost += loss.lost
            self.report.unsynced_torn += loss.torn
            self.report.names_lost += loss.names_lost

    # ---- cycles

    def _draw(self, makers: list[faults.Maker]) -> faults.Maker:
        """The next of a shuffled bag, so that every kind has its turn."""
        bag = self._bags.setdefault(id(makers), [])
        if not bag:
            bag.extend(makers)
            self.rng.shuffle(bag)
        return bag.pop()

    def _plan(self) -> tuple[list[faults.Fault], bool]:
        """The faults of a cycle, and whether everything has to serve before and after it."""
        chance = self.rng.random()
        if chance < DAMAGE_SHARE:
            makers = [self._draw(faults.DAMAGE)]
            makers += self.rng.sample(faults.HARMLESS, self.rng.randrange(2))
            return [make(self) for make in makers], True
        makers = [self._draw(self._ordinary) for _ in range(self.rng.randrange(1, OVERLAP_MAX + 1))]
        if chance < DAMAGE_SHARE + POWER_CUT_SHARE:
            makers[-1] = faults.power_cut
        return [make(self) for make in makers], False

    def cycle(self) -> None:
        """One cycle of faults. Raises Violation."""
        plan, settled = self._plan()
        if settled:
            self.settle()
        self.say(
            f"cycle {self.report.cycles + 1}: " + ", ".join(f"{f.kind} {' '.join(f.storage)}".strip() for f in plan)
        )
        held: list[tuple[float, faults.Fault]] = []
        killed = self.report.processes_killed
        try:
            for fault in plan:
                self._begin(fault)
                held.append((time.monotonic() + fault.hold_s, fault))
                self._watch(self.rng.uniform(0, STAGGER_S))
            held.sort(key=lambda pair: pair[0], reverse=True)
            while held:
                self._watch(held[-1][0] - time.monotonic())
                held.pop()[1].heal()
        finally:
            for _, fault in held:
                fault.heal()
        self._recover()
        if any(fault.kind == "full disk" for fault in plan):
            self._evictable = {slot: record.issued for slot, record in self._entries("durable-entries").items()}
        self.report.cycles += 1
        self.report.kill_cycles += self.report.processes_killed > killed
        if settled or self.rng.random() < 0.5:
            self.settle()
        if self.report.cycles % VERIFY_EVERY == 0:
            self.verify()

    def _begin(self, fault: faults.Fault) -> None:
        self.disturbed(fault.storage)
        before = len(self.cluster.pids())
        fault.begin()
        self._calm()
        if fault.kind != "power cut":
            self.report.processes_killed += before - len(self.cluster.pids())
        self.report.faults[fault.kind] += 1

    def _watch(self, seconds: float) -> None:
        """Let time pass, looking for violations."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check()
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))

    def _recover(self) -> None:
        """Every process runs again."""
        self.cluster.ensure_running()
        if self.cluster.mount_daemon() is None:
            self.cluster.unmount()
            self.cluster.mount()

    # ---- checks

    def settle(self) -> None:
        """Every chain serves and every worker goes on. Raises Violation."""
        self.check()
        try:
            self.cluster.wait_serving(timeout_s=SERVING_S)
        except Fs3Error as e:
            raise Violation(f"liveness: {e.message}") from e
        before = {number: self.board.counted(number) for number in self._numbers()}
        self._wait(
            lambda: all(self.board.counted(number) > count for number, count in before.items()),
            PROGRESS_S,
            "progress of every worker",
        )
        self._disturbed.clear()
        self._calm()

    def verify(self) -> None:
        """Pause the workers and compare everything. Raises Violation."""
        self.settle()
        self._wait_rest()
        self.cluster.wait_serving(timeout_s=SERVING_S)
        with fs3.connect(self.cluster.url, token=self.cluster.token, timeout_s=60) as fs:
            shared = _by_shared_memory(fs)
            found = self._wrong_slots(fs)
            for kind in self.team.entries:
                found += self._wrong_entries(fs, kind)
            for job in self.jobs:
                if job.kind == "names":
                    for number in job.numbers:
                        known = names.replay(self.notes, number)
                        found += names.differences(fs, known, number, self.board.power)
            replicas = compare_settled_replicas(fs)
            self.report.shared_memory_bytes += _by_shared_memory(fs) - shared
        found += replicas.differences
        self.report.comparisons += 1
        self.report.chunks_compared += replicas.chunks
        if found:
            raise Violation(f"{len(found)} differences: " + "; ".join(found[:20]))
        self._resume()
        self.say(f"compared: {replicas.chunks} chunks on {replicas.replicas} replicas; {self._operations()} operations")

    def _wrong_slots(self, fs: FileSystem) -> list[str]:
        found = []
        for file in range(self.team.files):
            known = manifest.replay(self.notes / f"manifest-{file}")
            with fs.open(path_of(file), "rb", buffering=0) as handle:
                for slot in slots_of(file):
                    record = known[slot.number]
                    data = handle.pread(slot.length, slot.offset)
                    try:
                        seen = versions(slot, data, slot.pages if file in self.mount_files else slot.pieces)
                    except WrongBytes as e:
                        found.append(str(e))
                        continue
                    floor = record.floor(self.board.power)
                    bad = [v for v in seen if not (floor <= v <= record.issued or v in record.failed)]
                    if bad:
                        found.append(f"{path_of(file)} {slot}: versions {seen}, not {floor}..{record.issued}")
        return found

    def _entries(self, kind: str) -> dict[int, manifest.SlotRecord]:
        """What is known of entries."""
        return manifest.replay(self.notes / f"manifest-{self.team.entries[kind]}")

    def _wrong_entries(self, fs: FileSystem, kind: str) -> list[str]:
        found = []
        known = self._entries(kind)
        with open_entries(fs, kind) as cache:
            for slot in slots_of(self.team.entries[kind]):
                record = known[slot.number]
                floor = record.floor(self.board.power)
                data = cache.get(str(slot.offset))
                if data is None:
                    # A put that failed may have left a part of another value, which is a miss.
                    may_miss = max(self._evictable.get(slot.number, 0), *record.failed, 0)
                    if kind == "durable-entries" and floor > may_miss:
                        found.append(f"entry {slot}: nothing, not {floor}..{record.issued}")
                    continue
                try:
                    (seen,) = versions(slot, data, slot.whole)
                except WrongBytes as e:
                    found.append(f"entry {e}")
                    continue
                if not (floor <= seen <= record.issued or seen in record.failed):
                    found.append(f"entry {slot}: version {seen}, not {floor}..{record.issued}")
        return found

    def _operations(self) -> int:
        return sum(map(self.board.counted, self._numbers()))

    def finish(self) -> None:
        """The last comparison, and the sums."""
        self.verify()
        self.tally()

    def tally(self) -> None:
        """Sum up what the workers did."""
        for job in self.jobs:
            kind = {"names": "changes of names"}.get(job.kind, f"{job.kind} operations")
            self.report.acknowledged[kind] = sum(map(self.board.counted, job.numbers))
        self.report.refused = sum(len(p.read_text().splitlines()) for p in self.notes.glob("errors-*"))
        self.report.late = sum(int(p.read_text()) for p in self.notes.glob("late-*"))

    def _count_disk_faults(self) -> None:
        for disk in self.cluster.disks.values():
            try:
                self.report.disk_faults.update(disk.order({"do": "counts"}))
            except (OSError, ValueError, RuntimeError):
                continue


def _by_shared_memory(fs: FileSystem) -> int:
    """Bytes that this process has received so, also before this campaign."""
    return fs.stats().get("shared_memory_received_bytes", 0)


def run(
    directory: Path,
    *,
    seed: int,
    cycles: int,
    minutes: float,
    team: Team | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Run a campaign of at most `cycles` cycles and about `minutes` minutes. What was lost is in the report."""
    campaign = Campaign(directory, seed, team, say)
    end = time.monotonic() + 60 * minutes
    try:
        with campaign:
            try:
                while campaign.report.cycles < cycles and time.monotonic() < end:
                    campaign.cycle()
                campaign.finish()
            except Violation as e:
                campaign.report.lost.append(str(e))
                campaign.tally()
                say(f"VIOLATION: {e}")
    finally:
        (campaign.notes / "report.json").write_text(json.dumps(campaign.report.record(), indent=1))
    return campaign.report
