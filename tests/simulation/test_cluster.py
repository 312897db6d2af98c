"""The whole cluster in virtual time: real managers, storage shells, storage services and clients.

Longer, and with seeds of its own: ``make sim HOURS=2000``.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fs3.testing.sim_campaign import describe

HOURS = 200
SECONDS = 900
# Always the same ones, so that a change is judged by itself; `make sim` goes through others.
FIRST = 1
# Injected and survived.
FAULTS = 40_000


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fs3.testing.simulator", *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS + 300,
        check=False,
    )


def test_simulated_hours_under_faults_violate_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    done = command("--first", str(FIRST), "--hours", str(HOURS), "--seconds", str(SECONDS), "--json")
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout)
    with capsys.disabled():
        hours, wall_s, faults = summary["hours"], summary["wall_s"], sum(summary["faults"].values())
        print(f"\nsimulated {hours:.0f} hours in {wall_s:.0f} s: {summary['seeds']} seeds, {faults} faults", flush=True)
    assert not summary["failures"], "\n".join(describe(failure) for failure in summary["failures"])
    assert done.returncode == 0, done.stderr
    assert summary["hours"] >= HOURS, f"{SECONDS} s were not enough"
    assert sum(summary["faults"].values()) >= FAULTS
    assert summary["run_twice"] > 0
    for kind in ("crashes", "pauses", "partitions", "manager crashes", "manager pauses", "store faults"):
        assert summary["faults"][kind] > 0, f"no {kind} in all that time"


def test_a_canary_fails_and_its_replay_command_fails_the_same_way() -> None:
    done = command("--seeds", "100", "--first", "1", "--canary", "--json", "--seconds", "120")
    failures = json.loads(done.stdout)["failures"]
    assert failures, "a rule was broken on purpose, and the simulation did not notice"
    assert done.returncode == 1
    again = command(*failures[0]["command"].split()[3:], "--json")
    assert again.returncode == 1
    replayed = json.loads(again.stdout)
    assert (replayed["violation"], replayed["trace_hash"]) == (failures[0]["violation"], failures[0]["trace_hash"])
