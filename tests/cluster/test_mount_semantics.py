"""What the mount promises (docs/semantics.md), tried with system calls."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import fs3
from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.conftest import QUICK, MakeCluster
from tests.cluster.mounts import mounted


@pytest.fixture(scope="module")
def mounts(
    shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory, engine: str
) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster."""
    base = tmp_path_factory.mktemp("mnt")
    with (
        mounted(shared_cluster, base / "a", engine=engine) as a,
        mounted(shared_cluster, base / "b", engine=engine) as b,
    ):
        yield a, b


@pytest.fixture
def directory(mounts: tuple[Path, Path], request: pytest.FixtureRequest) -> Path:
    """A fresh directory on the first mount."""
    path = mounts[0] / request.node.name.replace("/", "_")[:100]
    path.mkdir()
    return path


def failure(call: object, *arguments: object, **keywords: object) -> int | None:
    """The errno a call fails with, None if it succeeds."""
    try:
        call(*arguments, **keywords)  # type: ignore[operator]
    except OSError as e:
        return e.errno
    return None


def test_errors_have_the_errno_of_a_local_file_system(directory: Path) -> None:
    (directory / "file").write_text("x")
    (directory / "dir").mkdir()
    (directory / "dir" / "child").touch()
    os.symlink("loop", directory / "loop")
    assert failure(os.stat, directory / "absent") == errno.ENOENT
    assert failure(os.mkdir, directory / "dir") == errno.EEXIST
    assert failure(os.rmdir, directory / "dir") == errno.ENOTEMPTY
    assert failure(os.rmdir, directory / "file") == errno.ENOTDIR
    assert failure(os.unlink, directory / "dir") in (errno.EISDIR, errno.EPERM)
    assert failure(os.stat, directory / "file" / "x") == errno.ENOTDIR
    assert failure(os.open, directory / "dir", os.O_WRONLY) == errno.EISDIR
    assert failure(os.open, directory / "file", os.O_CREAT | os.O_EXCL) == errno.EEXIST
    assert failure(os.stat, directory / ("n" * 256)) == errno.ENAMETOOLONG
    assert failure(os.stat, directory / "loop") == errno.ELOOP
    assert failure(os.rename, directory / "dir", directory / "dir" / "child") in (errno.EINVAL, errno.ENOTDIR)
    assert failure(os.rename, directory / "file", directory / "dir") == errno.EISDIR
    assert failure(os.link, directory / "dir", directory / "hard") == errno.EPERM


def test_names_modes_times_and_links_are_kept(directory: Path) -> None:
    path = directory / "nämé with spaces\n"
    path.write_bytes(b"data")
    path.chmod(0o4751)
    os.utime(path, ns=(1_234_567_890_123_456_789, 987_654_321_987_654_321))
    os.link(path, directory / "second")
    os.symlink("x" * 1000, directory / "symlink")
    st = path.stat()
    assert stat.S_IMODE(st.st_mode) == 0o4751
    assert (st.st_atime_ns, st.st_mtime_ns) == (1_234_567_890_123_456_789, 987_654_321_987_654_321)
    assert st.st_nlink == 2
    assert (directory / "second").stat().st_ino == st.st_ino
    assert os.readlink(directory / "symlink") == "x" * 1000
    assert sorted(os.listdir(directory)) == ["nämé with spaces\n", "second", "symlink"]
    assert directory.stat().st_nlink == 2
    (directory / "sub").mkdir()
    assert directory.stat().st_nlink == 3


def test_sparse_files_truncation_and_extension_read_as_zeros(directory: Path) -> None:
    path = directory / "sparse"
    with path.open("w+b", buffering=0) as file:
        os.ftruncate(file.fileno(), 1 << 40)
        assert path.stat().st_size == 1 << 40
        os.pwrite(file.fileno(), b"far", (1 << 39) + 7)
        assert os.pread(file.fileno(), 10, (1 << 39) + 5) == b"\0\0far" + bytes(5)
        assert os.pread(file.fileno(), 5000, 12345) == bytes(5000)
        os.ftruncate(file.fileno(), 0)
        os.pwrite(file.fileno(), b"A" * 3_000_000, 0)
        os.ftruncate(file.fileno(), 1_500_000)
        os.ftruncate(file.fileno(), 2_500_000)
        assert os.pread(file.fileno(), 4, 1_499_998) == b"AA\0\0"
        assert os.pread(file.fileno(), 3_000_000, 1_500_000) == bytes(1_000_000)


def give_name(fd: int, path: Path) -> None:
    """Link what a descriptor is open on."""
    # Without a descriptor of a directory Python calls link(2), which does not follow the link.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def test_a_file_without_a_name_may_be_given_one(directory: Path, engine: str) -> None:
    if engine == "fusepy":
        pytest.skip("libfuse knows no O_TMPFILE before version 3.17")
    for linked in (False, True):
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o640)
        assert os.write(fd, b"whole or not at all") == 19
        st = os.fstat(fd)
        assert (st.st_nlink, st.st_size, stat.S_IMODE(st.st_mode)) == (0, 19, 0o640)
        assert os.listdir(directory) == []
        os.close(os.dup(fd))
        assert os.pread(fd, 5, 0) == b"whole"
        if linked:
            give_name(fd, directory / "named")
        os.close(fd)
    assert (directory / "named").read_bytes() == b"whole or not at all"
    assert (directory / "named").stat().st_nlink == 1
    exclusive = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL)
    assert failure(give_name, exclusive, directory / "other") == errno.ENOENT
    os.close(exclusive)


def test_close_to_open_between_two_mounts(mounts: tuple[Path, Path]) -> None:
    a, b = mounts
    for round_ in range(20):
        data = os.urandom(100 + 5000 * round_)
        (a / "shared").write_bytes(data)
        assert (b / "shared").read_bytes() == data
        with (b / "shared").open("r+b") as file:
            file.seek(50)
            file.write(b"back")
        assert (a / "shared").read_bytes() == data[:50] + b"back" + data[54:]


def test_what_a_mount_wrote_it_need_not_read_again_unless_another_wrote(mounts: tuple[Path, Path], engine: str) -> None:
    if engine != "native":
        pytest.skip("the fusepy engine forgets its pages at the first open after its own write (docs/semantics.md)")
    first, second = mounts
    path = first / "written"

    def bytes_read() -> int:
        return int(json.loads((first / "3fs-virt" / "stats").read_text())["bytes_read"])

    def read_of(content: bytes) -> int:
        before = bytes_read()
        assert path.read_bytes() == content
        return bytes_read() - before

    # Of the last page the kernel reads what it did not write.
    page, content = 4096, b"a" * 300_000
    path.write_bytes(content)
    assert read_of(content) < page
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(b"b" * 1000)
    with path.open("ab") as file:
        file.write(b"c" * 5000)
    path.open("r+b").close()
    content = content[:100_000] + b"b" * 1000 + content[101_000:]
    assert path.read_bytes() == content + b"c" * 5000
    assert read_of(content + b"c" * 5000) <= page

    (second / "written").write_bytes(content)
    with (second / "written").open("r+b") as file:
        file.write(b"d" * 10)
    content = b"d" * 10 + content[10:]
    assert read_of(content) > page
    with path.open("r+b") as file:
        with (second / "written").open("r+b") as other:
            other.write(b"e" * 10)
        file.seek(200_000)
        file.write(b"f" * 10)
    content = b"e" * 10 + content[10:200_000] + b"f" * 10 + content[200_010:]
    assert read_of(content) > page


def test_an_unlinked_or_replaced_file_stays_readable_while_open(directory: Path) -> None:
    path = directory / "gone"
    path.write_bytes(b"still here" * 1000)
    with path.open("rb") as reader, path.open("r+b") as writer:
        path.unlink()
        writer.write(b"STILL")
        writer.flush()
        assert reader.read() == b"STILL here" + b"still here" * 999
        assert os.fstat(reader.fileno()).st_nlink == 0
    assert not path.exists()
    (directory / "old").write_bytes(b"old")
    (directory / "new").write_bytes(b"new")
    with (directory / "old").open("rb") as held:
        os.replace(directory / "new", directory / "old")
        assert held.read() == b"old"
    assert (directory / "old").read_bytes() == b"new"


def test_a_listing_of_many_entries_is_complete_and_stable_under_removal(directory: Path) -> None:
    names = {f"entry-{i:05}" for i in range(3000)}
    for name in names:
        os.close(os.open(directory / name, os.O_CREAT | os.O_WRONLY))
    assert set(os.listdir(directory)) == names
    with os.scandir(directory) as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(directory) == []


def test_a_read_only_mount_refuses_changes(shared_cluster: LocalCluster, tmp_path: Path, engine: str) -> None:
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs, fs.open("/ro-file", "wb") as file:
        file.write(b"content")
    with mounted(shared_cluster, tmp_path / "ro", "ro", engine=engine) as path:
        assert (path / "ro-file").read_bytes() == b"content"
        assert failure(os.mkdir, path / "new") == errno.EROFS
        assert failure(os.open, path / "ro-file", os.O_WRONLY) == errno.EROFS


def test_what_the_native_client_writes_the_mount_reads_and_the_reverse(
    shared_cluster: LocalCluster, mounts: tuple[Path, Path]
) -> None:
    data = os.urandom(3_333_333)
    with fs3.connect(shared_cluster.url, token=shared_cluster.token) as fs:
        with fs.open("/native", "wb") as file:
            file.write(data)
        assert (mounts[0] / "native").read_bytes() == data
        (mounts[1] / "mounted").write_bytes(data[::-1])
        with fs.open("/mounted", "rb") as file:
            assert file.read() == data[::-1]
        assert fs.stat("/mounted").st_size == len(data)


def test_free_space_is_what_the_disks_have(mounts: tuple[Path, Path]) -> None:
    result = os.statvfs(mounts[0])
    assert result.f_blocks * result.f_frsize > 1 << 30
    assert 0 < result.f_bavail <= result.f_blocks
    assert result.f_namemax == 255


def test_times_move_as_posix_says(directory: Path) -> None:
    path = directory / "f"
    path.write_bytes(b"1")
    before = path.stat()
    parent_before = directory.stat()
    wall = time.time_ns()
    path.write_bytes(b"22")
    after = path.stat()
    assert after.st_mtime_ns > before.st_mtime_ns
    assert abs(after.st_mtime_ns - wall) < 60 * 10**9
    assert directory.stat().st_mtime_ns == parent_before.st_mtime_ns
    os.rename(path, directory / "g")
    assert directory.stat().st_mtime_ns > parent_before.st_mtime_ns
    assert (directory / "g").stat().st_mtime_ns == after.st_mtime_ns


def test_with_a_delay_a_file_stays_readable_after_another_mount_unlinked_it(
    make_cluster: MakeCluster, tmp_path: Path, engine: str
) -> None:
    cluster = make_cluster(replace(QUICK, gc_delay_ms=3_600_000))
    data = os.urandom(5_000_000)
    with mounted(cluster, tmp_path / "a", engine=engine) as a, mounted(cluster, tmp_path / "b", engine=engine) as b:
        (b / "f").write_bytes(data)
        with (a / "f").open("rb") as reader:
            (b / "f").unlink()
            assert failure(os.stat, b / "f") == errno.ENOENT
            assert reader.read() == data


OLD_NS = 1_600_000_000_000_000_000


def aged(path: Path) -> None:
    """Make a file whose last read, by its times, was before its last change, both long ago."""
    path.write_bytes(b"x" * 5000)
    os.utime(path, ns=(OLD_NS, OLD_NS + 1))


def test_the_first_read_after_a_change_sets_the_access_time(mounts: tuple[Path, Path], directory: Path) -> None:
    path = directory / "f"
    aged(path)
    assert path.stat().st_atime_ns == OLD_NS
    before = path.stat()
    path.read_bytes()
    after = path.stat()
    assert after.st_atime_ns > OLD_NS
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    path.read_bytes()
    assert path.stat().st_atime_ns == after.st_atime_ns, "one read a day counts"
    elsewhere = mounts[1] / directory.name / "f"
    wait_until(
        lambda: elsewhere.stat().st_atime_ns == after.st_atime_ns, timeout_s=20, what="the other mount sees the read"
    )
    os.utime(path, ns=(OLD_NS + 5, OLD_NS + 6))
    assert path.stat().st_atime_ns == OLD_NS + 5


def test_o_noatime_leaves_the_access_time(directory: Path) -> None:
    path = directory / "f"
    aged(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        assert len(os.read(descriptor, 10)) == 10
    finally:
        os.close(descriptor)
    assert path.stat().st_atime_ns == OLD_NS


def read_through(fs: fs3.FileSystem) -> None:
    with fs.open("quiet-file", "rb") as file:
        assert len(file.read()) == 5000


def test_a_mount_and_a_client_may_leave_access_times_alone(
    shared_cluster: LocalCluster, tmp_path: Path, engine: str
) -> None:
    with mounted(shared_cluster, tmp_path / "quiet", "noatime", engine=engine) as mount:
        path = mount / "quiet-file"
        aged(path)
        path.read_bytes()
        assert path.stat().st_atime_ns == OLD_NS
        with fs3.connect(shared_cluster.url, shared_cluster.token, noatime=True) as fs:
            read_through(fs)
        assert path.stat().st_atime_ns == OLD_NS
        # A client that ends tells what it has read.
        with fs3.connect(shared_cluster.url, shared_cluster.token) as fs:
            read_through(fs)
        with fs3.connect(shared_cluster.url, shared_cluster.token) as fs:
            assert fs.stat("quiet-file").st_atime_ns > OLD_NS
