"""Deltas of the routing, on random histories and on the vectors that Rust is held to as well.

`python tests/unit/core/test_routing.py` writes the vectors again.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs3.core.errors import Fs3Error
from fs3.core.routing import STEPS_MAX, News, RoutingTeller, apply, counts, diff, join, known, received
from fs3.v1.frame_pb2 import Code
from fs3.v1.routing_pb2 import (
    Chain,
    ChainTable,
    ChainTarget,
    Disk,
    GetRoutingResponse,
    LocalState,
    Node,
    PublicState,
    Routing,
    RoutingDelta,
    RoutingKnown,
    Settings,
    Target,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "routing.json"
VECTORS = 12
HISTORY = 0xFEED_0000_0000_0001
IDS = 6
LOCAL = LocalState.values()


def any_routing(rng: random.Random, version: int, history: int = HISTORY) -> Routing:
    """Draw a routing of few ids and values, so that two of them have much in common."""

    def some() -> list[int]:
        return [i for i in range(1, IDS) if rng.random() < 0.7]

    return Routing(
        version=version,
        history=history,
        cluster_id="c",
        lease_ms=rng.choice([5000, 8000]),
        settings=Settings(version=1, values={"log_level": rng.choice(["info", "debug"])}),
        nodes=[Node(node_id=i, host=rng.choice("ab"), tags={"rack": rng.choice("xy")}) for i in some()],
        disks=[Disk(uuid=bytes([i]) * 16, free_bytes=rng.randrange(2)) for i in some()],
        targets=[Target(target_id=i, used_bytes=rng.randrange(2), local_state=rng.choice(LOCAL)) for i in some()],
        chains=[
            Chain(
                chain_id=i,
                version=rng.randrange(1, 3) << rng.choice([0, 62]),
                targets=[ChainTarget(target_id=t, state=rng.choice(PublicState.values())) for t in some()[:2]],
            )
            for i in some()
        ],
        tables=[ChainTable(table_id=i // 3, table_version=i, chain_ids=some()) for i in some()],
    )


def changed(rng: random.Random, old: Routing) -> Routing:
    """Make the version after `old`: in some of the lists other items, the rest as it was."""
    other, new = any_routing(rng, old.version + 1), Routing()
    new.CopyFrom(old)
    new.version += 1
    for name in ("nodes", "disks", "targets", "chains", "tables", "settings"):
        if rng.random() < 0.4:
            new.ClearField(name)  # type: ignore[arg-type]
            getattr(new, name).MergeFrom(getattr(other, name))
    return new


def any_history(seed: int, versions: int) -> list[Routing]:
    """Draw the routings of versions 1 and on."""
    rng = random.Random(seed)
    history = [any_routing(rng, 1)]
    while len(history) < versions:
        history.append(changed(rng, history[-1]))
    return history


def steps_of(history: list[Routing]) -> list[RoutingDelta]:
    return [diff(old, new) for old, new in pairwise(history)]


def vectors() -> list[dict[str, str]]:
    """Compute the vectors from the present code."""
    out = []
    for seed in range(VECTORS):
        old, new = any_history(seed, 2)
        named = {"old": old, "new": new, "delta": diff(old, new)}
        out.append({name: message.SerializeToString(deterministic=True).hex() for name, message in named.items()})
    return out


@pytest.mark.parametrize("number", range(VECTORS))
def test_golden_deltas_are_made_and_applied(number: int) -> None:
    vector = json.loads(GOLDEN.read_text())[number]
    old, new = (Routing.FromString(bytes.fromhex(vector[name])) for name in ("old", "new"))
    delta = RoutingDelta.FromString(bytes.fromhex(vector["delta"]))
    assert diff(old, new) == delta
    assert apply(old, delta) == new


@given(st.integers(0, 1 << 32))
def test_applying_what_changed_gives_the_new_routing(seed: int) -> None:
    old, new = any_history(seed, 2)
    before = old.SerializeToString(deterministic=True)
    assert apply(old, diff(old, new)) == new
    assert old.SerializeToString(deterministic=True) == before


@given(st.integers(0, 1 << 32), st.integers(3, 7), st.data())
def test_joined_deltas_lead_to_the_last_routing_from_every_version_in_between(
    seed: int, versions: int, data: st.DataObject
) -> None:
    history = any_history(seed, versions)
    first = data.draw(st.integers(0, versions - 2))
    joined = join(steps_of(history)[first:], history[first].version)
    for base in history[first:-1]:
        joined.from_version = base.version
        assert apply(base, joined) == history[-1]


def test_joined_deltas_tell_of_what_changed_back() -> None:
    first, second = any_routing(random.Random(1), 1), Routing()
    second.CopyFrom(first)
    second.version, second.targets[0].used_bytes = 2, 99
    third = Routing()
    third.CopyFrom(first)
    third.version = 3
    joined = join([diff(first, second), diff(second, third)], second.version)
    assert apply(second, joined) == third


def test_a_delta_says_no_more_than_what_changed() -> None:
    old, new = any_routing(random.Random(1), 1), Routing()
    new.CopyFrom(old)
    new.version = 2
    new.chains[0].version += 1
    gone = new.nodes.pop(0).node_id
    delta = diff(old, new)
    assert list(delta.changed.chains) == [new.chains[0]]
    assert list(delta.removed_nodes) == [gone]
    assert not any(
        (delta.changed.nodes, delta.changed.disks, delta.changed.targets, delta.changed.tables, delta.removed_chains)
    )


def test_a_field_that_is_not_known_here_is_that_of_the_new_routing() -> None:
    def with_field(routing: Routing, number: int) -> Routing:
        return Routing.FromString(routing.SerializeToString() + b"\xf8\x06" + bytes([number]))

    first, second, third = any_history(3, 3)
    assert apply(first, diff(first, with_field(second, 1))) == with_field(second, 1)
    assert apply(with_field(second, 1), diff(second, with_field(third, 2))) == with_field(third, 2)
    assert apply(with_field(second, 1), diff(second, third)) == third


def with_counts_off(delta: RoutingDelta) -> None:
    delta.counts.chain_versions += 1


def of_another_version(delta: RoutingDelta) -> None:
    delta.from_version += 1


def of_another_history(delta: RoutingDelta) -> None:
    delta.changed.history += 1


def back_in_time(delta: RoutingDelta) -> None:
    delta.changed.version = delta.from_version


@pytest.mark.parametrize("spoil", [with_counts_off, of_another_version, of_another_history, back_in_time])
def test_a_delta_to_anything_else_is_refused(spoil: Any) -> None:
    old, new = any_history(1, 2)
    delta = diff(old, new)
    spoil(delta)
    with pytest.raises(Fs3Error) as refused:
        apply(old, delta)
    assert refused.value.code == Code.CODE_PROTOCOL


# -- who gets what ---------------------------------------------------------------------------------------------


def told(history: list[Routing]) -> RoutingTeller:
    """Make one that told every version."""
    teller = RoutingTeller()
    teller.advance(News(history[0], None))
    for old, new in pairwise(history):
        teller.advance(News(new, diff(old, new)))
    return teller


def large_history(versions: int) -> list[Routing]:
    """Versions of a routing that is much larger than what changes: the free space of one disk after another."""
    disks = [Disk(uuid=i.to_bytes(16, "big"), path=f"/disks/{i}") for i in range(100)]
    history = [Routing(version=1, history=HISTORY, disks=disks)]
    while len(history) < versions:
        new = Routing()
        new.CopyFrom(history[-1])
        new.version += 1
        new.disks[new.version % 100].free_bytes = new.version
        history.append(new)
    return history


@settings(max_examples=50)
@given(st.integers(0, 1 << 32), st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_relays_tell_the_right_routing_to_whoever_knows_a_version_they_never_had(seed: int, jumps: list[int]) -> None:
    history = any_history(seed, sum(jumps) + 1)
    source, relay, at = RoutingTeller(), RoutingTeller(), 1
    source.advance(News(history[0], None))
    relay.advance(News(history[0], None))
    for jump in jumps:
        for _ in range(jump):
            source.advance(News(history[at], diff(history[at - 1], history[at])))
            at += 1
        before = history[at - 1 - jump]
        news = received(before, source.tell(known(before)))
        assert news is not None
        relay.advance(news)
        for base in history[: at - 1]:
            again = received(base, relay.tell(known(base)))
            assert again is not None
            assert again.routing == history[at - 1]


def test_who_knows_a_recent_version_gets_a_delta_and_it_is_counted() -> None:
    history = large_history(5)
    teller = told(history)
    answer = teller.tell(known(history[1]))
    assert answer.HasField("delta")
    assert len(answer.delta.changed.disks) == 3
    assert teller.tell(known(history[1])) is answer
    assert (teller.sent.wholes, teller.sent.deltas) == (0, 2)
    assert teller.sent.delta_bytes == 2 * answer.ByteSize()


def asks_as_of_old(asker: RoutingKnown) -> None:
    asker.Clear()


def knows_nothing(asker: RoutingKnown) -> None:
    asker.version = asker.history = 0


def met_another_history(asker: RoutingKnown) -> None:
    asker.history += 1


def is_ahead(asker: RoutingKnown) -> None:
    asker.version += 100


@pytest.mark.parametrize("change", [asks_as_of_old, knows_nothing, met_another_history, is_ahead])
def test_whoever_does_not_know_such_a_version_gets_the_whole(change: Any) -> None:
    history = large_history(5)
    teller, asker = told(history), known(history[1])
    change(asker)
    assert teller.tell(asker) == GetRoutingResponse(version=5, routing=history[-1])
    assert (teller.sent.wholes, teller.sent.deltas) == (1, 0)


def test_who_is_too_far_behind_gets_the_whole() -> None:
    history = large_history(STEPS_MAX + 3)
    teller = told(history)
    assert teller.tell(known(history[1])).HasField("routing")
    # The change of every disk is as much as all the disks.
    assert teller.tell(known(history[2])).HasField("routing")
    assert teller.tell(known(history[-9])).HasField("delta")


def test_what_came_whole_ends_what_deltas_reach() -> None:
    history = large_history(6)
    teller = told(history[:4])
    teller.advance(News(history[5], None))
    assert teller.tell(known(history[2])).HasField("routing")


def test_routings_of_releases_without_histories_are_told_whole() -> None:
    history = large_history(3)
    for routing in history:
        routing.history = 0
    assert told(history).tell(known(history[1])).HasField("routing")


def test_counts_of_chain_versions_wrap() -> None:
    top = (1 << 64) - 1
    assert counts(Routing(chains=[Chain(version=top), Chain(chain_id=1, version=3)])).chain_versions == 2


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(vectors(), indent=1) + "\n")
