"""The order of samples: complete, the same for a seed, shared out without overlap, resumable anywhere."""

from __future__ import annotations

import json
from itertools import chain

import numpy as np
import pytest

from fs3.data.sampler import Permutation, StatefulDistributedSampler


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 1000, 65_537])
def test_a_permutation_has_every_number_once(length: int) -> None:
    found = Permutation(length, 3, 4)(np.arange(length))
    assert np.array_equal(np.sort(found), np.arange(length))


def test_a_permutation_of_any_length_costs_nothing_to_make() -> None:
    order = Permutation(1 << 50, 1)
    found = order(np.array([0, 1, 2, (1 << 50) - 1]))
    assert len(set(found.tolist())) == 4
    assert (found < 1 << 50).all()


def test_a_permutation_looks_random() -> None:
    length, draws = 64, 400
    table = np.zeros((length, length))
    for seed in range(draws):
        table[np.arange(length), Permutation(length, seed)(np.arange(length))] += 1
    # Every number is about as often at every place: chi-square over 63 * 63 degrees of freedom, 6 deviations wide.
    expected = draws / length
    chi2 = ((table - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2
    assert abs(chi2 - freedom) < 6 * np.sqrt(2 * freedom)
    # Neighbours in the order are not neighbours in number.
    order = Permutation(100_000, 9)(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_the_order_of_a_seed_never_changes() -> None:
    # A run that was saved by an older release goes on in the same order: see sampler.ORDER.
    assert list(StatefulDistributedSampler(10, seed=1)) == [0, 4, 7, 9, 2, 3, 5, 8, 6, 1]
    assert list(StatefulDistributedSampler(1_000_000, seed=7, num_replicas=200_000, rank=5)) == [
        987814,
        203612,
        119979,
        363903,
        314596,
    ]


def test_ranks_share_an_epoch_without_overlap() -> None:
    ranks = [list(StatefulDistributedSampler(1000, 4, rank, seed=5)) for rank in range(4)]
    assert sorted(chain(*ranks)) == list(range(1000))
    assert all(len(rank) == 250 for rank in ranks)
    assert list(StatefulDistributedSampler(8, 2, 1, shuffle=False)) == [1, 3, 5, 7]


def test_all_ranks_get_as_many_samples() -> None:
    padded = [list(StatefulDistributedSampler(10, 4, rank, seed=5)) for rank in range(4)]
    assert [len(rank) for rank in padded] == [3] * 4
    assert set(chain(*padded)) == set(range(10))
    cut = [list(StatefulDistributedSampler(10, 4, rank, seed=5, drop_last=True)) for rank in range(4)]
    assert [len(rank) for rank in cut] == [2] * 4
    assert len(set(chain(*cut))) == 8
    # More ranks than samples.
    assert [list(StatefulDistributedSampler(2, 5, rank, shuffle=False)) for rank in range(5)] == [
        [0],
        [1],
        [0],
        [1],
        [0],
    ]
    assert len(StatefulDistributedSampler(0, 2, 0)) == 0


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sampler = StatefulDistributedSampler(100, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert sorted(second) == sorted(first)
    assert list(StatefulDistributedSampler(100, seed=2)) != first


@pytest.mark.parametrize(("ranks", "later"), [(1, 1), (4, 4), (4, 2), (2, 8), (3, 5)])
def test_an_epoch_goes_on_where_it_was_left_also_by_other_ranks(ranks: int, later: int) -> None:
    used: list[int] = []
    states = []
    for rank in range(ranks):
        sampler = StatefulDistributedSampler(1000, ranks, rank, seed=3)
        sampler.set_epoch(2)
        iterator = iter(sampler)
        used += [next(iterator) for _ in range(30)]
        states.append(json.dumps(sampler.state_dict()))
    assert len(set(states)) == 1
    for rank in range(later):
        sampler = StatefulDistributedSampler(1000, later, rank)
        sampler.load_state_dict(json.loads(states[0]))
        sampler.set_epoch(2)
        rest = list(sampler)
        assert len(rest) == len(sampler)
        used += rest
    assert set(used) == set(range(1000))
    assert len(used) < 1000 + later


def test_a_resumed_rank_reads_what_it_would_have_read() -> None:
    whole = list(StatefulDistributedSampler(1001, 2, 1, seed=9))
    sampler = StatefulDistributedSampler(1001, 2, 1, seed=9)
    for consumed in (0, 1, 100, len(whole)):
        sampler.load_state_dict({**sampler.state_dict(0), "consumed": 0})
        list(sampler)
        # What a DataLoader's workers have asked for is more than what was used.
        resumed = StatefulDistributedSampler(1001, 2, 1)
        resumed.load_state_dict(sampler.state_dict(consumed))
        assert list(resumed) == whole[consumed:]
    # Saved and resumed twice within an epoch.
    middle = StatefulDistributedSampler(1001, 2, 1)
    middle.load_state_dict(sampler.state_dict(100))
    last = StatefulDistributedSampler(1001, 2, 1)
    last.load_state_dict(middle.state_dict(50))
    assert list(last) == whole[150:]
    last.set_epoch(1)
    assert len(list(last)) == 501


def test_a_state_of_other_data_is_refused() -> None:
    sampler = StatefulDistributedSampler(10)
    with pytest.raises(ValueError, match="samples 10 there, 11 here"):
        StatefulDistributedSampler(11).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="order"):
        sampler.load_state_dict({**sampler.state_dict(), "order": "older"})
    with pytest.raises(ValueError, match="11 samples used of 10"):
        sampler.state_dict(11)


def test_ranks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    sampler = StatefulDistributedSampler(9, shuffle=False)
    assert (sampler.rank, sampler.num_replicas) == (2, 3)
    assert list(sampler) == [2, 5, 8]
    with pytest.raises(ValueError, match="rank 3 of 3 replicas"):
        StatefulDistributedSampler(9, 3, 3)
