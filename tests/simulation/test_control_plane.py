"""The control plane alone in virtual time: real managers and storage shells around a model of the data path."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from fs3.mgmtd import lease
from fs3.testing.sim_campaign import main
from fs3.testing.sim_plan import Plan, draw
from fs3.testing.simulator import simulate

WORLDS = 40


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fs3.testing.simulator", "--world", "model", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def test_hours_of_faults_leave_the_cluster_safe_and_it_heals() -> None:
    # Always the same worlds: one alone may last a day and have only some kinds of fault.
    done = command("--first", "1", "--seeds", str(WORLDS), "--json")
    assert done.stdout, done.stderr
    summary = json.loads(done.stdout)
    assert not summary["failures"], json.dumps(summary["failures"], indent=1)
    assert done.returncode == 0
    assert summary["seeds"] == WORLDS
    assert summary["hours"] > 100
    assert summary["run_twice"] >= 1
    for kind in ("manager crashes", "manager pauses", "control messages lost", "store faults", "nodes crashed"):
        assert summary["faults"][kind] > 0, kind


def test_a_canary_fails_and_its_replay_command_fails_the_same_way() -> None:
    done = command("--seeds", "40", "--first", "1", "--canary", "--json", "--jobs", "1")
    failure = json.loads(done.stdout)["failures"][0]
    assert done.returncode == 1
    again = command(*failure["command"].split()[3:], "--json")
    assert again.returncode == 1
    replayed = json.loads(again.stdout)
    assert (replayed["violated"], replayed["violation"]) == (failure["violated"], failure["violation"])
    assert replayed["trace_hash"] == failure["trace_hash"]


def test_a_person_is_shown_what_is_wrong_and_how_to_see_it_again(capsys: pytest.CaptureFixture[str]) -> None:
    done = command("--seeds", "40", "--first", "1", "--canary", "--jobs", "1")
    assert "violates: " in done.stdout
    assert "replay: python -m fs3.testing.simulator --seed" in done.stdout
    assert main(["--world", "model", "--seed", "3", "--hours", "0.05"]) == 0
    assert "seed 3: ok" in capsys.readouterr().out


def hostile(seed: int) -> Plan:
    """Several managers that stand still and die over a slow, unreliable store."""
    return dataclasses.replace(
        draw(seed, hours=0.3),
        pace=1,
        nodes=3,
        replicas=3,
        targets_per_disk=1,
        managers=3,
        heartbeat_ms=1000,
        lease_ms=6000,
        primary_lease_ms=5000,
        manager_crashes=20,
        manager_pauses=60,
        kv_conflict=0.02,
        kv_unknown=0.05,
        kv_delay_s=6.0,
    )


def violations(seeds: int) -> set[str]:
    reports = [simulate(hostile(seed), "model") for seed in range(seeds)]
    return {r.violated for r in reports if not r.passed}


def test_a_hostile_store_and_stale_primaries_do_no_harm() -> None:
    assert violations(6) == set()


def test_a_primary_that_does_not_check_its_epoch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "holds", lambda record, held: True)
    assert violations(6) & {"epoch fencing", "one primary per epoch", "versions grow"}


def test_faults_of_the_store_are_drawn_from_the_seed() -> None:
    one, two = (simulate(hostile(5), "model") for _ in range(2))
    assert one.trace_hash == two.trace_hash
    assert one.faults == two.faults
    assert one.trace_hash != simulate(hostile(6), "model").trace_hash
