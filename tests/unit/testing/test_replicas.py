"""Comparing replicas: what is only on its way is waited for, what stays different is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fs3.client import FileSystem
from fs3.testing import replicas

CHUNK = bytes(16)


def listing(*versions: int) -> list[Any]:
    """Replicas of one chain that hold one chunk in these committed versions; 0 for none."""
    return [
        SimpleNamespace(
            chain_id=1,
            target_id=1000 * (i + 1),
            chunks=[
                SimpleNamespace(chunk_id=CHUNK, committed_version=v, pending_version=0, length=1, chunk_crc32c=v)
                for v in [version]
                if v
            ],
        )
        for i, version in enumerate(versions)
    ]


def showing(*listings: list[Any]) -> FileSystem:
    """A file system whose replicas are listed like this, the last one again and again."""
    left = list(listings)
    return cast(FileSystem, SimpleNamespace(list_replicas=lambda: left.pop(0) if len(left) > 1 else left[0]))


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "LOOK_S", 0.0)


def test_a_removal_that_is_on_its_way_is_no_difference() -> None:
    report = replicas.compare_settled_replicas(showing(listing(7, 0, 0), listing(7, 0, 0), listing(0, 0, 0)))
    assert report.differences == []
    assert (report.chunks, report.replicas) == (0, 3)


def test_whoever_does_not_wait_is_told_of_it_at_once() -> None:
    assert len(replicas.compare_replicas(showing(listing(7, 0, 0), listing(0, 0, 0))).differences) == 1


@pytest.mark.parametrize("versions", [(7, 7, 0), (7, 8, 8)])
def test_what_stays_different_is_told(monkeypatch: pytest.MonkeyPatch, versions: tuple[int, ...]) -> None:
    monkeypatch.setattr(replicas, "EQUAL_S", 0.0)
    report = replicas.compare_settled_replicas(showing(listing(*versions)))
    assert report.chunks == 1
    (difference,) = report.differences
    assert CHUNK.hex() in difference
