"""SQLite on mounts: writers in several processes, one of them killed in the middle of transactions."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from fs3.testing.process import wait_until
from tests.cluster.mounts import mounted

PATIENCE_S = 120.0
BUSY_S = 60

# Commits rows of `writer`, numbered from 0, some at a time; a number on a line once they are committed.
WRITER = """
import os, sqlite3, sys
path, writer = sys.argv[1], int(sys.argv[2])
db = sqlite3.connect(path, timeout=60, isolation_level=None)
db.execute("pragma synchronous=full")
number = 0
while True:
    db.execute("begin immediate")
    for number in range(number, number + 7):
        db.execute("insert into t values (?, ?, ?)", (writer, number, os.urandom(900)))
    db.execute("update counts set count = ? where writer = ?", (number + 1, writer))
    db.execute("commit")
    number += 1
    print(number, flush=True)
"""


@pytest.fixture(scope="module")
def mounts(shared_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster."""
    base = tmp_path_factory.mktemp("mnt")
    with mounted(shared_cluster, base / "a") as a, mounted(shared_cluster, base / "b") as b:
        yield a, b


class Writer:
    """A process that commits; what it acknowledged goes to `output`."""

    def __init__(self, path: Path, number: int, output: Path) -> None:
        self._output = output
        with output.open("wb") as out:
            command = [sys.executable, "-c", WRITER, str(path), str(number)]
            self.process = subprocess.Popen(command, stdout=out)

    def acknowledged(self) -> int:
        """How many of its rows are committed."""
        whole = self._output.read_text().rpartition("\n")[0]
        return int(whole.splitlines()[-1]) if whole else 0

    def wait_for(self, count: int) -> None:
        """Wait until so many rows are committed."""

        def reached() -> bool:
            assert self.process.poll() is None, "the writer ended"
            return self.acknowledged() >= count

        wait_until(reached, timeout_s=PATIENCE_S, what=f"{count} rows of a writer")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()


@contextmanager
def writing(path: Path, number: int, output: Path) -> Iterator[Writer]:
    """A writer that ends with the block."""
    writer = Writer(path, number, output)
    try:
        yield writer
    finally:
        writer.kill()


def check(path: Path, acknowledged: list[int]) -> None:
    """The database is sound; transactions are there as a whole, and all that were acknowledged."""
    db = sqlite3.connect(path, timeout=BUSY_S)
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    for writer, least in enumerate(acknowledged):
        rows = [number for (number,) in db.execute("select number from t where writer = ? order by 1", (writer,))]
        assert rows == list(range(len(rows)))
        assert db.execute("select count from counts where writer = ?", (writer,)).fetchone() == (len(rows),)
        assert len(rows) >= least
    db.close()


# A write-ahead log lives in shared memory: all its processes have to be on one mount.
@pytest.mark.parametrize(("journal", "elsewhere"), [("delete", False), ("delete", True), ("wal", False)])
def test_no_transaction_is_lost_or_torn_when_a_writer_is_killed(
    mounts: tuple[Path, Path], tmp_path: Path, journal: str, elsewhere: bool
) -> None:
    name = f"{journal}-{elsewhere}.db"
    path, other = mounts[0] / name, mounts[elsewhere] / name
    db = sqlite3.connect(path)
    assert db.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
    with db:
        db.execute("create table t (writer int, number int, value blob, primary key (writer, number))")
        db.execute("create table counts (writer int primary key, count int)")
        db.executemany("insert into counts values (?, 0)", [(0,), (1,)])
    db.close()
    with writing(path, 0, tmp_path / "0") as killed, writing(other, 1, tmp_path / "1") as survivor:
        killed.wait_for(30)
        survivor.wait_for(30)
        killed.kill()
        survivor.wait_for(survivor.acknowledged() + 30)
        survivor.kill()
        for mount in mounts:
            check(mount / name, [killed.acknowledged(), survivor.acknowledged()])
