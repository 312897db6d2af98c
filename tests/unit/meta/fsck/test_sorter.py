from __future__ import annotations

import random
from collections import Counter
from contextlib import closing

from fs3.meta.fsck.sorter import Sorter


def test_numbers_come_back_counted_in_order_whatever_fits_in_memory() -> None:
    rng = random.Random(1)
    numbers = [rng.choice((rng.randrange(50), rng.getrandbits(64))) for _ in range(1000)]
    for run_numbers in (1, 7, 1000, 5000):
        with closing(Sorter(run_numbers=run_numbers)) as sorter:
            for number in numbers:
                sorter.add(number)
            assert list(sorter.counts()) == sorted(Counter(numbers).items())


def test_nothing_gives_nothing() -> None:
    with closing(Sorter()) as sorter:
        assert list(sorter.counts()) == []
