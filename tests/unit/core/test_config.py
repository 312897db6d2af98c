"""Configuration files, flags and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs3.core.config import MetaConfig, MgmtdConfig, RdmaOptions, StorageConfig, load, parse_rdma
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


STORAGE = 'cluster_id = "c"\nmgmtd = ["a:1"]\ndata_dir = "/d"\ndisks = ["/d/1"]\n'


def test_the_table_rdma_of_a_storage_service_changes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "storage.toml"
    path.write_text(STORAGE + '[rdma]\ndevices = ["mlx5_0"]\ngid_index = 3\nregistered_bytes_max = "1GiB"\n')
    assert load(StorageConfig, path).rdma == RdmaOptions(devices=("mlx5_0",), gid_index=3, registered_bytes_max=1 << 30)
    path.write_text(STORAGE)
    assert load(StorageConfig, path).rdma == RdmaOptions()
    assert load(StorageConfig, path, settings=["rdma={mtu = 1024}"]).rdma == RdmaOptions(mtu=1024)


def test_rdma_settings_of_a_command_line_change_what_they_name() -> None:
    assert parse_rdma([]) == RdmaOptions()
    assert parse_rdma(["devices=mlx5_0,mlx5_1", "traffic_class=106"]) == RdmaOptions(
        devices=("mlx5_0", "mlx5_1"), traffic_class=106
    )


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("mtu=9000", "mtu must be one of 256, 512, 1024, 2048, 4096 bytes, not 9000"),
        ("gid_index=256", "gid_index must be a whole number in 0..255"),
        ("gid_index=first", "gid_index in --rdma must be a whole number"),
        ("service_level=16", "0..15"),
        ("traffic_class=-1", "0..255"),
        ("pkey_index=65536", "0..65535"),
        ("ack_timeout=32", "0..31"),
        ("retry_count=8", "0..7"),
        ("registered_bytes_max=1MiB", "at least 64MiB"),
        ("devices=3", "a list of strings"),
        ("mut=1024", "did you mean 'mtu'?"),
        ("mtu", "write key=value"),
    ],
)
def test_wrong_rdma_settings_are_refused_with_what_is_allowed(tmp_path: Path, setting: str, part: str) -> None:
    with pytest.raises(Fs3Error) as found:
        parse_rdma([setting])
    assert part in found.value.message
    assert "\n" not in found.value.message
    path = tmp_path / "storage.toml"
    key, _, value = setting.partition("=")
    if value.lstrip("-").isdigit():
        path.write_text(f"{STORAGE}[rdma]\n{key} = {value}\n")
        message = refused(StorageConfig, path)
        assert part in message
        assert str(path) in message


def test_rdma_options_of_a_program_are_checked_too() -> None:
    assert RdmaOptions(devices=["a", "b"]).devices == ("a", "b")  # type: ignore[arg-type]
    for wrong in ({"devices": "mlx5_0"}, {"devices": [""]}, {"mtu": "4096"}, {"retry_count": True}):
        with pytest.raises(Fs3Error, match=next(iter(wrong))):
            RdmaOptions(**wrong)  # type: ignore[arg-type]
