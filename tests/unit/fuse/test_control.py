from __future__ import annotations

import importlib.util
import os
import socket
from pathlib import Path

import pytest

from fs3.core.config import RdmaOptions
from fs3.core.errors import Fs3Error
from fs3.fuse import MountOptions, control, mount, serve, umount
from fs3.fuse.table import default_file, mounted_at
from fs3.v1.frame_pb2 import Code

CAN_MOUNT = os.path.exists("/dev/fuse") and importlib.util.find_spec("fs3._native") is not None


@pytest.fixture(autouse=True)
def run_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv("FS3_RUN_DIR", str(directory))
    return directory


def test_the_mountpoint_must_be_a_directory_that_exists(tmp_path: Path) -> None:
    with pytest.raises(Fs3Error) as missing:
        control.check_mountpoint(str(tmp_path / "none"))
    assert missing.value.code == Code.CODE_NOT_FOUND
    assert "mkdir -p" in missing.value.message
    (tmp_path / "file").touch()
    with pytest.raises(Fs3Error) as file:
        control.check_mountpoint(str(tmp_path / "file"))
    assert file.value.code == Code.CODE_NOT_DIRECTORY


def test_a_directory_that_is_not_empty_is_fine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert control.check_mountpoint(str(tmp_path)) == os.path.realpath(tmp_path)


def test_a_missing_fuse_device_says_what_to_do() -> None:
    with pytest.raises(Fs3Error) as caught:
        control.check_device("/dev/fuse-that-is-not-there")
    assert "modprobe fuse" in caught.value.message


def test_unmounting_what_is_not_mounted_or_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Fs3Error) as nothing:
        umount(str(tmp_path))
    assert nothing.value.code == Code.CODE_NOT_FOUND
    with pytest.raises(Fs3Error) as other:
        umount("/")
    assert other.value.code == Code.CODE_INVALID_ARGUMENT


def test_parameters_survive_the_way_to_the_daemon_and_do_not_show_the_token() -> None:
    parameters = serve.Parameters(
        metas=["a:1"],
        source="fs3://a:1/",
        mountpoint="/m",
        pid_file="/p",
        log_file="/l",
        token="geheim",
        options=MountOptions(read_only=True, threads=3, rdma=RdmaOptions(devices=("a",), gid_index=1)),
    )
    assert serve.Parameters.from_json(parameters.to_json()) == parameters
    assert "geheim" not in repr(parameters)
    assert "geheim" not in str(parameters.shown())


def test_a_directory_is_named_once_and_the_token_found_where_it_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(Fs3Error) as twice:
        mount("fs3://a:1/data", str(tmp_path), options=MountOptions(subdir="data"))
    assert "give one of them" in twice.value.message
    with pytest.raises(Fs3Error) as absent:
        mount("fs3://a:1/", str(tmp_path), options=MountOptions(token_file=str(tmp_path / "token")))
    assert absent.value.code == Code.CODE_ACCESS


def test_a_service_manager_is_told_what_it_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve.notify("READY=1")  # nobody asked
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(10)
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        serve.notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    serve.notify("STOPPING=1")  # it has gone


@pytest.mark.skipif(not CAN_MOUNT, reason="needs /dev/fuse and the native module")
def test_a_cluster_that_is_not_there_is_one_clear_error_and_leaves_nothing(tmp_path: Path, run_dir: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        point = tmp_path / "mnt"
        point.mkdir()
        with pytest.raises(Fs3Error) as caught:
            mount(f"fs3://127.0.0.1:{port}/", str(point), options=MountOptions(op_timeout_s=1))
    assert "\n" not in caught.value.message
    assert mounted_at(str(point)) is None
    assert not default_file(str(point), ".pid").exists()
    assert default_file(str(point), ".log").parent == run_dir


def test_a_daemon_that_ends_without_a_word_is_reported_with_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(control, "check_device", lambda: None)
    monkeypatch.setattr(control.sys, "executable", "/bin/false")
    with pytest.raises(Fs3Error) as caught:
        mount("fs3://127.0.0.1:1/", str(tmp_path))
    assert caught.value.code == Code.CODE_UNAVAILABLE
    assert "(log: " in caught.value.message
