"""The example that sorts: through a mount and the native client, and its validation notices what is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fs3.testing.cluster import LocalCluster
from tests.cluster.mounts import mounted

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "graysort"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The example's modules `records` and `graysort`."""
    pytest.importorskip("pyarrow")
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import graysort  # type: ignore[import-not-found]
    import records  # type: ignore[import-not-found]

    yield records, graysort
    for name in {"graysort", "records", "stores"} - before:
        sys.modules.pop(name, None)


def sort(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE / "graysort.py"), "--size", "3MB", "--files", "3", "--jobs", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_records_are_sorted_and_valid_on_a_mount_and_through_the_native_client(
    shared_cluster: LocalCluster, tmp_path: Path
) -> None:
    url = f"{shared_cluster.url}?token_file={shared_cluster.directory / 'token'}"
    with mounted(shared_cluster, tmp_path / "mnt") as mountpoint:
        runs = [
            sort("--dir", str(mountpoint / "sort"), "--sort", "duckdb"),
            sort("--dir", "/native/sort", "--url", url, "--sort", "arrow"),
        ]
        assert list(mountpoint.iterdir()) == [mountpoint / "native"], "the directories are removed"
        (mountpoint / "there").mkdir()
        refused = sort("--dir", str(mountpoint / "there"))
    for done in runs:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("valid: every record is there, unchanged and in order\n")
    checksums = {line.split()[-1] for done in runs for line in done.stdout.splitlines() if "checksum" in line}
    assert len(checksums) == 1
    assert refused.returncode == 2
    assert "exists" in refused.stderr


def test_both_sorts_agree_with_python(modules: tuple[ModuleType, ModuleType]) -> None:
    records, _ = modules
    made = records.generate(0, 2000, seed=7)
    made[1000:, :10] = made[:1000, :10]  # equal keys
    expected = sorted(bytes(record) for record in made)
    for name, by in records.SORTS.items():
        result = by(made)
        assert records.in_order(result), name
        assert sorted(bytes(record) for record in result) == expected, name


def lose(found: list[Any], change: Callable[..., Any]) -> None:
    found[0] = change(found[0], records=found[0].records - 1)


def damage(found: list[Any], change: Callable[..., Any]) -> None:
    found[1] = change(found[1], checksum=found[1].checksum ^ 1)


def disorder(found: list[Any], change: Callable[..., Any]) -> None:
    found[1] = change(found[1], in_order=False)


def exchange(found: list[Any], change: Callable[..., Any]) -> None:
    found[0], found[2] = found[2], found[0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [(lose, "999 records"), (damage, "checksum"), (disorder, "not in order"), (exchange, "begins before")],
)
def test_validation_finds_what_is_wrong(
    modules: tuple[ModuleType, ModuleType], fault: Callable[..., None], message: str
) -> None:
    from dataclasses import replace

    records, graysort = modules
    made = records.generate(0, 1000, seed=3)
    job = graysort.Job("/d", len(made), 3, "arrow", 3)
    found = []
    for part in map(records.sort_with_arrow, records.split(made, 3)):
        keys = bytes(part[0, :10]), bytes(part[-1, :10])
        found.append(graysort.Found(len(part), records.checksum(part), records.in_order(part), *keys))
    expected = records.checksum(made)
    assert graysort.faults(job, expected, found) == []
    fault(found, replace)
    assert any(message in wrong for wrong in graysort.faults(job, expected, found))


def test_the_checksum_notices_every_byte_and_no_order(modules: tuple[ModuleType, ModuleType]) -> None:
    records, _ = modules
    made = records.generate(5, 100, seed=1)
    whole = records.checksum(made)
    assert records.checksum(made[::-1]) == whole
    for at in range(records.RECORD_BYTES):
        other = made.copy()
        other[at, at] ^= 1
        assert records.checksum(other) != whole
    # Two records that exchange a byte.
    other = made.copy()
    other[[3, 4], 50] = other[[4, 3], 50] ^ 1
    assert records.checksum(other) != whole
