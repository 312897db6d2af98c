"""What is beside the tensors of a checkpoint."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fs3.checkpoint import manifest
from fs3.checkpoint.manifest import StoredItem, Summary, Sums
from fs3.core.errors import Fs3Error

SUMMARY = Summary("id", 7, 100, 3, 2, "2.13.0", 1, 2)


def test_a_summary_comes_back_and_what_is_unknown_in_it_is_ignored() -> None:
    assert Summary.parse(SUMMARY.dump()) == SUMMARY
    more = json.loads(SUMMARY.dump()) | {"later": True}
    assert Summary.parse(json.dumps(more).encode()) == SUMMARY


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b'{"version": 1}', dataclasses.replace(SUMMARY, version=2).dump()]
)
def test_what_is_no_summary_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Summary.parse(data)


def test_sums_are_listed_by_file_in_the_order_of_their_places() -> None:
    items = [
        ("b", StoredItem("one", 64, 3, (5,))),
        ("a", StoredItem("two", 0, 1, (6,))),
        ("c", StoredItem("one", 0, 9, ())),
    ]
    sums = manifest.sums_of(items)
    assert sums == {"one": [Sums("c", 0, 9, ()), Sums("b", 64, 3, (5,))], "two": [Sums("a", 0, 1, (6,))]}
    assert manifest.parse_sums(manifest.dump_sums(sums)) == sums
    for wrong in (b"{}", b"[]", b'{"files": {"x": [[1]]}}', b'{"files": 3}'):
        with pytest.raises(ValueError, match=r"."):
            manifest.parse_sums(wrong)


def test_temporary_names_are_told_from_others() -> None:
    name = manifest.temporary("/ckpt/step-1/").rpartition("/")[2]
    assert manifest.unfinished_name(name) == "step-1"
    assert manifest.temporary("/ckpt/step-1") != manifest.temporary("/ckpt/step-1")
    for other in ("step-1", ".step-1", ".step-1.tmp-", ".step-1.tmp-xyz", ".metadata"):
        assert manifest.unfinished_name(other) is None
    assert manifest.split("a") == ("/", "a")
    for wrong in ("/", "", "/ckpt/..", f"/ckpt/{name}"):
        with pytest.raises(Fs3Error, match="no name for a checkpoint"):
            manifest.split(wrong)
