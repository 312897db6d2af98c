"""Software that people run, on the mount, with its results compared to those on a local directory."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from tests.cluster.mounts import mounted

COMMAND_S = 300


@pytest.fixture(scope="module")
def mountpoint(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory, engine: str) -> Iterator[Path]:
    """A directory on a mount of the module's cluster."""
    with mounted(shared_cluster, tmp_path_factory.mktemp("mnt") / "m", engine=engine) as path:
        (path / engine).mkdir()
        yield path / engine


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a program that must succeed; its output."""
    result = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert result.returncode == 0, f"{command}: {result.stderr}{result.stdout}"
    return result.stdout


def fingerprint(root: Path) -> dict[str, str]:
    """Content or link target, and permission bits, of everything below `root`."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        mode = oct(path.lstat().st_mode)
        if path.is_symlink():
            found[name] = f"{mode} -> {os.readlink(path)}"
        elif path.is_file():
            found[name] = f"{mode} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            found[name] = mode
    return found


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository of a few hundred files, some of them links."""
    root = tmp_path_factory.mktemp("repo")
    run("git", "init", "-q", "-b", "main", str(root))
    run("git", "-C", str(root), "config", "user.email", "test@example.org")
    run("git", "-C", str(root), "config", "user.name", "test")
    for number in range(300):
        path = root / f"d{number % 17}" / f"f{number}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(hashlib.sha256(str(number).encode()).digest() * (number * 7 % 400))
    (root / "run.sh").write_text("#!/bin/sh\necho hello\n")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("d1/f1")
    run("git", "-C", str(root), "add", "-A")
    run("git", "-C", str(root), "commit", "-qm", "one")
    return root


def test_git_clone_commit_and_fsck(mountpoint: Path, repository: Path) -> None:
    clone = mountpoint / "clone"
    run("git", "clone", "-q", str(repository), str(clone))
    assert run("git", "-C", str(clone), "status", "--porcelain") == ""
    run("git", "-C", str(clone), "config", "user.email", "test@example.org")
    run("git", "-C", str(clone), "config", "user.name", "test")
    (clone / "new").write_text("new\n")
    run("git", "-C", str(clone), "add", "new")
    run("git", "-C", str(clone), "commit", "-qm", "two")
    run("git", "-C", str(clone), "worktree", "add", "-q", str(mountpoint / "worktree"), "-b", "other")
    assert fingerprint(mountpoint / "worktree" / "d1") == fingerprint(repository / "d1")
    run("git", "-C", str(clone), "gc", "-q")
    run("git", "-C", str(clone), "fsck", "--full", "--strict")
    assert run("git", "-C", str(mountpoint / "worktree"), "status", "--porcelain") == ""
    assert run(str(clone / "run.sh")) == "hello\n"


def test_rsync_makes_an_equal_tree_and_has_nothing_to_do_the_second_time(
    mountpoint: Path, repository: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", mountpoint / "rsynced"
    shutil.copytree(repository, source, symlinks=True, ignore=shutil.ignore_patterns(".git", "d1?"))
    os.link(source / "d2" / "f2", source / "hard link")
    os.setxattr(source / "d3" / "f3", "user.color", b"red")
    target.mkdir()
    (target / "to be deleted").touch()
    again = ("rsync", "-aHX", "--delete", "--itemize-changes", f"{source}/", f"{target}/")
    run(*again)
    assert fingerprint(target) == fingerprint(source)
    assert run(*again) == ""
    assert (target / "hard link").samefile(target / "d2" / "f2")
    assert os.getxattr(target / "d3" / "f3", "user.color") == b"red"
    times = {p: p.lstat().st_mtime_ns for p in source.rglob("*")}
    assert all((target / p.relative_to(source)).lstat().st_mtime_ns == ns for p, ns in times.items())


def test_tar_out_of_and_into_the_mount_is_lossless(mountpoint: Path, repository: Path, tmp_path: Path) -> None:
    archive = mountpoint / "archive.tar"
    run("tar", "-C", str(repository), "-cf", str(archive), ".")
    inside = mountpoint / "untarred"
    inside.mkdir()
    run("tar", "-C", str(inside), "-xf", str(archive))
    assert fingerprint(inside) == fingerprint(repository)
    outside = tmp_path / "outside"
    outside.mkdir()
    run("tar", "-C", str(outside), "-xf", str(archive))
    assert fingerprint(outside) == fingerprint(repository)
    shutil.rmtree(inside)
    assert not inside.exists()


def test_tar_and_cp_keep_holes_attributes_and_links(mountpoint: Path, tmp_path: Path) -> None:
    tree = mountpoint / "special"
    tree.mkdir()
    with (tree / "sparse").open("wb") as file:
        file.seek(8 << 20)
        file.write(os.urandom(10_000))
        file.truncate(16 << 20)
    os.link(tree / "sparse", tree / "same")
    (tree / "dangling").symlink_to("nowhere")
    os.setxattr(tree / "sparse", "user.note", b"value")
    run("tar", "-C", str(tree), "--sparse", "--xattrs", "-cf", str(tmp_path / "special.tar"), ".")
    assert (tmp_path / "special.tar").stat().st_size < 4 << 20
    untarred, copied = mountpoint / "special-untarred", mountpoint / "special-copied"
    untarred.mkdir()
    run("tar", "-C", str(untarred), "--xattrs", "-xf", str(tmp_path / "special.tar"))
    run("cp", "-a", str(tree), str(copied))
    for made in (untarred, copied):
        assert fingerprint(made) == fingerprint(tree)
        assert (made / "same").samefile(made / "sparse")
        assert os.getxattr(made / "sparse", "user.note") == b"value"
        with (made / "sparse").open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) > 0
    names = run("find", str(tree), "-mindepth", "1", "-printf", "%f %y %n\\n").splitlines()
    assert sorted(names) == ["dangling l 1", "same f 2", "sparse f 2"]


def test_a_build_with_make_has_nothing_to_do_the_second_time(mountpoint: Path) -> None:
    project = mountpoint / "project"
    project.mkdir()
    units = [f"unit{number}" for number in range(12)]
    for number, unit in enumerate(units):
        (project / f"{unit}.c").write_text(f'#include "all.h"\nint {unit}(void) {{ return BASE + {number}; }}\n')
    declared = "".join(f"int {unit}(void);\n" for unit in units)
    (project / "all.h").write_text(f"#define BASE 100\n{declared}")
    called = "".join(f" + {unit}()" for unit in units)
    (project / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", 0{called}); return 0; }}\n'
    )
    objects = " ".join(f"{name}.o" for name in [*units, "main"])
    (project / "Makefile").write_text(f"sum: {objects}\n\tcc -o $@ $^\n%.o: %.c all.h\n\tcc -c -g -o $@ $<\n")
    make = ("make", "-j2", "-C", str(project))
    run(*make)
    expected = sum(range(12)) + 12 * 100
    assert run(str(project / "sum")) == f"{expected}\n"
    assert "is up to date" in run(*make)
    (project / "unit3.c").write_text("int unit3(void) { return 0; }\n")
    assert run(*make).count("cc -c") == 1
    assert run(str(project / "sum")) == f"{expected - 103}\n"


def test_dd_with_direct_io_copies_every_byte(mountpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom((3 << 20) + 512 * 5))
    inside, outside = mountpoint / "direct", tmp_path / "outside"
    run("dd", f"if={source}", f"of={inside}", "bs=256K", "oflag=direct", "conv=fsync", "status=none")
    run("dd", f"if={inside}", f"of={outside}", "bs=512K", "iflag=direct", "status=none")
    assert outside.read_bytes() == source.read_bytes()


def test_a_virtual_environment_works(mountpoint: Path) -> None:
    directory = mountpoint / "venv"
    run(sys.executable, "-m", "venv", str(directory))
    python = str(directory / "bin" / "python")
    assert run(python, "-c", "import sys, json; print(sys.prefix)").strip() == str(directory)
    assert "pip" in run(python, "-m", "pip", "--version")


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite_keeps_its_promises(mountpoint: Path, journal: str) -> None:
    path = mountpoint / f"{journal}.db"
    with sqlite3.connect(path, timeout=30) as db:
        assert db.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
        db.execute("create table t (id integer primary key, value blob)")
        for batch in range(10):
            with db:
                db.executemany("insert into t (value) values (?)", [(os.urandom(500),) for _ in range(100)])
                db.execute("update t set value = ? where id % 7 = ?", (os.urandom(300), batch % 7))
    db.close()
    with sqlite3.connect(path) as other:
        assert other.execute("select count(*) from t").fetchone() == (1000,)
        assert other.execute("pragma integrity_check").fetchone() == ("ok",)
    other.close()


def test_shared_writable_mmap_is_seen_by_reads_and_survives(mountpoint: Path) -> None:
    path = mountpoint / "mapped"
    path.write_bytes(bytes(1 << 20))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        view[5000:5005] = b"hello"
        view.flush()
        assert path.read_bytes()[5000:5005] == b"hello"
        view[-3:] = b"end"
    data = path.read_bytes()
    assert (data[5000:5005], data[-3:], len(data)) == (b"hello", b"end", 1 << 20)


def test_concurrent_appenders_lose_nothing(mountpoint: Path) -> None:
    path = mountpoint / "log"
    script = "import os,sys\nfd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND|os.O_CREAT,0o644)\n" + (
        "for i in range(200): os.write(fd,(sys.argv[2]*15+'\\n').encode())"
    )
    children = [subprocess.Popen([sys.executable, "-c", script, str(path), letter]) for letter in "abcd"]
    assert [child.wait(timeout=COMMAND_S) for child in children] == [0, 0, 0, 0]
    lines = path.read_text().splitlines()
    assert {letter: lines.count(letter * 15) for letter in "abcd"} == dict.fromkeys("abcd", 200)
