"""Options of a mount, mount(8) and fstab, several mounts on one machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs3.core.errors import Fs3Error
from fs3.fuse import mount, umount
from fs3.fuse.table import mounted_at
from fs3.testing.cluster import ClusterSpec, LocalCluster
from fs3.testing.ports import lasting_ports
from fs3.testing.process import wait_until
from tests.cluster.command import fs3_command
from tests.cluster.conftest import QUICK, MakeCluster
from tests.cluster.mounts import mounted
from tests.cluster.test_mount_semantics import failure

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def whole(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mount of the whole cluster with the usual options."""
    with mounted(shared_cluster, tmp_path_factory.mktemp("mnt") / "whole") as path:
        yield path


@pytest.fixture
def directory(whole: Path, request: pytest.FixtureRequest) -> Path:
    """A fresh directory of the cluster, by the whole mount."""
    path = whole / request.node.name.replace("/", "_")[:100]
    path.mkdir()
    return path


def mode_of(path: Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


# A directory of the cluster as the root


def test_a_directory_of_the_cluster_is_mounted_as_if_there_were_nothing_else(
    shared_cluster: LocalCluster, whole: Path, directory: Path, tmp_path: Path
) -> None:
    (directory / "data" / "deep").mkdir(parents=True)
    (directory / "outside").write_text("not for everybody")
    (directory / "data" / "inside").write_text("for everybody")
    os.link(directory / "data" / "inside", directory / "also")
    part = f"{directory.name}/data"
    with mounted(shared_cluster, tmp_path / "part", f"subdir=/{part}/") as root:
        assert sorted(os.listdir(root)) == ["deep", "inside"]
        assert os.stat(root).st_ino == os.stat(root / "deep" / "..").st_ino == 1
        assert os.path.samefile(root / "..", tmp_path)
        (root / "deep" / "new").write_text("made here")
        assert (directory / "data" / "deep" / "new").read_text() == "made here"
        os.rename(root / "deep" / "new", root / "moved")
        os.link(root / "moved", root / "deep" / "twice")
        assert os.stat(root / "inside").st_nlink == os.stat(root / "moved").st_nlink == 2
        os.chmod(root, 0o750)
        wait_until(lambda: mode_of(directory / "data") == 0o750, timeout_s=PATIENCE_S, what="the mode to be seen")
        assert failure(os.rmdir, root) == errno.EBUSY
        listed = subprocess.run(["ls", "-fai", root], capture_output=True, text=True, check=True).stdout
        assert "1 ." in [" ".join(line.split()) for line in listed.splitlines()]
        os.statvfs(root)
        os.makedirs(root / "tree" / "below")
        os.symlink("tree/below", root / "3fs-virt" / "rm-rf" / "x")
        os.symlink("tree", root / "3fs-virt" / "rm-rf" / "x")
        os.symlink("..", root / "way-out")
        assert failure(os.symlink, "way-out/outside", root / "3fs-virt" / "rm-rf" / "x") == errno.ENOTDIR
        os.unlink(root / "way-out")
        assert (directory / "outside").exists()
        # It is the directory that is mounted, wherever it is.
        os.rename(directory / "data", directory / "elsewhere")
        assert sorted(os.listdir(root)) == ["deep", "inside", "moved"]
        (root / "inside").unlink()
        assert (directory / "also").read_text() == "for everybody"
        shutil.rmtree(directory / "elsewhere")

        def is_gone() -> bool:
            return failure(os.stat, root / "any") in (errno.ENOENT, errno.ESTALE) and failure(
                os.mkdir, root / "more"
            ) in (errno.ENOENT, errno.ESTALE)

        wait_until(is_gone, timeout_s=PATIENCE_S, what="the removed directory to be gone")


def test_the_url_names_the_directory_too_and_one_that_is_not_there_is_a_clear_error(
    shared_cluster: LocalCluster, directory: Path, tmp_path: Path
) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    (directory / "with space").mkdir()
    (directory / "with space" / "file").touch()
    os.symlink("with space", directory / "link")
    base = f"{shared_cluster.url.rstrip('/')}/{directory.name}"
    for path in ("with%20space", "link"):
        mount(f"{base}/{path}?token_file={shared_cluster.token_file}", str(point))
        try:
            assert os.listdir(point) == ["file"]
            there = mounted_at(str(point))
            assert there is not None
            assert there.source.startswith(f"{base}/{path}")
        finally:
            umount(str(point))
    for path, code in (("absent", errno.ENOENT), ("with%20space/file", errno.ENOTDIR)):
        with pytest.raises(Fs3Error) as refused:
            mount(f"{base}/{path}", str(point), token=shared_cluster.token)
        assert refused.value.errno == code
        assert path.replace("%20", " ") in refused.value.message
        assert mounted_at(str(point)) is None


# Caches


def test_a_strict_mount_sees_at_once_what_others_did(
    shared_cluster: LocalCluster, directory: Path, tmp_path: Path, engine: str
) -> None:
    with mounted(shared_cluster, tmp_path / "strict", "cache=strict", engine=engine) as mountpoint:
        here = mountpoint / directory.name
        for turn in range(20):
            name = f"file-{turn}"
            assert failure(os.stat, here / name) == errno.ENOENT
            (directory / name).write_bytes(b"first")
            assert (here / name).read_bytes() == b"first"
            reader = os.open(here / name, os.O_RDONLY)
            assert os.pread(reader, 100, 0) == b"first"
            (directory / name).write_bytes(b"again")
            assert os.pread(reader, 100, 0) == b"again"
            with (directory / name).open("ab") as file:
                file.write(b" and more")
            assert os.stat(here / name).st_size == 14
            assert os.pread(reader, 100, 0) == b"again and more"
            os.close(reader)
            os.chmod(directory / name, 0o604)
            assert mode_of(here / name) == 0o604
            os.rename(directory / name, directory / "renamed")
            assert os.listdir(here) == ["renamed"]
            assert failure(os.stat, here / name) == errno.ENOENT
            os.unlink(directory / "renamed")
            assert failure(os.stat, here / "renamed") == errno.ENOENT
        # Its own writes are kept and seen as on any mount.
        (here / "own").write_bytes(bytes(range(256)) * 4096)
        with (here / "own").open("r+b", buffering=0) as file:
            file.seek(5)
            file.write(b"written")
            assert os.pread(file.fileno(), 9, 4) == b"\x04written\x0c"
        assert (directory / "own").read_bytes()[:13] == b"\x00\x01\x02\x03\x04written\x0c"


def test_between_mounts_without_caches_a_read_sees_every_write_that_returned(
    shared_cluster: LocalCluster, directory: Path, tmp_path: Path, engine: str
) -> None:
    with (
        mounted(shared_cluster, tmp_path / "a", "cache=none", engine=engine) as a,
        mounted(shared_cluster, tmp_path / "b", "cache=none", engine=engine) as b,
    ):
        path = Path(directory.name) / "file"
        writer = os.open(a / path, os.O_RDWR | os.O_CREAT)
        reader = os.open(b / path, os.O_RDONLY)
        try:
            expected = b""
            for turn in range(20):
                piece = b"%03d" % turn * (turn * 1000 + 10)
                assert os.write(writer, piece) == len(piece)
                expected += piece
                assert os.pread(reader, len(piece), len(expected) - len(piece)) == piece
                assert os.fstat(reader).st_size == os.stat(b / path).st_size == len(expected)
                os.pwrite(writer, b"%010d" % turn, 0)
                expected = b"%010d" % turn + expected[10:]
                assert os.pread(reader, 10, 0) == expected[:10]
            assert (directory / "file").read_bytes() == (b / path).read_bytes() == expected
        finally:
            os.close(writer)
            os.close(reader)


# Users and groups


@ROOT_ONLY
def test_one_id_for_all_owns_and_does_everything(shared_cluster: LocalCluster, directory: Path, tmp_path: Path) -> None:
    os.chmod(directory, 0o777)
    (directory / "of-root").write_text("x")
    with mounted(shared_cluster, tmp_path / "one", "uid=4321,gid=1234,allow_other") as mountpoint:
        here = mountpoint / directory.name
        shown = os.stat(here / "of-root")
        assert (shown.st_uid, shown.st_gid) == (4321, 1234)
        (here / "new").write_text("x")
        made = os.stat(directory / "new")
        assert (made.st_uid, made.st_gid) == (4321, 1234)
        # In the cluster it is not root that asks.
        assert failure(os.chmod, here / "of-root", 0o600) == errno.EPERM
        os.chmod(here / "new", 0o600)
        os.chown(here / "new", 4321, 1234)
        assert failure(os.chown, here / "new", 0, -1) == errno.EINVAL


@ROOT_ONLY
def test_mapped_ids_are_translated_in_both_directions_and_others_are_nobody(
    shared_cluster: LocalCluster, directory: Path, tmp_path: Path
) -> None:
    os.chmod(directory, 0o777)
    for name, owner in (("root", 0), ("first", 500), ("last", 509), ("other", 510)):
        (directory / name).write_text("x")
        os.chown(directory / name, owner, owner)
    options = "uidmap=0:500:1/2000:501:9,gidmap=0:500:1/2000:501:9,allow_other"
    with mounted(shared_cluster, tmp_path / "mapped", options) as mountpoint:
        here = mountpoint / directory.name
        owners = {name: (os.stat(here / name).st_uid, os.stat(here / name).st_gid) for name in os.listdir(here)}
        assert owners == {"root": (65534,) * 2, "first": (0, 0), "last": (2008, 2008), "other": (65534,) * 2}
        (here / "new").write_text("x")
        assert os.stat(directory / "new").st_uid == os.stat(directory / "new").st_gid == 500
        assert failure(os.chmod, here / "root", 0o600) == errno.EPERM
        os.chmod(here / "first", 0o600)
        for owner in (1, 1999, 2009, 65534):
            assert failure(os.chown, here / "first", owner, -1) == errno.EINVAL
            assert failure(os.chown, here / "first", -1, owner) == errno.EINVAL
        # User 500 of the cluster is no superuser there, whoever it is here.
        assert failure(os.chown, here / "first", 2000, -1) == errno.EPERM
        no_list = bytes.fromhex("0200000001000600ffffffff04000400ffffffff20000400ffffffff")
        assert failure(os.setxattr, here / "first", "system.posix_acl_access", no_list) == errno.EOPNOTSUPP
        os.setxattr(here / "first", "user.kept", b"1")
        assert os.listxattr(here / "first") == ["user.kept"]
    with mounted(shared_cluster, tmp_path / "root", "uidmap=0:0:1000,gidmap=0:0:1000") as mountpoint:
        os.chown(mountpoint / directory.name / "first", 700, 701)
        wait_until(
            lambda: (os.stat(directory / "first").st_uid, os.stat(directory / "first").st_gid) == (700, 701),
            timeout_s=PATIENCE_S,
            what="the new owner to be seen",
        )


# Programs and services around a mount


def test_several_mounts_of_several_clusters_live_side_by_side(
    shared_cluster: LocalCluster, whole: Path, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    other = make_cluster(ClusterSpec(**{**vars(QUICK), "storage": 1, "replicas": 1}), name="other")
    with mounted(other, tmp_path / "first") as first:
        with mounted(other, tmp_path / "second") as second:
            (first / "of-the-other").write_text("x")
            assert (second / "of-the-other").exists()
            assert not (whole / "of-the-other").exists()
        assert mounted_at(str(second)) is None
        assert (first / "of-the-other").read_text() == "x"
    assert mounted_at(str(first)) is None
    assert os.path.isdir(whole)


def test_a_mount_in_the_foreground_says_when_it_can_be_used(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    point = tmp_path / "mnt"
    point.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(PATIENCE_S)
        command = [sys.executable, "-m", "fs3", "mount", "--foreground", "--cluster", shared_cluster.directory, point]
        environment = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{shared_cluster.url} is mounted on {point}\n"
            assert manager.recv(100) == b"READY=1"
            (point / "file").write_text("written in the foreground")
            process.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert process.wait(timeout=PATIENCE_S) == 0
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    assert mounted_at(str(point)) is None


def test_a_mount_tells_what_it_did_and_how_it_is_mounted(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    with mounted(shared_cluster, tmp_path / "told", "max_memory=32MiB,noatime") as mountpoint:
        (mountpoint / "told").write_bytes(b"x" * 3000)
        with (mountpoint / "told").open("rb") as reader:
            assert reader.read() == b"x" * 3000
            stats = json.loads((mountpoint / "3fs-virt" / "stats").read_text())
            assert (stats["bytes_written"], stats["bytes_read"], stats["open_files"]) == (3000, 3000, 1)
            assert stats["operations"]["create"]["count"] == stats["operations"]["open"]["count"] == 1
            assert 0 < stats["operations"]["create"]["max_s"] <= stats["operations"]["create"]["total_s"]
            assert stats["max_memory_bytes"] == 32 << 20
        printed = json.loads(fs3_command("stats", str(mountpoint), "--json").stdout)
        assert printed.keys() == stats.keys()
        shown = fs3_command("stats", str(mountpoint)).stdout
        assert "2.9 KiB" in shown
        assert any(line.startswith("create") for line in shown.splitlines())
        config = (mountpoint / "3fs-virt" / "config").read_text()
        assert shared_cluster.token not in config
        told = json.loads(config)
        assert (told["max_memory_bytes"], told["noatime"], told["cache"]) == (32 << 20, True, "auto")
    assert "no mount of fs3" in fs3_command("stats", str(tmp_path), check=False).stderr


def test_counters_are_served_where_the_options_say(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    [port] = lasting_ports(1)
    with mounted(shared_cluster, tmp_path / "counted", f"metrics_port={port}") as mountpoint:
        (mountpoint / "counted").write_bytes(b"x" * 5000)
        assert (mountpoint / "counted").read_bytes() == b"x" * 5000
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            lines = answer.read().decode().splitlines()
        where = f'mountpoint="{mountpoint}"'
        assert f"fs3_mount_bytes_written_total{{{where}}} 5000" in lines
        assert f'fs3_mount_requests_total{{{where},operation="create"}} 1' in lines
        with (
            pytest.raises(Fs3Error, match="in use"),
            mounted(shared_cluster, tmp_path / "again", f"metrics_port={port}"),
        ):
            pass
        assert mounted_at(str(tmp_path / "again")) is None


IN_A_NAMESPACE = """
set -euo pipefail
trap 'umount {mnt} 2>/dev/null || true' EXIT
mount --bind {sbin} $(readlink -f /sbin)
mount -t fuse.fs3 {url} {mnt} -o ro,allow_other,token_file={token}
cat {mnt}/greeting
findmnt -no SOURCE,FSTYPE {mnt}
! touch {mnt}/x 2>/dev/null
umount {mnt}
mount -t fs3 {url} {mnt} -o noexec,token_file={token},_netdev,x-systemd.automount,nofail
echo more > {mnt}/more
mount -o remount,ro {mnt}
! touch {mnt}/x 2>/dev/null
findmnt -no OPTIONS {mnt}
mount -o remount,rw {mnt}
rm {mnt}/more
umount {mnt}
mount -a -T {fstab}
mount -a -T {fstab}
grep -c " {mnt} fuse.fs3 " /proc/mounts
ls {mnt}
umount {mnt}
mount -T {fstab} {mnt}
test -e {mnt}/inside
umount {mnt}
mount -t fs3 {url}/absent {mnt} -o token_file={token} || echo status $?
"""


@ROOT_ONLY
def test_mount_8_and_fstab_know_the_file_system(
    shared_cluster: LocalCluster, whole: Path, directory: Path, tmp_path: Path
) -> None:
    (whole / "greeting").write_text("hello\n")
    (directory / "inside").touch()
    point, sbin, fstab = tmp_path / "mnt", tmp_path / "sbin", tmp_path / "fstab"
    for made in (point, sbin):
        made.mkdir()
    for name in ("mount.fs3", "mount.fuse.fs3"):
        (sbin / name).symlink_to(Path(sys.executable).parent / "mount.fs3")
    token, url = shared_cluster.token_file, shared_cluster.url.rstrip("/")
    part = f"{url}/{directory.name}"
    fstab.write_text(
        f"{part} {point} fs3 rw,_netdev,nofail,x-systemd.automount,token_file={token} 0 0\n"
        f"{part} {tmp_path}/never fs3 noauto 0 0\n"
    )
    script = IN_A_NAMESPACE.format(sbin=sbin, url=url, mnt=point, token=token, fstab=fstab)
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "FS3_RUN_DIR": str(tmp_path / "run")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    greeting, kind, options, once, listed, status = done.stdout.splitlines()
    assert greeting == "hello"
    assert kind.split() == [url, "fuse.fs3"]
    assert {"ro", "noexec", "nosuid", "nodev"} <= set(options.split(","))
    assert (once, listed, status) == ("1", "inside", "status 32")
    assert "no directory" in done.stderr
    assert mounted_at(str(point)) is None
