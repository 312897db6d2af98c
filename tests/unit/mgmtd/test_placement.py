"""Placement of targets into chains."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs3.mgmtd.placement import FreeDisk, plan_chains


def disks(*slots_per_node: list[int]) -> list[FreeDisk]:
    return [
        FreeDisk(node + 1, bytes([node + 1, i]), slots)
        for node, per_disk in enumerate(slots_per_node)
        for i, slots in enumerate(per_disk)
    ]


@pytest.mark.parametrize(("nodes", "replicas", "slots"), [(3, 3, 8), (4, 3, 12), (5, 3, 6), (6, 2, 5), (1, 1, 4)])
def test_equal_nodes_are_used_up_and_head_equally_often(nodes: int, replicas: int, slots: int) -> None:
    plan = plan_chains(disks(*[[slots]] * nodes), replicas)
    assert len(plan) == nodes * slots // replicas
    assert all(len({p.node_id for p in chain}) == replicas for chain in plan)
    heads = Counter(chain[0].node_id for chain in plan)
    assert max(heads.values()) - min(heads[n + 1] for n in range(nodes)) <= 1


def test_a_failed_nodes_load_spreads_over_all_others() -> None:
    plan = plan_chains(disks(*[[12]] * 5), 3)
    shared = Counter(pair for chain in plan for pair in combinations(sorted(p.node_id for p in chain), 2))
    counts = [shared[pair] for pair in combinations(range(1, 6), 2)]
    assert min(counts) > 0
    assert max(counts) - min(counts) <= 2


def test_too_few_nodes_make_no_chain() -> None:
    assert plan_chains(disks([8], [8]), 3) == []


def test_chains_of_a_node_spread_over_its_disks() -> None:
    plan = plan_chains(disks([2, 2], [2, 2], [2, 2]), 3)
    used = Counter(p for chain in plan for p in chain)
    assert set(used.values()) == {2}
    assert len(used) == 6


def test_existing_chains_count_for_the_heads() -> None:
    plan = plan_chains(disks([1], [1]), 2, existing=[[1, 2], [1, 2]])
    assert [p.node_id for p in plan[0]] == [2, 1]


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(1, 4),
)
def test_no_disk_is_overfilled_and_no_chain_has_a_node_twice(nodes: list[list[int]], replicas: int) -> None:
    free = disks(*nodes)
    plan = plan_chains(free, replicas)
    used = Counter(p for chain in plan for p in chain)
    slots = {(d.node_id, d.disk_uuid): d.slots for d in free}
    assert all(count <= slots[tuple(place)] for place, count in used.items())
    for chain in plan:
        assert len({p.node_id for p in chain}) == replicas
    # No further chain would fit.
    left = Counter({n + 1: sum(s) for n, s in enumerate(nodes)})
    left.subtract(Counter(p.node_id for chain in plan for p in chain))
    assert sum(1 for v in left.values() if v > 0) < replicas
    assert plan == plan_chains(free, replicas)


@pytest.mark.parametrize("racks", [(3, 3, 3), (4, 4, 1), (1, 2, 5, 3), (2, 2, 2, 2, 2)])
def test_no_chain_has_two_targets_in_one_failure_domain(racks: tuple[int, ...]) -> None:
    names = [f"rack-{i}" for i, count in enumerate(racks) for _ in range(count)]
    domains = dict(enumerate(names, 1))
    plan = plan_chains(disks(*[[4]] * len(names)), 3, domains=domains)
    for chain in plan:
        assert len({domains[place.node_id] for place in chain}) == 3
    # As many as there can be: a chain takes a slot of three racks at a time.
    slots = [4 * count for count in racks]
    most = max(n for n in range(sum(slots) // 3 + 1) if sum(min(s, n) for s in slots) >= 3 * n)
    assert len(plan) == most


def test_too_few_failure_domains_make_no_chain() -> None:
    assert plan_chains(disks([4], [4], [4]), 3, domains={1: "a", 2: "a", 3: "b"}) == []
