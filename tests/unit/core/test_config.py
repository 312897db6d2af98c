"""Configuration files, flags and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs3.core.config import MetaConfig, MgmtdConfig, StorageConfig, load
from fs3.core.errors import Fs3Error


def refused(cls: type, path: Path | None = None, **kwargs: object) -> str:
    with pytest.raises(Fs3Error) as found:
        load(cls, path, **kwargs)  # type: ignore[arg-type]
    assert "\n" not in found.value.message
    return found.value.message


def test_defaults_need_only_what_has_no_default() -> None:
    config = load(MgmtdConfig, None, {"cluster_id": "c", "kv": "memory:"})
    assert (config.replicas, config.targets_per_disk, config.lease_ms, config.heartbeat_ms) == (3, 8, 6000, 1000)
    assert (config.host, config.grpc_port, config.log_level) == ("127.0.0.1", 0, "info")


def test_file_then_settings_then_flags(tmp_path: Path) -> None:
    path = tmp_path / "storage.toml"
    path.write_text(
        'cluster_id = "c"\nmgmtd = ["a:1", "b:2"]\ndata_dir = "/d"\ndisks = ["/d/1"]\nread_cache_bytes = "64MiB"\n'
    )
    config = load(StorageConfig, path, {"host": "h", "log_level": None}, ["frame_port=7", "disks=/x,/y"])
    assert config.mgmtd == ("a:1", "b:2")
    assert config.read_cache_bytes == 64 << 20
    assert (config.host, config.frame_port, config.log_level) == ("h", 7, "info")
    assert config.disks == ("/x", "/y")


def test_an_unknown_key_names_the_key_the_file_and_the_nearest_one(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text('cluster_id = "c"\nkv = "memory:"\nreplica = 3\n')
    message = refused(MgmtdConfig, path)
    assert "'replica'" in message
    assert str(path) in message
    assert "'replicas'" in message


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('replicas = "3"', "whole number"),
        ("replicas = true", "whole number"),
        ("replicas = 0", "at least 1"),
        ("host = 3", "a string"),
        ("lease_ms = 2000", "at least 4 * heartbeat_ms"),
        ('log_level = "loud"', "log_level"),
        ("grpc_port = 70000", "65535"),
        ("= 3", "not valid TOML"),
    ],
)
def test_wrong_values_are_refused_in_one_line(tmp_path: Path, line: str, part: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(f'cluster_id = "c"\nkv = "memory:"\n{line}\n')
    message = refused(MgmtdConfig, path)
    assert part in message
    assert str(path) in message


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    assert "kv is missing" in refused(MgmtdConfig, None, overrides={"cluster_id": "c"})
    assert "does not exist" in refused(MgmtdConfig, tmp_path / "none.toml")


@pytest.mark.parametrize("size", [1000, 32 << 10, 128 << 20, 3 << 20])
def test_a_chunk_size_is_a_power_of_two_in_range(size: int) -> None:
    base = {"cluster_id": "c", "kv": "memory:", "mgmtd": ["a:1"]}
    assert "chunk_bytes" in refused(MetaConfig, None, overrides={**base, "chunk_bytes": size})
    assert load(MetaConfig, None, {**base, "chunk_bytes": "4MiB"}).chunk_bytes == 4 << 20


def test_the_token_comes_from_the_value_the_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FS3_TOKEN", "env")
    base = {"cluster_id": "c", "kv": "memory:"}
    assert load(MgmtdConfig, None, base).secret() == "env"
    file = tmp_path / "token"
    file.write_text("from file\n")
    assert load(MgmtdConfig, None, {**base, "token_file": str(file)}).secret() == "from file"
    assert load(MgmtdConfig, None, {**base, "token_file": str(file), "token": "direct"}).secret() == "direct"
    file.write_text("\n")
    with pytest.raises(Fs3Error, match="is empty"):
        load(MgmtdConfig, None, {**base, "token_file": str(file)}).secret()
