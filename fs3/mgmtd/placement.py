"""Which disks make a chain together. Pure.

A greedy plan: each chain takes the nodes with the most free slots (which makes the most chains there can be),
among equals those that have shared the fewest chains with each other, so that a failed node's load spreads over
all others. Within a chain the order is such that every node is head, and every other position, equally often.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class FreeDisk:
    """A disk that can take `slots` more targets."""

    node_id: int
    disk_uuid: bytes
    slots: int


class Place(NamedTuple):
    """Where one target of a chain goes."""

    node_id: int
    disk_uuid: bytes


def plan_chains(
    disks: Iterable[FreeDisk],
    replicas: int,
    existing: Sequence[Sequence[int]] = (),
    domains: Mapping[int, str] | None = None,
) -> list[tuple[Place, ...]]:
    """Make as many chains as the free slots allow, each on `replicas` distinct nodes, head first.

    `domains`: what each node fails together with; no chain has two targets in one domain. None: every node by itself.
    `existing` are the node ids of the chains there are, in chain order: their neighbourhoods and positions count.
    The same input gives the same plan.
    """
    slots: dict[int, dict[bytes, int]] = {}
    for disk in disks:
        if disk.slots > 0:
            slots.setdefault(disk.node_id, {})[disk.disk_uuid] = disk.slots
    free = {node: sum(s.values()) for node, s in slots.items()}
    shared: Counter[tuple[int, int]] = Counter()
    held: Counter[tuple[int, int]] = Counter()
    for nodes_before in existing:
        _count(nodes_before, shared, held)
    chains: list[tuple[Place, ...]] = []
    while True:
        nodes = _pick_nodes(free, shared, replicas, domains)
        if nodes is None:
            return chains
        order = _order(nodes, held)
        _count(order, shared, held)
        chain: list[Place] = []
        for node in order:
            disk_uuid = max(sorted(slots[node]), key=lambda uuid: slots[node][uuid])
            slots[node][disk_uuid] -= 1
            free[node] -= 1
            chain.append(Place(node, disk_uuid))
        chains.append(tuple(chain))


def _count(chain: Sequence[int], shared: Counter[tuple[int, int]], held: Counter[tuple[int, int]]) -> None:
    for position, node in enumerate(chain):
        held[node, position] += 1
        for other in chain:
            if other != node:
                shared[node, other] += 1


def _pick_nodes(
    free: dict[int, int], shared: Counter[tuple[int, int]], replicas: int, domains: Mapping[int, str] | None
) -> list[int] | None:
    domain_of: Mapping[int, object] = {n: n for n in free} if domains is None else domains
    left_in: Counter[object] = Counter()
    for node, slots in free.items():
        left_in[domain_of[node]] += slots
    picked: list[int] = []
    while len(picked) < replicas:
        taken = {domain_of[n] for n in picked}
        left = [n for n in free if free[n] > 0 and domain_of[n] not in taken]
        if not left:
            return None
        # The fullest domains first, which makes the most chains, as with nodes.
        picked.append(min(left, key=lambda n: (-left_in[domain_of[n]], -free[n], sum(shared[n, p] for p in picked), n)))
    return picked


def _order(nodes: list[int], held: Counter[tuple[int, int]]) -> list[int]:
    left = list(nodes)
    order = []
    for position in range(len(nodes)):
        chosen = min(left, key=lambda n: (held[n, position], n))
        left.remove(chosen)
        order.append(chosen)
    return order
