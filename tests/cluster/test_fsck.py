"""`fs3 admin fsck` on a cluster of processes."""

from __future__ import annotations

import asyncio
import json
import os
import threading

import fs3
from fs3.kv import retry
from fs3.kv.api import Transaction
from fs3.kv.open import open_store
from fs3.meta import keys, model
from fs3.testing.cluster import LocalCluster
from tests.cluster.command import fs3_command

DATA = os.urandom(3 << 20)


def populate(fs: fs3.FileSystem, top: str) -> None:
    for directory in (top, f"{top}/a", f"{top}/a/b"):
        fs.mkdir(directory)
        with fs.open(f"{directory}/file", "wb") as file:
            file.write(DATA)
    fs.link(f"{top}/file", f"{top}/a/link")
    with fs.open(f"{top}/lone", "wb") as file:
        file.write(DATA)


def test_damage_is_found_while_the_cluster_is_used_and_repaired(cluster: LocalCluster) -> None:
    where = str(cluster.directory)
    with fs3.connect(cluster.url, token=cluster.token) as fs:
        populate(fs, "/t")
        stop = threading.Event()
        worker = threading.Thread(target=work, args=(fs, stop))
        worker.start()
        try:
            clean = json.loads(fs3_command("admin", "fsck", where, "--json").stdout)
            assert clean["findings"] == []
            asyncio.run(damage(cluster, *(fs.stat(path).st_ino for path in ("/t/a", "/t", "/t/lone"))))
            result = fs3_command("admin", "fsck", where, "--json", check=False)
            assert result.returncode == 1
            counts = json.loads(result.stdout)["counts"]
            assert counts == {"dangling-entry": 1, "no-name": 1, "orphan-chunks": 1}
            fs3_command("admin", "fsck", where, "--repair", "--repair-chunks", "--orphan-age", "0")
        finally:
            stop.set()
            worker.join()
        assert fs3_command("admin", "fsck", where).stdout == "nothing is wrong\n"
        (lost,) = fs.listdir("/lost+found")
        with fs.open(f"/lost+found/{lost}/file", "rb") as file:
            assert file.read() == DATA


def work(fs: fs3.FileSystem, stop: threading.Event) -> None:
    """Make, write, move and remove until told to stop."""
    fs.mkdir("/busy")
    i = 0
    while not stop.is_set():
        i += 1
        with fs.open(f"/busy/{i}", "wb") as file:
            file.write(DATA[: i % 3 * 70_000])
        fs.replace(f"/busy/{i}", "/busy/moved")
        fs.mkdir(f"/busy/d{i}")
        fs.rmtree(f"/busy/d{i}")
    fs.rmtree("/busy")


async def damage(cluster: LocalCluster, upper: int, top: int, file: int) -> None:
    """Lose the name of `upper`/b, add an entry that names nothing, and drop all that is known of `top`/lone."""
    store = open_store(f"lmdb:{cluster.directory / 'kv'}?durable=0")

    async def write(tr: Transaction) -> None:
        tr.clear(keys.dirent(upper, b"b"))
        tr.add(keys.directory_subdirs(upper), -1)
        tr.set(keys.dirent(upper, b"nothing"), model.encode_dirent(77 << 12, model.FILE))
        tr.clear(keys.dirent(top, b"lone"))
        tr.clear(keys.inode(file))
        tr.add(keys.counter(0), -1)

    try:
        await retry.run(store, write)
    finally:
        await store.close()
