"""The virtual directory `3fs-virt` of a mount: seen by name alone, changed only as its directories say."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.mounts import directory_of_all, mounted
from tests.cluster.test_mount_semantics import failure

NOBODY = 65534


@pytest.fixture(scope="module")
def mount(shared_cluster: LocalCluster) -> Iterator[Path]:
    """A mount that every user may use."""
    with directory_of_all() as base, mounted(shared_cluster, base / "a", "allow_other") as path:
        yield path


@pytest.fixture
def virtual(mount: Path) -> Path:
    return mount / "3fs-virt"


def link_as(uid: int, target: Path, link: Path) -> int | None:
    """Make a symlink as another user; the errno it fails with, None if it succeeds."""
    os.seteuid(uid)
    try:
        return failure(os.symlink, target, link)
    finally:
        os.seteuid(0)


def tree(root: Path) -> Path:
    """A directory with something in it."""
    (root / "sub" / "below").mkdir(parents=True)
    for name in ("one", "sub/two", "sub/below/three"):
        (root / name).write_bytes(b"x" * 5000)
    return root


def test_the_virtual_directory_is_found_by_name_and_not_listed(mount: Path, virtual: Path) -> None:
    assert virtual.is_dir()
    assert "3fs-virt" not in os.listdir(mount)
    assert {"version", "rm-rf"} <= set(os.listdir(virtual))
    assert (virtual / "version").read_text().strip()
    assert os.stat(virtual).st_ino >= 1 << 63 > os.stat(mount).st_ino
    assert os.listdir(virtual / "rm-rf") == []
    assert failure(os.stat, mount / "3fs-virt" / "absent") == errno.ENOENT


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda v: os.mkdir(v / "x"), errno.EPERM),
        (lambda v: os.mkdir(v), errno.EEXIST),
        (lambda v: os.rmdir(v), errno.EPERM),
        (lambda v: os.rename(v, v.parent / "other"), errno.EPERM),
        (lambda v: os.rename(v.parent / "real", v / "x"), errno.EPERM),
        (lambda v: os.rename(v / "version", v / "x"), errno.EPERM),
        (lambda v: os.link(v / "version", v.parent / "x"), errno.EPERM),
        (lambda v: os.link(v.parent / "real", v / "x"), errno.EPERM),
        (lambda v: os.symlink("x", v / "x"), errno.EPERM),
        (lambda v: os.unlink(v / "version"), errno.EPERM),
        (lambda v: os.mknod(v / "x"), errno.EPERM),
        (lambda v: os.open(v / "x", os.O_CREAT | os.O_WRONLY), errno.EPERM),
        (lambda v: os.open(v / "rm-rf" / "x", os.O_CREAT | os.O_WRONLY), errno.EPERM),
        (lambda v: os.open(v, os.O_TMPFILE | os.O_RDWR), errno.EPERM),
        (lambda v: os.open(v / "version", os.O_RDWR), errno.EACCES),
        (lambda v: os.open(v / "version", os.O_RDONLY | os.O_TRUNC), errno.EACCES),
        (lambda v: os.truncate(v / "version", 0), errno.EPERM),
        (lambda v: os.chmod(v, 0o777), errno.EPERM),
        (lambda v: os.chown(v / "version", 1, 1), errno.EPERM),
        (lambda v: os.utime(v / "rm-rf"), errno.EPERM),
        (lambda v: os.setxattr(v / "version", "user.x", b"x"), errno.EPERM),
        (lambda v: os.getxattr(v / "version", "user.x"), errno.ENODATA),
        (lambda v: os.removexattr(v / "version", "user.x"), errno.EPERM),
        (lambda v: os.readlink(v / "version"), errno.EINVAL),
    ],
)
def test_what_cannot_be_done_to_it_fails_and_leaves_it_alone(
    virtual: Path, call: Callable[[Path], object], expected: int
) -> None:
    (virtual.parent / "real").touch()
    before = sorted(os.listdir(virtual))
    assert failure(call, virtual) == expected
    assert sorted(os.listdir(virtual)) == before
    assert (virtual.parent / "real").exists()


def test_an_open_virtual_file_is_read_sought_and_not_locked(virtual: Path) -> None:
    with open(virtual / "version", "rb") as file:
        content = file.read()
        assert os.pread(file.fileno(), 100, 2) == content[2:]
        assert failure(os.fsync, file.fileno()) == errno.EINVAL
        assert failure(fcntl.flock, file.fileno(), fcntl.LOCK_SH) == errno.ENOTSUP
        assert failure(os.lseek, file.fileno(), 0, os.SEEK_DATA) == errno.EINVAL
    assert os.statvfs(virtual).f_blocks == 0
    assert os.listxattr(virtual / "version") == []


@pytest.mark.parametrize("kind", ["absolute", "from the link", "from the root"])
def test_a_link_in_rm_rf_removes_the_tree_and_does_not_stay(mount: Path, virtual: Path, kind: str) -> None:
    root = tree(mount / "data" / kind / "tree")
    inside = root.relative_to(mount)
    target = {"absolute": root, "from the link": Path("../..") / inside, "from the root": inside}[kind]
    os.listdir(root)
    os.symlink(target, virtual / "rm-rf" / "job")
    assert not root.exists()
    assert root.parent.exists()
    assert os.listdir(virtual / "rm-rf") == []
    assert failure(os.lstat, virtual / "rm-rf" / "job") == errno.ENOENT
    root.mkdir()
    assert os.listdir(root) == []


def test_a_tree_that_is_moved_to_rm_rf_is_removed(mount: Path, virtual: Path) -> None:
    root = tree(mount / "moved")
    os.rename(root, virtual / "rm-rf" / "moved")
    assert not root.exists()
    assert os.listdir(virtual / "rm-rf") == []
    wait_until(lambda: not (virtual / "rm-rf" / "moved").exists(), timeout_s=30, what="the kernel to forget the name")
    root.mkdir()
    assert os.listdir(root) == []
    assert failure(os.rename, root, virtual / "iovs" / "x") == errno.EPERM
    assert failure(os.rename, root, virtual / "x") == errno.EPERM
    assert root.exists()


def test_a_file_open_in_a_removed_tree_is_still_read(mount: Path, virtual: Path) -> None:
    root = tree(mount / "open" / "tree")
    with open(root / "one", "rb") as file:
        os.symlink(root, virtual / "rm-rf" / "x")
        assert file.read() == b"x" * 5000


def test_rm_rf_refuses_what_is_elsewhere_absent_or_the_callers_not(mount: Path, virtual: Path, tmp_path: Path) -> None:
    outside = tree(tmp_path / "outside")
    root = tree(mount / "owned")
    link = virtual / "rm-rf" / "x"
    for target, expected in [
        (outside, errno.EXDEV),
        (mount, errno.EINVAL),
        ("../..", errno.EINVAL),
        (mount / "3fs-virt", errno.EINVAL),
        (mount / "absent" / "x", errno.ENOENT),
    ]:
        assert failure(os.symlink, target, link) == expected, target
    assert link_as(NOBODY, root, link) == errno.EACCES
    assert (root / "sub" / "below" / "three").exists()
    assert outside.exists()
    os.chmod(mount, 0o777)
    os.chown(root, NOBODY, NOBODY)
    for path in [root, *root.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    assert link_as(NOBODY, root, link) is None
    assert not root.exists()
