"""A short campaign: `make torture` is the long one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.torture.board import Board
from tests.torture.campaign import run
from tests.torture.content import WrongBytes, fill, slots_of, versions
from tests.torture.disks import missing_device
from tests.torture.network import missing_tools, sweep
from tests.torture.slots import EntryReader, Reader
from tests.torture.worker import Job

CYCLES = 18
MINUTES = 1.5
# In network namespaces, and on one host.
SEEDS = [int(seed) for seed in os.environ.get("FS3_TORTURE_SEEDS", "1 2").split()]


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_acknowledged_is_lost_under_overlapping_faults(tmp_path: Path, seed: int) -> None:
    if reason := missing_tools() or missing_device():
        pytest.skip(reason)
    sweep()
    report = run(tmp_path, seed=seed, cycles=CYCLES, minutes=MINUTES)
    print(report.table())
    for log in (tmp_path / "cluster").glob("*/log"):
        print(f"--- {log.parent.name}", *log.read_text(errors="replace").splitlines()[-30:], sep="\n")
    assert report.lost == [], f"repeat with: make torture SEED={seed}"
    assert report.power_cuts > 0
    assert report.unsynced_lost > 0
    assert min(report.acknowledged.values()) > 0
    assert (report.shared_memory_bytes > 0) == report.one_host
    shutil.rmtree(tmp_path)


class StaleClient:
    """A client of a cluster that has lost what came after `version`."""

    mounted = False

    def __init__(self, version: int) -> None:
        self.version = version

    def open(self, file: int, *, write: bool) -> StaleClient:
        return self

    def pread(self, length: int, offset: int) -> bytes:
        whole = b"".join(fill(slot, self.version) for slot in slots_of(0))
        return whole[offset : offset + length]

    def close(self) -> None:
        return None


@pytest.mark.parametrize(("kind", "reading"), [("reader", Reader), ("memory-entries", EntryReader)])
@pytest.mark.parametrize(
    ("acknowledged", "in_epoch", "synced", "caught"),
    [(7, 0, 0, True), (6, 0, 0, False), (7, 2, 0, False), (7, 2, 7, True)],
)
def test_a_lost_write_is_noticed_and_an_unsynced_one_may_go_with_the_power(
    tmp_path: Path, acknowledged: int, in_epoch: int, synced: int, caught: bool, kind: str, reading: type[Reader]
) -> None:
    job = Job(
        kind,
        [0],
        files=1,
        slotted=1,
        own_files=[0],
        mount_files=[],
        seed=1,
        url="",
        token="",
        directory=str(tmp_path),
        mountpoint="",
    )
    board = Board(job.board, job.files)
    for slot in slots_of(0):
        board.issue(0, slot.number, 7)
        board.acknowledge(0, slot.number, in_epoch, acknowledged)
        board.sync(0, slot.number, synced)
    reader = reading(job, 0, StaleClient(6))  # type: ignore[arg-type]
    if caught:
        with pytest.raises(WrongBytes, match="7 was acknowledged"):
            reader.step()
    else:
        reader.step()
    reader.board.close()
    board.close()


def test_what_was_not_written_there_is_told_apart() -> None:
    small, large = slots_of(1)[0], slots_of(1)[-1]
    assert len(large.pieces) > 1
    mixed = fill(large, 7)[: large.pieces[0][1]] + fill(large, 8)[large.pieces[0][1] :]
    assert versions(large, mixed, large.pieces) == [7] + [8] * (len(large.pieces) - 1)
    torn = fill(small, 7)[:64] + fill(small, 8)[64:]
    other = fill(slots_of(2)[0], 7)
    flipped = bytearray(fill(small, 7))
    flipped[1000] ^= 1
    for data in (torn, other, bytes(flipped), bytes(small.length), fill(small, 7)[:-32]):
        with pytest.raises(WrongBytes):
            versions(small, data, small.pieces)
