"""`fs3 kv`, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from tests.cluster.command import COMMAND_S, fs3_command


@pytest.fixture
def namespace(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the module's cluster the default one; a namespace on it."""
    monkeypatch.setenv("FS3_CLUSTER", str(shared_cluster.directory))
    name = f"/kv-{os.urandom(4).hex()}"
    fs3_command("kv", "create", name, "--capacity", "64MiB", "--ttl", "1h")
    return name


def test_values_are_put_listed_got_and_evicted(namespace: str, tmp_path: Path) -> None:
    value = os.urandom(3 << 20)
    (tmp_path / "value").write_bytes(value)
    fs3_command("kv", "put", namespace, "model/a", str(tmp_path / "value"))
    put = [sys.executable, "-m", "fs3", "kv", "put", namespace, "ff0a", "--hex"]
    subprocess.run(put, input=b"from a pipe", timeout=COMMAND_S, check=True)
    listed = {entry["key"]: entry for entry in json.loads(fs3_command("kv", "ls", namespace, "--json").stdout)}
    assert {key: (e["hex"], e["bytes"]) for key, e in listed.items()} == {
        "model/a": (b"model/a".hex(), len(value)),
        "\\xff\\x0a": ("ff0a", 11),
    }
    assert "model/a" in fs3_command("kv", "ls", namespace, "--prefix", "model/").stdout
    assert "more than these 1" in fs3_command("kv", "ls", namespace, "--limit", "1").stderr

    fs3_command("kv", "get", namespace, "model/a", "-o", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == value
    assert fs3_command("kv", "get", namespace, "ff0a", "--hex").stdout == "from a pipe"
    assert fs3_command("kv", "get", namespace, "model/a", "--version", "2", check=False).returncode == 1

    (found,) = json.loads(fs3_command("kv", "stat", namespace, "--json").stdout)
    assert (found["path"], found["capacity"], found["ttl"], found["replicas"]) == (namespace, 64 << 20, 3600.0, 1)
    assert found["bytes"] >= len(value) + 11
    assert found["puts"] >= 2
    assert namespace in fs3_command("kv", "stat").stdout

    fs3_command("kv", "evict", namespace, "--key", "model/a")
    assert fs3_command("kv", "evict", namespace, "--key", "model/a", check=False).returncode == 1
    assert json.loads(fs3_command("kv", "evict", namespace, "--all", "--json").stdout) == {"entries": 1, "bytes": 11}
    assert json.loads(fs3_command("kv", "ls", namespace, "--json").stdout) == []


def test_settings_are_changed_and_shown(namespace: str) -> None:
    fs3_command("kv", "set", namespace, "--capacity", "none", "--ttl", "30m")
    (found,) = json.loads(fs3_command("kv", "stat", namespace, "--json").stdout)
    assert (found["capacity"], found["ttl"]) == (None, 1800.0)
    # What a namespace has may be asked for again.
    fs3_command("kv", "create", namespace, "--ttl", "30m")


def test_what_is_not_there_or_makes_no_sense_is_refused_in_one_line(namespace: str, tmp_path: Path) -> None:
    fs3_command("mkdir", f"{namespace}-directory")
    for arguments, word in [
        (["stat", f"{namespace}-absent"], "absent"),
        (["get", f"{namespace}-directory", "key"], "directory"),
        (["get", namespace, "key"], "no value for key"),
        (["get", namespace, "0g", "--hex"], "not hexadecimal"),
        (["create", namespace, "--replicas", "2"], "other settings"),
        (["create", f"{namespace}-new", "--capacity", "much"], "64MiB"),
        (["set", namespace], "--capacity"),
        (["evict", namespace], "--all"),
        (["evict", namespace, "--all", "--percent", "5"], "--all"),
    ]:
        result = fs3_command("kv", *arguments, check=False)
        assert result.returncode == 1, arguments
        assert word in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert fs3_command("kv", "put", namespace, "key", str(tmp_path / "absent"), check=False).returncode == 2
