import pytest

from fs3.core.errors import Fs3Error
from fs3.core.units import format_seconds, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5h", 5400), ("30m", 1800), ("7d", 604_800), ("2w", 1_209_600)]
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds
    assert parse_seconds(format_seconds(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "d", "-1s", "1 fortnight", "1:30"])
def test_what_is_no_time_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(Fs3Error, match="7d"):
        parse_seconds(text)


def test_times_are_written_with_the_largest_unit_that_fits() -> None:
    assert [format_seconds(s) for s in (0, 0.5, 59, 60, 5400, 86_400, 90_000)] == [
        "0s",
        "0.5s",
        "59s",
        "1m",
        "90m",
        "1d",
        "25h",
    ]
