"""The chain state machine, row by row of its table, and what must hold for any input."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs3.mgmtd.chains import (
    LASTSRV,
    LOCAL_OFFLINE,
    LOCAL_ONLINE,
    LOCAL_UPTODATE,
    OFFLINE,
    SERVING,
    SYNCING,
    WAITING,
    TargetView,
    accepts_report,
    next_chain,
)
from fs3.v1.routing_pb2 import Chain, ChainTarget

T = 6_000
NOW = 1_000_000
STATES = {"S": SERVING, "L": LASTSRV, "Y": SYNCING, "W": WAITING, "O": OFFLINE}
NAMES = {v: k for k, v in STATES.items()}
VERSION = 7


def chain(states: str) -> Chain:
    targets = [ChainTarget(target_id=i + 1, state=STATES[s]) for i, s in enumerate(states)]
    return Chain(chain_id=1, version=VERSION, targets=targets)


def view(local: str) -> TargetView:
    """u up to date, o online, d offline since long ago, x silent for the lease, g ended in good order."""
    if local == "x":
        return TargetView(LOCAL_UPTODATE, VERSION, heard_ns=NOW - T)
    kind = {"u": LOCAL_UPTODATE, "o": LOCAL_ONLINE, "d": LOCAL_OFFLINE, "g": LOCAL_OFFLINE}[local]
    changed = NOW if local == "g" else NOW - 2 * T
    return TargetView(kind, VERSION, heard_ns=NOW - 1, changed_ns=changed, orderly=local == "g", lived_ns=NOW - 1)


def show(c: Chain) -> str:
    return " ".join(f"{t.target_id}{NAMES[t.state]}" for t in c.targets)


# (old states, what each target reports, new chain)
TABLE = [
    # SERVING
    ("SSS", "uuu", "1S 2S 3S"),
    ("SSS", "uou", "1S 2S 3S"),
    ("SSS", "duu", "2S 3S 1O"),
    ("SSS", "uxu", "1S 3S 2O"),
    ("SSS", "guu", "2S 3S 1O"),
    ("SSS", "ddu", "3S 1O 2O"),
    ("SSS", "ddd", "1L 2L 3L"),
    ("SSS", "xdg", "1L 2L 3L"),
    ("S", "d", "1L"),
    # LASTSRV: one serves again; the tail-most is preferred
    ("LLL", "ooo", "3S 1O 2O"),
    ("LLL", "ddo", "3S 1O 2O"),
    ("LLL", "ood", "2S 1O 3O"),
    ("LLL", "ddd", "1L 2L 3L"),
    ("L", "o", "1S"),
    ("LOO", "odd", "1S 2O 3O"),
    ("LOO", "doo", "1L 2W 3W"),
    ("SL", "uo", "1S 2O"),
    # SYNCING
    ("SYY", "uoo", "1S 2Y 3Y"),
    ("SYY", "uou", "1S 3S 2Y"),
    ("SYY", "uuu", "1S 2S 3S"),
    ("SY", "ud", "1S 2O"),
    ("SY", "do", "1L 2W"),
    ("SY", "du", "2S 1O"),
    ("LY", "do", "1L 2W"),
    # WAITING, OFFLINE
    ("SWO", "uoo", "1S 2Y 3Y"),
    ("SWO", "udd", "1S 2O 3O"),
    ("SOO", "uud", "1S 2W 3O"),
    ("LWO", "doo", "1L 2W 3W"),
    ("LWO", "ooo", "1S 2Y 3Y"),
]


@pytest.mark.parametrize(("old", "reports", "expected"), TABLE, ids=[f"{o}-{r}" for o, r, _ in TABLE])
def test_row_of_the_table(old: str, reports: str, expected: str) -> None:
    before = chain(old)
    after = next_chain(before, {i + 1: view(r) for i, r in enumerate(reports)}, NOW, T)
    assert show(after) == expected
    assert after.version == VERSION + (show(before) != expected)


def test_a_sync_that_ended_under_an_older_chain_version_does_not_count() -> None:
    stale = TargetView(LOCAL_UPTODATE, VERSION - 1, heard_ns=NOW)
    after = next_chain(chain("SY"), {1: view("u"), 2: stale}, NOW, T)
    assert show(after) == "1S 2Y"


def test_a_serving_target_is_not_dropped_before_a_survivor_is_proved_to_have_lived_after_the_death() -> None:
    # Heard after the death, by a message that was sent before.
    survivor = TargetView(LOCAL_UPTODATE, VERSION, heard_ns=NOW - 10, lived_ns=NOW - 100)
    dead = TargetView(LOCAL_OFFLINE, VERSION, heard_ns=NOW - 50, changed_ns=NOW - 50)
    before = chain("SS")
    assert next_chain(before, {1: dead, 2: survivor}, NOW, T) is before
    heard = TargetView(LOCAL_UPTODATE, VERSION, heard_ns=NOW - 10, lived_ns=NOW - 49)
    assert show(next_chain(before, {1: dead, 2: heard}, NOW, T)) == "2S 1O"


def test_targets_that_die_together_but_are_noticed_apart_are_all_last_serving() -> None:
    views = {i: TargetView(LOCAL_UPTODATE, VERSION, heard_ns=NOW + i * 300, lived_ns=NOW + i * 300) for i in (1, 2, 3)}
    current = chain("SSS")
    for now in range(NOW, NOW + 2 * T, 50):
        current = next_chain(current, views, now, T)
    assert show(current) == "1L 2L 3L"


def test_silence_while_the_manager_did_not_listen_does_not_count() -> None:
    quiet = TargetView(LOCAL_UPTODATE, VERSION, heard_ns=NOW - 9 * T, excused_ns=NOW - T + 1)
    before = chain("SS")
    assert next_chain(before, {1: quiet, 2: quiet}, NOW, T) is before
    assert show(next_chain(before, {1: quiet, 2: quiet}, NOW + 1, T)) == "1L 2L"


def test_being_excused_is_no_sign_of_life() -> None:
    dead = TargetView(LOCAL_OFFLINE, VERSION, heard_ns=NOW - 50, changed_ns=NOW - 50)
    excused = TargetView(LOCAL_UPTODATE, VERSION, heard_ns=NOW - 100, excused_ns=NOW, lived_ns=NOW - 100)
    before = chain("SS")
    assert next_chain(before, {1: dead, 2: excused}, NOW, T) is before


def test_the_tail_most_last_serving_target_is_waited_for_one_lease() -> None:
    back = TargetView(LOCAL_ONLINE, VERSION, heard_ns=NOW, changed_ns=NOW)
    gone = TargetView(LOCAL_OFFLINE, 0, heard_ns=0)
    before = chain("LL")
    assert next_chain(before, {1: back, 2: gone}, NOW + T - 1, T) is before
    still = TargetView(LOCAL_ONLINE, VERSION, heard_ns=NOW + T - 1, changed_ns=NOW)
    assert show(next_chain(before, {1: still, 2: gone}, NOW + T, T)) == "1S 2O"


def test_only_current_reports_count_except_that_a_target_is_unusable() -> None:
    assert accepts_report(chain("S"), LOCAL_UPTODATE, VERSION)
    assert not accepts_report(chain("S"), LOCAL_UPTODATE, VERSION - 1)
    assert not accepts_report(chain("S"), LOCAL_ONLINE, VERSION + 1)
    assert accepts_report(chain("S"), LOCAL_OFFLINE, VERSION - 1)


views_strategy = st.builds(
    TargetView,
    local=st.sampled_from([LOCAL_OFFLINE, LOCAL_ONLINE, LOCAL_UPTODATE]),
    chain_version=st.integers(VERSION - 1, VERSION + 20),
    heard_ns=st.integers(NOW - 2 * T, NOW),
    changed_ns=st.integers(NOW - 3 * T, NOW),
    orderly=st.booleans(),
)


@st.composite
def chains_and_views(draw: st.DrawFn) -> tuple[Chain, list[dict[int, TargetView]]]:
    states = draw(st.lists(st.sampled_from("SYWO"), min_size=1, max_size=5))
    if "S" not in states:
        states[0] = draw(st.sampled_from("SL"))
    states.sort(key="SLYWO".index)
    made = chain("".join(states))
    ids = [t.target_id for t in made.targets]
    steps = draw(st.lists(st.fixed_dictionaries(dict.fromkeys(ids, views_strategy)), min_size=1, max_size=8))
    return made, steps


@settings(max_examples=400)
@given(chains_and_views())
def test_what_holds_for_every_history(case: tuple[Chain, list[dict[int, TargetView]]]) -> None:
    current, history = case
    for views in history:
        after = next_chain(current, views, NOW, T)
        old = {t.target_id: t.state for t in current.targets}
        new = {t.target_id: t.state for t in after.targets}
        states = [t.state for t in after.targets]
        assert old.keys() == new.keys()
        # The version rises by one exactly when something changed.
        assert (after.version == current.version + 1) == (after.targets != current.targets)
        assert after.version in (current.version, current.version + 1)
        # Order.
        ranks = ["SLYWO".index(NAMES[s]) for s in states]
        assert ranks == sorted(ranks)
        # Somebody always has the data.
        assert SERVING in states or LASTSRV in states
        if SERVING in states:
            assert LASTSRV not in states
        else:
            # Whoever was serving is kept as last serving; nothing syncs from nobody.
            assert all(new[t] == LASTSRV for t, s in old.items() if s == SERVING)
            assert SYNCING not in states
        for target, state in new.items():
            if state == SERVING and old[target] != SERVING:
                # Only complete data comes into service.
                view_ = views[target]
                assert view_.alive(NOW, T)
                complete = view_.local == LOCAL_UPTODATE and view_.chain_version == current.version
                assert old[target] == LASTSRV or (old[target] == SYNCING and complete)
            if state == SERVING and old[target] == LASTSRV:
                # One of a set that may differ in unacknowledged writes.
                assert sum(s == SERVING for s in states) == 1 + sum(
                    old[t] == SYNCING and new[t] == SERVING for t in new
                )
        # The same again changes nothing more, once the reports speak of the new version only for what they did.
        assert next_chain(current, views, NOW, T) == after
        current = after


@given(chains_and_views())
def test_a_healed_chain_comes_to_serve_within_a_few_steps(case: tuple[Chain, list[dict[int, TargetView]]]) -> None:
    current, history = case
    for views in history:
        current = next_chain(current, views, NOW, T)
    for _ in range(6):
        healed = {
            t.target_id: TargetView(
                LOCAL_UPTODATE if t.state in (SERVING, SYNCING) else LOCAL_ONLINE, current.version, NOW, NOW
            )
            for t in current.targets
        }
        current = next_chain(current, healed, NOW, T)
    assert all(t.state == SERVING for t in current.targets)
