"""Extended attributes and access control lists at a mount, by system calls, commands and the Python client."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fs3
from fs3.meta import acl
from fs3.meta.acl import GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry
from fs3.testing.cluster import LocalCluster
from tests.cluster.mounts import directory_of_all, mounted

# Version 2, cap_net_raw permitted and effective, as the kernel keeps it.
NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
NOBODY = 65534
ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"
# user::rwx user:nobody:rwx group::r-x mask::rwx other::---
SHARED = [
    Entry(USER_OBJ, 7),
    Entry(USER, 7, NOBODY),
    Entry(GROUP_OBJ, 5),
    Entry(MASK, 7),
    Entry(OTHER, 0),
]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def mountpoint(shared_cluster: LocalCluster, engine: str) -> Iterator[Path]:
    options = "allow_other" if os.geteuid() == 0 else ""
    with directory_of_all() as base, mounted(shared_cluster, base / "m", options, engine=engine) as path:
        path.chmod(0o755)
        yield path


@pytest.fixture
def directory(mountpoint: Path, request: pytest.FixtureRequest) -> Path:
    """A fresh directory on the mount."""
    path = mountpoint / request.node.name.replace("/", "_")[:100]
    path.mkdir()
    return path


def failure(call: Callable[..., object], *arguments: object, uid: int | None = None) -> int:
    """The errno that a call fails with, as user `uid` in a child; 0 if it succeeds."""
    if uid is None:
        try:
            call(*arguments)
        except OSError as exc:
            return exc.errno or 255
        return 0
    child = os.fork()
    if child == 0:
        status = 255
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            status = failure(call, *arguments)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_attributes_of_files_and_directories_are_kept_for_every_client(
    directory: Path, mountpoint: Path, shared_cluster: LocalCluster
) -> None:
    path = directory / "f"
    path.write_bytes(b"data")
    for target in (path, directory):
        os.setxattr(target, "user.comment", b"hello")
        os.setxattr(target, "user.large", bytes(65536), os.XATTR_CREATE)
        assert os.getxattr(target, "user.comment") == b"hello"
        assert sorted(os.listxattr(target)) == ["user.comment", "user.large"]
    ctime_ns = path.stat().st_ctime_ns
    os.removexattr(path, "user.large")
    assert os.listxattr(path) == ["user.comment"]
    assert path.stat().st_ctime_ns > ctime_ns
    assert path.read_bytes() == b"data"
    name = "/" + str(path.relative_to(mountpoint))
    with fs3.connect(shared_cluster.url, shared_cluster.token) as fs:
        assert fs.listxattr(name) == ["user.comment"]
        assert fs.getxattr(name, b"user.comment") == b"hello"
        fs.setxattr(name, "user.other", bytearray(b"1"), os.XATTR_CREATE)
        assert failure(fs.setxattr, name, "user.other", b"2", os.XATTR_CREATE) == errno.EEXIST
        assert failure(fs.setxattr, name, "user.other", b"2", 77) == errno.EINVAL
        fs.removexattr(name, "user.comment")
        assert failure(fs.getxattr, name, "user.comment") == errno.ENODATA

    async def asynchronous() -> None:
        async with await fs3.connect_async(shared_cluster.url, shared_cluster.token) as fs:
            await fs.setxattr(name, "user.async", b"3")
            assert await fs.getxattr(name, "user.async") == b"3"
            assert await fs.listxattr(name) == ["user.async", "user.other"]
            await fs.removexattr(name, "user.async")

    asyncio.run(asynchronous())


def test_errors_have_the_errno_of_a_local_file_system(directory: Path) -> None:
    path = directory / "f"
    path.touch()
    os.symlink("f", directory / "s")
    assert failure(os.getxattr, path, "user.none") == errno.ENODATA
    assert failure(os.removexattr, path, "user.none") == errno.ENODATA
    assert failure(os.setxattr, path, "user.none", b"", os.XATTR_REPLACE) == errno.ENODATA
    assert failure(os.setxattr, path, "unknown.name", b"") == errno.EOPNOTSUPP
    assert failure(os.setxattr, path, "user." + "n" * 251, b"") == errno.ERANGE
    assert failure(os.setxattr, path, "user.value", bytes(65537)) == errno.E2BIG
    assert failure(lambda: os.setxattr(directory / "s", "user.a", b"", follow_symlinks=False)) == errno.EPERM
    os.setxattr(directory / "s", "user.a", b"through")
    assert os.getxattr(path, "user.a") == b"through"
    assert failure(os.setxattr, path, "user.a", b"", os.XATTR_CREATE) == errno.EEXIST


@as_root
def test_permissions_are_those_of_linux(directory: Path) -> None:
    path = directory / "f"
    path.touch(mode=0o644)
    os.setxattr(path, "user.a", b"1")
    os.setxattr(path, "trusted.a", b"2")
    assert failure(os.getxattr, path, "user.a", uid=NOBODY) == 0
    assert failure(os.setxattr, path, "user.a", b"x", uid=NOBODY) == errno.EACCES
    assert failure(os.getxattr, path, "trusted.a", uid=NOBODY) == errno.ENODATA
    assert failure(os.setxattr, path, "trusted.a", b"x", uid=NOBODY) == errno.EPERM
    path.chmod(0o600)
    assert failure(os.getxattr, path, "user.a", uid=NOBODY) == errno.EACCES
    path.chmod(0o666)
    assert failure(os.setxattr, path, "user.a", b"x", uid=NOBODY) == 0
    directory.chmod(0o1777)
    assert failure(os.setxattr, directory, "user.a", b"x", uid=NOBODY) == errno.EPERM
    directory.chmod(0o777)
    assert failure(os.setxattr, directory, "user.a", b"x", uid=NOBODY) == 0


def write(path: Path) -> None:
    """Write through a descriptor, without truncating."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, b"written")
    finally:
        os.close(fd)


@as_root
def test_a_write_takes_capabilities_away_and_none_takes_others(directory: Path) -> None:
    path = directory / "program"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    os.write(fd, b"program")
    os.setxattr(path, "security.capability", NET_RAW)
    os.setxattr(path, "user.a", b"kept")
    os.close(fd)
    # What was written before it was set has no effect on it.
    assert os.getxattr(path, "security.capability") == NET_RAW
    write(path)
    assert os.listxattr(path) == ["user.a"]
    os.setxattr(path, "security.capability", NET_RAW)
    os.chown(path, 1, 1)
    assert os.listxattr(path) == ["user.a"]


@as_root
@pytest.mark.parametrize(("mode", "left"), [(0o6777, 0o777), (0o4767, 0o767)])
def test_a_write_by_another_user_takes_set_id_bits_away(directory: Path, mode: int, left: int) -> None:
    path = directory / "program"
    path.touch()
    path.chmod(mode)
    write(path)
    assert path.stat().st_mode & 0o7777 == mode
    assert failure(write, path, uid=NOBODY) == 0
    assert path.stat().st_mode & 0o7777 == left
    # Also while it is open, and when the bits come back.
    with path.open("r+b", buffering=0):
        path.chmod(mode)
        assert failure(write, path, uid=NOBODY) == 0
        assert path.stat().st_mode & 0o7777 == left


def make_longer(path: Path) -> None:
    """Allocate through a descriptor."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.posix_fallocate(fd, 0, 8192)
    finally:
        os.close(fd)


@as_root
def test_an_allocation_by_another_user_takes_set_id_bits_away(directory: Path) -> None:
    path = directory / "program"
    path.touch()
    path.chmod(0o6777)
    make_longer(path)
    assert path.stat().st_mode & 0o7777 == 0o6777
    assert failure(make_longer, path, uid=NOBODY) == 0
    assert (path.stat().st_mode & 0o7777, path.stat().st_size) == (0o777, 8192)


def test_copies_keep_attributes(directory: Path, tmp_path: Path) -> None:
    (directory / "tree" / "sub").mkdir(parents=True)
    (directory / "tree" / "f").write_bytes(b"data")
    for path in (directory / "tree" / "f", directory / "tree" / "sub"):
        os.setxattr(path, "user.a", str(path.name).encode())
    subprocess.run(["cp", "-a", "--preserve=xattr", directory / "tree", directory / "copy"], check=True)
    shutil.copy2(directory / "tree" / "f", directory / "copied")
    assert os.getxattr(directory / "copy" / "f", "user.a") == b"f"
    assert os.getxattr(directory / "copy" / "sub", "user.a") == b"sub"
    assert os.getxattr(directory / "copied", "user.a") == b"f"


def kept(path: Path, name: str = ACCESS) -> list[Entry]:
    """The access control list of a path, none if there is none."""
    return acl.decode(os.getxattr(path, name)) if name in os.listxattr(path) else []


def make(path: Path) -> None:
    """Make a file with a umask that leaves nothing to others."""
    os.umask(0o077)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


@as_root
def test_access_lists_let_in_who_is_named_and_follow_the_mode(directory: Path) -> None:
    path = directory / "f"
    path.touch()
    path.chmod(0o600)
    assert failure(os.getxattr, path, ACCESS) == errno.ENODATA
    assert failure(write, path, uid=NOBODY) == errno.EACCES
    os.setxattr(path, ACCESS, acl.encode(SHARED))
    assert path.stat().st_mode & 0o777 == 0o770
    assert kept(path) == SHARED
    assert failure(write, path, uid=NOBODY) == 0
    assert failure(write, path, uid=NOBODY - 1) == errno.EACCES
    path.chmod(0o740)
    assert kept(path)[3] == Entry(MASK, 4)
    assert failure(write, path, uid=NOBODY) == errno.EACCES
    assert failure(path.read_bytes, uid=NOBODY) == 0
    assert failure(os.setxattr, path, ACCESS, acl.encode(SHARED), uid=NOBODY) == errno.EPERM
    os.removexattr(path, ACCESS)
    assert kept(path) == []
    assert failure(os.setxattr, path, DEFAULT, acl.encode(SHARED)) == errno.EACCES
    assert failure(os.setxattr, path, ACCESS, acl.encode(SHARED[1:])) == errno.EINVAL


@as_root
def test_a_list_that_another_client_set_counts_here_soon(
    directory: Path, mountpoint: Path, shared_cluster: LocalCluster
) -> None:
    path = directory / "f"
    path.touch()
    path.chmod(0o600)
    assert failure(write, path, uid=NOBODY) == errno.EACCES
    name = "/" + str(path.relative_to(mountpoint))
    with fs3.connect(shared_cluster.url, shared_cluster.token, uid=0) as fs:
        fs.setxattr(name, ACCESS, acl.encode(SHARED))
    deadline_s = time.monotonic() + 20
    while failure(write, path, uid=NOBODY) != 0:
        assert time.monotonic() < deadline_s
    with fs3.connect(shared_cluster.url, shared_cluster.token, uid=NOBODY, gid=NOBODY, groups=[]) as fs:
        assert fs.open(name, "rb").read() == b"written"


@as_root
def test_default_lists_are_inherited_in_place_of_the_umask(
    directory: Path, mountpoint: Path, shared_cluster: LocalCluster
) -> None:
    umask = os.umask(0o077)
    try:
        make(directory / "before")
        assert (directory / "before").stat().st_mode & 0o777 == 0o600
        os.setxattr(directory, DEFAULT, acl.encode(SHARED))
        make(directory / "f")
        (directory / "sub").mkdir()
        os.mkfifo(directory / "sub" / "fifo", 0o666)
    finally:
        os.umask(umask)
    with fs3.connect(shared_cluster.url, shared_cluster.token, umask=0o077) as fs:
        fs.open("/" + str((directory / "sub" / "g").relative_to(mountpoint)), "w").close()
    for path in (directory / "f", directory / "sub" / "g", directory / "sub" / "fifo"):
        assert path.stat().st_mode & 0o777 == 0o660
        assert [entry.perm for entry in kept(path)] == [6, 7, 5, 6, 0]
        assert kept(path, DEFAULT) == []
    assert kept(directory / "sub") == kept(directory / "sub", DEFAULT) == SHARED
    directory.chmod(0o755)
    assert failure(write, directory / "f", uid=NOBODY) == 0
    assert failure(make, directory / "sub" / "theirs", uid=NOBODY) == 0
    assert failure(make, directory / "sub" / "others", uid=NOBODY - 1) == errno.EACCES


@as_root
@pytest.mark.skipif(shutil.which("setfacl") is None, reason="needs the package acl")
def test_setfacl_and_getfacl_work(directory: Path) -> None:
    path = directory / "f"
    path.touch()
    path.chmod(0o640)
    subprocess.run(["setfacl", "-m", f"u:{NOBODY}:rw,d:u:{NOBODY}:rwx", directory], check=True)
    subprocess.run(["setfacl", "-m", f"u:{NOBODY}:rw", path], check=True)
    shown = subprocess.run(["getfacl", "-nc", path], check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["user::rw-", f"user:{NOBODY}:rw-", "group::r--", "mask::rw-", "other::---"]
    subprocess.run(["cp", "-a", path, directory / "copy"], check=True)
    assert kept(directory / "copy") == kept(path)
    subprocess.run(["setfacl", "-R", "-b", directory], check=True)
    assert kept(path) == kept(directory) == kept(directory, DEFAULT) == []
    assert path.stat().st_mode & 0o777 == 0o640
