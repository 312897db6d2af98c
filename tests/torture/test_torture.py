"""A short campaign: `make torture` is the long one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.torture.campaign import run
from tests.torture.content import WrongBytes, fill, slots_of, versions
from tests.torture.disks import missing_device
from tests.torture.network import missing_tools, sweep

CYCLES = 18
MINUTES = 2.0
SEED = int(os.environ.get("FS3_TORTURE_SEED", "1"))


def test_nothing_acknowledged_is_lost_under_overlapping_faults(tmp_path: Path) -> None:
    if reason := missing_tools() or missing_device():
        pytest.skip(reason)
    sweep()
    report = run(tmp_path, seed=SEED, cycles=CYCLES, minutes=MINUTES)
    print(report.table())
    for log in (tmp_path / "cluster").glob("*/log"):
        print(f"--- {log.parent.name}", *log.read_text(errors="replace").splitlines()[-30:], sep="\n")
    assert report.lost == [], f"repeat with: make torture SEED={SEED}"
    assert report.power_cuts > 0
    assert report.unsynced_lost > 0
    assert min(report.acknowledged.values()) > 0
    shutil.rmtree(tmp_path)


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
