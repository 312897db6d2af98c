import logging

import pytest

from fs3.core import settings
from fs3.core.errors import Fs3Error
from fs3.core.service import LogLevel


@pytest.mark.parametrize(
    ("name", "value", "parsed"),
    [
        (settings.CHUNK_BYTES, "4MiB", 4 << 20),
        (settings.STRIPE, "12", 12),
        (settings.GC_DELAY, "1.5m", 90_000),
        (settings.LOG_LEVEL, "debug", "debug"),
    ],
)
def test_values_are_read_as_people_write_them(name: str, value: str, parsed: int | str) -> None:
    settings.check(name, value)
    assert settings.value_of({name: value}, name, type(parsed)()) == parsed


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("meta.chunkbytes", "1MiB", "meta.chunk_bytes"),
        ("zzz", "1", "log_level"),
        (settings.CHUNK_BYTES, "100000", "power of two"),
        (settings.STRIPE, "-1", "number"),
        (settings.GC_DELAY, "soon", "7d"),
        (settings.LOG_LEVEL, "loud", "debug"),
    ],
)
def test_what_cannot_be_set_is_refused_with_what_could(name: str, value: str, word: str) -> None:
    with pytest.raises(Fs3Error, match=word):
        settings.check(name, value)


def test_what_is_not_set_or_not_understood_is_as_configured() -> None:
    assert settings.value_of({}, settings.STRIPE, 3) == 3
    assert settings.value_of({settings.STRIPE: "many"}, settings.STRIPE, 3) == 3


def test_the_log_level_follows_the_setting_and_goes_back() -> None:
    root = logging.getLogger()
    before = root.level
    try:
        native: list[str] = []
        level = LogLevel("error", native.append)
        level.follow({})
        assert root.level == before
        level.follow({settings.LOG_LEVEL: "debug"})
        assert root.level == logging.DEBUG
        level.follow({})
        assert root.level == logging.ERROR
        assert native == ["debug", "error"]
    finally:
        root.setLevel(before)
