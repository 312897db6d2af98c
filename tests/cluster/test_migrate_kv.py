"""`fs3 admin migrate-kv` on a real cluster, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import fs3
from fs3.testing.cluster import LocalCluster
from tests.cluster.command import fs3_command as run


def test_a_cluster_goes_on_with_all_data_in_another_store(cluster: LocalCluster, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        fs.makedirs("/a/b")
        with fs.open("/a/b/file", "wb") as file:
            file.write(data)
        for i in range(50):
            fs.symlink("b/file", f"/a/link{i}")
    old, new = f"lmdb:{cluster.directory / 'kv'}?durable=0", f"lmdb:{tmp_path / 'new'}"

    refused = run("admin", "migrate-kv", "--from", old, "--to", new, check=False)
    assert refused.returncode == 1
    assert "in use: stop all managers" in refused.stderr

    cluster.down()
    done = json.loads(run("admin", "migrate-kv", "--from", old, "--to", new, "--json").stdout)
    assert done["verified"]
    assert not done["resumed"]
    assert done["records"] > 100

    again = run("admin", "migrate-kv", "--from", old, "--to", new, check=False)
    assert again.returncode == 1
    assert "not empty" in again.stderr

    settings = cluster.directory / "cluster.toml"
    settings.write_text(settings.read_text().replace('kv = ""', f'kv = "{new}"'))
    (cluster.directory / "kv").rename(tmp_path / "old")
    moved = LocalCluster(cluster.directory)
    moved.up()
    assert not (cluster.directory / "kv").exists()
    with fs3.connect(moved.url, token=moved.token) as fs:
        assert len(fs.listdir("/a")) == 51
        with fs.open("/a/link7", "rb") as file:
            assert file.read() == data
        with fs.open("/a/new", "wb") as file:
            file.write(b"written after the move")


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("lmdb:/nowhere", "memory:", "/nowhere holds no key-value store"),
        ("memory:", "memory:", "is empty"),
        ("redis:", "memory:", "not a store URL"),
    ],
)
def test_refusals_are_one_line(source: str, target: str, words: str) -> None:
    refused = run("admin", "migrate-kv", "--from", source, "--to", target, check=False)
    assert refused.returncode == 1
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
