"""What a namespace's attribute says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fs3.core.errors import Fs3Error
from fs3.kvcache.base import as_key, fitting, leading, window
from fs3.kvcache.namespace import Namespace, Wanted, parse

NAMESPACE = Namespace(
    inode=7,
    table=(1, 2),
    first=3,
    chains=4,
    chunk_bytes=1 << 20,
    replicas=2,
    capacity_bytes=1 << 30,
    ttl_ms=500,
    generation=9,
)


def test_an_attribute_says_all_of_a_namespace() -> None:
    for namespace in (NAMESPACE, replace(NAMESPACE, durable=True)):
        assert parse(7, namespace.attribute()) == namespace


@pytest.mark.parametrize("value", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 1, "table": 5}', b"\xff"])
def test_nonsense_is_an_error_that_names_the_attribute(value: bytes) -> None:
    with pytest.raises(Fs3Error, match=r"user\.fs3\.kvcache cannot be understood"):
        parse(7, value)


def test_an_attribute_of_a_later_format_is_refused() -> None:
    later = NAMESPACE.attribute().replace(b'"format": 1', b'"format": 3')
    with pytest.raises(Fs3Error, match="format 3, this is fs3 for up to 2"):
        parse(7, later)


@pytest.mark.parametrize("wrong", [{"capacity": -1}, {"ttl": 0.0}, {"ttl": float("nan")}, {"replicas": 17}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    settings = {"create": True, "capacity": None, "ttl": None, "replicas": None, "chunk_bytes": None, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Wanted(**settings)  # type: ignore[arg-type]


def test_replicas_of_a_durable_namespace_are_those_of_the_chains() -> None:
    with pytest.raises(ValueError, match="leave replicas out"):
        Wanted(True, None, None, 2, None, durable=True)


def test_keys_are_bytes_and_windows_lie_within_their_memory() -> None:
    assert as_key("ä") == "ä".encode()
    assert as_key(memoryview(b"k")) == b"k"  # type: ignore[arg-type]
    memory = bytearray(10)
    window(memory, 2, 3)[:] = b"abc"
    assert memory == b"\0\0abc\0\0\0\0\0"
    for offset, length in ((-1, 1), (8, 3), (11, None), (0, -1)):
        with pytest.raises(ValueError, match="not within the buffer"):
            window(memory, offset, length)


def test_a_value_that_does_not_fit_is_an_error_and_a_prefix_ends_at_the_first_miss() -> None:
    assert fitting("k", None) is None
    assert fitting("k", 0) == 0
    with pytest.raises(ValueError, match="has 12 bytes, more"):
        fitting("k", -12)
    assert (leading([]), leading([True, True]), leading([True, False, True])) == (0, 2, 1)
