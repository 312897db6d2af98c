"""Identity of nodes and disks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fs3.core.errors import Fs3Error
from fs3.storage.disks import open_node
from fs3.v1.frame_pb2 import Code


def refused(data_dir: Path, disks: list[Path], cluster: str = "c1") -> Fs3Error:
    with pytest.raises(Fs3Error) as found:
        open_node(str(data_dir), tuple(map(str, disks)), cluster)
    assert "\n" not in found.value.message
    return found.value


def test_identities_are_made_once_and_stay(tmp_path: Path) -> None:
    data, disk = tmp_path / "node", tmp_path / "disk"
    first = open_node(str(data), (str(disk),), "c1")
    first.close()
    again = open_node(str(data), (str(disk),), "c1")
    again.close()
    assert (first.uuid, first.disks) == (again.uuid, again.disks)
    record = json.loads((disk / "disk.json").read_text())
    assert record == {
        "format": 1,
        "cluster_id": "c1",
        "disk_uuid": first.disks[0].uuid.hex(),
        "node_uuid": first.uuid.hex(),
    }


def test_a_second_process_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    first = open_node(str(tmp_path / "node"), (str(tmp_path / "disk"),), "c1")
    assert refused(tmp_path / "node", [tmp_path / "disk"]).code == Code.CODE_BUSY
    assert refused(tmp_path / "other", [tmp_path / "disk"]).code == Code.CODE_BUSY
    first.close()
    open_node(str(tmp_path / "node"), (str(tmp_path / "disk"),), "c1").close()


def test_a_refused_start_leaves_no_lock(tmp_path: Path) -> None:
    open_node(str(tmp_path / "a"), (str(tmp_path / "disk"),), "c1").close()
    assert refused(tmp_path / "b", [tmp_path / "mine", tmp_path / "disk"]).code == Code.CODE_EXISTS
    open_node(str(tmp_path / "b"), (str(tmp_path / "mine"),), "c1").close()


def test_a_disk_of_another_node_or_cluster_is_refused(tmp_path: Path) -> None:
    open_node(str(tmp_path / "a"), (str(tmp_path / "disk"),), "c1").close()
    assert refused(tmp_path / "b", [tmp_path / "disk"]).code == Code.CODE_EXISTS
    assert refused(tmp_path / "new", [tmp_path / "disk"], "c2").code == Code.CODE_WRONG_CLUSTER
    assert refused(tmp_path / "a", [tmp_path / "disk2"], "c2").code == Code.CODE_WRONG_CLUSTER


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "cluster_id": "c1", "disk_uuid": "xy"}'])
def test_a_damaged_record_is_refused_and_not_replaced(tmp_path: Path, text: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "disk.json").write_text(text)
    error = refused(tmp_path / "node", [disk])
    assert error.code in (Code.CODE_INVALID_ARGUMENT, Code.CODE_NOT_SUPPORTED)
    assert "disk.json" in error.message
    assert (disk / "disk.json").read_text() == text


def test_a_record_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "disk.json").write_text('{"format": 2}')
    assert refused(tmp_path / "node", [disk]).code == Code.CODE_NOT_SUPPORTED


def test_targets_without_a_record_are_not_adopted(tmp_path: Path) -> None:
    (tmp_path / "disk" / "targets").mkdir(parents=True)
    assert refused(tmp_path / "node", [tmp_path / "disk"]).code == Code.CODE_INVALID_ARGUMENT


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert refused(tmp_path / "node", [tmp_path / "file"]).code == Code.CODE_ACCESS


def test_a_copied_disk_is_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    open_node(str(tmp_path / "node"), (str(one),), "c1").close()
    two.mkdir()
    (two / "disk.json").write_text((one / "disk.json").read_text())
    assert refused(tmp_path / "node", [one, two]).code == Code.CODE_EXISTS


def test_every_start_has_a_greater_life_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = []
    for now_ns in (10**18, 10**18 + 5, 10**17, 0):
        monkeypatch.setattr("time.time_ns", lambda now_ns=now_ns: now_ns)
        node = open_node(str(tmp_path / "node"), (str(tmp_path / "disk"),), "c1")
        lives.append(node.life)
        node.close()
    assert lives == [10**18, 10**18 + 5, 10**18 + 6, 10**18 + 7]
    (tmp_path / "node" / "life.json").write_text('{"life": "many"}')
    with pytest.raises(Fs3Error, match="is damaged: remove it"):
        open_node(str(tmp_path / "node"), (str(tmp_path / "disk"),), "c1")
