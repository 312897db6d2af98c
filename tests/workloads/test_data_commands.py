"""`fs3 data`: packing from this machine and within the cluster, indexes, verification."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fs3
from fs3.client import FileSystem, transfer
from fs3.data import RecordDataset, open_dataset
from fs3.testing.cluster import LocalCluster
from tests.cluster.command import fs3_command
from tests.unit.data.shards import write_tar

DEADLINE_S = 60


@pytest.fixture
def fs(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileSystem]:
    """A connection; commands find the cluster, too."""
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as connected:
        yield connected


def test_a_tree_is_packed_read_and_verified(fs: FileSystem, tmp_path: Path) -> None:
    files = {f"{n % 3}/{n}.bin": bytes([n]) * (n * 977) for n in range(60)}
    for name, content in files.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    pack = ("data", "pack", str(tmp_path / "tree"), ":/packed", "--shard-size", "300KiB", "--json")
    done = json.loads(fs3_command(*pack).stdout)
    assert (done["records"], done["skipped"], done["shards"]) == (60, 0, done["shards_total"])
    assert json.loads(fs3_command(*pack).stdout)["skipped"] == done["shards"]
    with RecordDataset("/packed", fs=fs, format="bytes", keys=True) as dataset:
        assert {sample["__key__"]: sample["data"] for sample in dataset} == files
    info = json.loads(fs3_command("data", "info", ":/packed", "--json").stdout)
    assert (info["kind"], info["samples"], info["keys"]) == ("RecordDataset", 60, True)
    assert "part-00000-of-0000" in fs3_command("data", "info", ":/packed").stdout
    assert fs3_command("data", "verify", ":/packed").stderr == "60 samples read, 0 problems\n"
    path = "/packed/" + fs.listdir("/packed")[1]
    with fs.open(path, "r+b", buffering=0) as file:
        file.pwrite(b"\xff\xff", 4096)
    damaged = fs3_command("data", "verify", ":/packed", check=False)
    assert damaged.returncode == 1
    assert damaged.stdout.startswith(f"{path}: sample 0: record 0 is damaged")
    fs.remove(path)
    assert "is missing: run `fs3 data pack` again" in fs3_command("data", "info", ":/packed", check=False).stderr
    assert json.loads(fs3_command(*pack).stdout)["skipped"] == done["shards"] - 1
    assert fs3_command("data", "verify", ":/packed").returncode == 0


def test_tar_shards_are_indexed_and_packed_within_the_cluster(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for shard in range(3):
        members = [(f"{n}.{field}", b"%d" % (n * 3 + shard)) for n in range(40) for field in ("txt", "cls")]
        write_tar(tmp_path / "tars" / f"{shard}.tar", members)
    transfer.upload(fs, tmp_path / "tars", "/tars")
    assert json.loads(fs3_command("data", "index", ":/tars", "--json").stdout) == {
        "shards": 3,
        "indexed": [f"/tars/{n}.tar" for n in range(3)],
    }
    assert fs3_command("data", "index", ":/tars").stderr == "0 of 3 shards indexed; the others were\n"
    fs3_command("data", "pack", ":/tars/*.tar", ":/tars-packed", "-q")
    with (
        open_dataset("/tars", fs=fs, format="bytes") as tars,
        open_dataset("/tars-packed", fs=fs, format="bytes") as packed,
    ):
        assert list(packed) == list(tars)
        assert packed[41] == {"txt": b"4", "cls": b"4"}


def test_packing_that_was_killed_goes_on(fs: FileSystem, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(f'{{"n": {n}, "pad": "{"x" * 1000}"}}\n' for n in range(20_000)))
    arguments = ("data", "pack", str(lines), ":/lines", "--shard-size", "256KiB", "-j", "2", "--json")
    command = subprocess.Popen([sys.executable, "-m", "fs3", *arguments], stdout=subprocess.DEVNULL)
    try:
        ends_s = time.monotonic() + DEADLINE_S
        while not (fs.isdir("/lines") and any(name.startswith("part") for name in fs.listdir("/lines"))):
            assert command.poll() is None
            assert time.monotonic() < ends_s
            time.sleep(0.005)
    finally:
        command.send_signal(signal.SIGKILL)
        command.wait()
    with pytest.raises(OSError, match="is missing"):
        RecordDataset("/lines", fs=fs)
    done = json.loads(fs3_command(*arguments).stdout)
    assert 0 < done["skipped"] < done["shards"]
    with RecordDataset("/lines", fs=fs, format="bytes") as dataset:
        assert [json.loads(record)["n"] for record in dataset.__getitems__(range(20_000))] == list(range(20_000))
    assert not any(name.startswith(".") for name in fs.listdir("/lines"))


def test_wrong_use_is_one_line_of_help(fs: FileSystem, tmp_path: Path) -> None:
    (tmp_path / "x.bin").touch()
    for arguments, word in [
        (("pack", str(tmp_path / "none"), ":/p"), "none: it does not exist"),
        (("pack", str(tmp_path / "x.bin"), ":/p", "--shard-size", "many"), "many"),
        (("info", ":/none.fs3r"), "none.fs3r"),
        (("verify", str(tmp_path / "x.bin")), "its name should end in .fs3r"),
        (("index", str(tmp_path)), "has no shard (.tar)"),
        (("info", ":/a.tar", "b.tar"), "all be local, or all on the same cluster"),
    ]:
        result = fs3_command("data", *arguments, check=False)
        assert result.returncode == 1
        assert word in result.stderr
        assert len(result.stderr.splitlines()) == 1
