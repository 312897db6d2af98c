"""PostgreSQL with its data on a mount, killed and recovered: `make torture-apps`.

Needs root, who may become the user `postgres`, and Debian's package `postgresql`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

from fs3.testing.cluster import LocalCluster
from fs3.testing.process import ProcessRef, wait_until
from tests.cluster.conftest import QUICK
from tests.cluster.mounts import mounted

USER: Final = "postgres"
COMMAND_S: Final = 300.0
CLIENTS: Final = 4
SUMS: Final = (
    "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), "
    "(select sum(tbalance) from pgbench_tellers), (select coalesce(sum(delta), 0) from pgbench_history)"
)


def programs() -> Path | None:
    """Where Debian puts the newest PostgreSQL, if it is there."""
    found = Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")
    return max((path.parent for path in found), key=lambda path: int(path.parts[-2]), default=None)


def reason_not_to_run() -> str:
    """Why it cannot run here; empty when it can."""
    if os.geteuid() != 0:
        return "root is needed, to become the user postgres"
    return "" if programs() else "PostgreSQL is missing: apt-get install postgresql"


class Postgres:
    """A server with its data in `data`; `local`: a directory that the user may write to, for socket and log."""

    def __init__(self, data: Path, local: Path) -> None:
        self._data = data
        self._local = local
        self._log = local / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, program: str, *arguments: str, check: bool = True) -> str:
        """Run one of PostgreSQL's programs as its user; returns its output. Asserts that it succeeds if `check`."""
        with self._popen(program, *arguments, output=subprocess.PIPE) as child:
            try:
                output = child.communicate(timeout=COMMAND_S)[0].decode()
            except BaseException:
                child.kill()
                raise
        assert child.returncode == 0 or not check, f"{program} {arguments}: {output}{self.log()}"
        return output

    def _popen(self, program: str, *arguments: str, output: int | IO[bytes]) -> subprocess.Popen[bytes]:
        path = programs()
        assert path is not None
        return subprocess.Popen(
            [str(path / program), *arguments],
            user=USER,
            group=USER,
            extra_groups=[],
            cwd="/",
            env={**os.environ, "LC_ALL": "C", "PGHOST": str(self._local)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )

    def log(self) -> str:
        """What the server said."""
        return self._log.read_text() if self._log.exists() else ""

    def make(self) -> None:
        """An empty database with checksums of its pages."""
        self._data.mkdir(mode=0o700)
        shutil.chown(self._data, USER, USER)
        self.run("initdb", "-D", str(self._data), "-A", "trust", "-E", "UTF8", "--no-locale", "--data-checksums")

    def start(self) -> None:
        """Start the server and wait until it serves; it recovers what a killed one left."""
        options = ["-k", str(self._local), "-c", "listen_addresses=", "-c", "shared_buffers=32MB"]
        with self._log.open("ab") as log:
            process = self._process = self._popen("postgres", "-D", str(self._data), *options, output=log)

        def ready() -> bool:
            assert process.poll() is None, f"the server ended: {self.log()}"
            return "accepting" in self.run("pg_isready", check=False)

        wait_until(ready, timeout_s=COMMAND_S, what="the start of the server")

    def stop(self) -> None:
        """Stop it in good order. Harmless when it does not run."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """kill -9 of the server with all its processes."""
        assert self._process is not None
        killed = [ProcessRef(pid, ticks) for pid, ticks in with_children(self._process.pid)]
        for process in killed:
            process.signal(signal.SIGKILL)
        self._end(signal.SIGKILL)
        wait_until(lambda: not any(p.alive() for p in killed), timeout_s=COMMAND_S, what="the end of the server")

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(timeout=COMMAND_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._process = None

    def sql(self, query: str) -> str:
        """One row, columns separated by |."""
        return self.run("psql", "-AtX", "-d", "postgres", "-c", query).strip()

    def bench(self, seconds: int, *, check: bool = True) -> tuple[int, float]:
        """Run `pgbench` for so long: how many transactions were acknowledged, and how many a second."""
        clients = ["-c", str(CLIENTS), "-j", "2", "-T", str(seconds), "-n"]
        output = self.run("pgbench", *clients, "postgres", check=check)
        done = re.search(r"actually processed: (\d+)", output)
        rate = re.search(r"tps = ([\d.]+)", output)
        assert done, output
        return int(done[1]), float(rate[1]) if rate else 0.0

    def check(self, acknowledged: int) -> None:
        """Every transaction is there as a whole, and none of those that were acknowledged is missing."""
        assert len(set(self.sql(SUMS).split("|"))) == 1, self.sql(SUMS)
        assert int(self.sql("select count(*) from pgbench_history")) >= acknowledged

    def check_pages(self) -> None:
        """Stop it and verify the checksums of all pages."""
        self.stop()
        self.run("pg_checksums", "--check", "-D", str(self._data))


def with_children(server: int) -> Iterator[tuple[int, int]]:
    """Pid and start time of a process and its children."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                text = (entry / "stat").read_text()
                fields = text[text.rindex(")") + 2 :].split()
                if server in (int(entry.name), int(fields[1])):
                    yield int(entry.name), int(fields[19])


@contextmanager
def running(mountpoint: Path, local: Path) -> Iterator[Postgres]:
    """A server with `pgbench`'s tables, for the time of the block."""
    local.mkdir()
    shutil.chown(local, USER, USER)
    server = Postgres(mountpoint / "data", local)
    server.make()
    server.start()
    try:
        server.run("pgbench", "-i", "-q", "-s", "2", "postgres")
        yield server
    finally:
        server.stop()


@dataclass(frozen=True)
class Outcome:
    """Transactions a second by themselves and while a storage service is killed and returns; transactions in all."""

    tps: float
    tps_storage_killed: float
    acknowledged: int
    server_kills: int


def trial(cluster: LocalCluster, server: Postgres, *, seconds: int, kills: int) -> Outcome:
    """Load, a storage service killed under load, the server killed under load `kills` times and recovered."""
    acknowledged, tps = server.bench(seconds)
    server.check(acknowledged)
    with background(server, seconds) as pgbench:
        cluster.kill("storage-2")
        cluster.start("storage-2")
    more, tps_killed = pgbench.result()
    acknowledged += more
    server.check(acknowledged)
    cluster.wait_serving()
    for _ in range(kills):
        before = int(server.sql("select count(*) from pgbench_history"))
        with background(server, int(COMMAND_S) // 2, check=False) as pgbench:
            wait_until(
                lambda before=before: int(server.sql("select count(*) from pgbench_history")) > before + 20 * seconds,
                timeout_s=COMMAND_S,
                what="some transactions",
            )
            server.kill()
        acknowledged += pgbench.result()[0]
        server.start()
        server.check(acknowledged)
    server.check_pages()
    return Outcome(tps, tps_killed, acknowledged, kills)


class Background:
    """`pgbench` in a thread."""

    def __init__(self, server: Postgres, seconds: int, check: bool) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._future = self._pool.submit(server.bench, seconds, check=check)

    def result(self) -> tuple[int, float]:
        """Wait for its end."""
        with self._pool:
            return self._future.result(timeout=COMMAND_S)


@contextmanager
def background(server: Postgres, seconds: int, *, check: bool = True) -> Iterator[Background]:
    """Run `pgbench` during the block, and behind it to its end."""
    bench = Background(server, seconds, check)
    try:
        yield bench
    finally:
        bench.result()


def whole_trial(seconds: int, kills: int) -> Outcome:
    """A cluster, a mount for all users, a server on it: everything made, tried and taken away."""
    # Other users have to get there.
    with tempfile.TemporaryDirectory(prefix="fs3-postgres-") as base:
        os.chmod(base, 0o755)
        cluster = LocalCluster.create(Path(base, "cluster"), replace(QUICK, gc_delay_ms=10_000))
        cluster.up()
        try:
            with mounted(cluster, Path(base, "mount"), "allow_other") as mountpoint:
                mountpoint.chmod(0o755)
                with running(mountpoint, Path(base, "local")) as server:
                    return trial(cluster, server, seconds=seconds, kills=kills)
        finally:
            cluster.down()


def main() -> int:
    """Run it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="of each run of pgbench")
    parser.add_argument("--kills", type=int, default=5, help="kill -9 of the server under load")
    options = parser.parse_args()
    if reason := reason_not_to_run():
        print(f"make torture-apps cannot run here: {reason}", file=sys.stderr)
        return 2
    print(whole_trial(options.seconds, options.kills))
    return 0


if __name__ == "__main__":
    sys.exit(main())
