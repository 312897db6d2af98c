import random

from fs3.kv.conflicts import ConflictLog, Entry


def test_a_written_key_conflicts_with_exactly_the_ranges_that_hold_it() -> None:
    rng = random.Random(5)

    def key() -> bytes:
        return bytes(rng.choices(b"abc", k=rng.randint(1, 3)))

    for _ in range(2000):
        log = ConflictLog(0)
        written = [(version, [key() for _ in range(rng.randint(0, 3))]) for version in range(1, 5)]
        for version, keys in written:
            log.append(Entry(version, 0, keys, []))
        ranges = [(min(pair), max(pair)) for pair in ((key(), key()) for _ in range(rng.randint(1, 5)))]
        read_version = rng.randint(0, 5)
        expected = any(
            begin <= one < end
            for version, keys in written
            for one in keys
            for begin, end in ranges
            if version > read_version
        )
        assert log.conflicts(read_version, [], ranges) == expected, (written, ranges, read_version)
