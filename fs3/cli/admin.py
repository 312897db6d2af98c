"""`fs3 admin`: what an operator does rarely."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from fs3.cli.fsck import fsck_command
from fs3.cli.output import human_bytes, json_option, print_json
from fs3.cli.settings import config_command
from fs3.cli.tags import tag_command
from fs3.core.errors import error
from fs3.kv import migrate, retry
from fs3.kv.api import KvError, KvStore, Transaction
from fs3.kv.lmdb_wal import in_use
from fs3.kv.open import lmdb_directory, open_store
from fs3.mgmtd.lease import observe
from fs3.mgmtd.state import LEASE_KEY
from fs3.v1.disk_mgmtd_pb2 import ManagerLease
from fs3.v1.frame_pb2 import Code

# A manager renews its lease several times within the longest lease that is reasonable.
LEASE_WATCH_S: Final = 10.0
LEASE_POLL_S: Final = 0.5
PROGRESS_S: Final = 1.0


@click.group("admin")
def admin_command() -> None:
    """Rare work of an operator."""


admin_command.add_command(fsck_command)
admin_command.add_command(config_command)
admin_command.add_command(tag_command)


@admin_command.command("migrate-kv")
@click.option("--from", "source_url", metavar="URL", required=True, help="The store in use until now.")
@click.option("--to", "target_url", metavar="URL", required=True, help="An empty store.")
@json_option
def migrate_kv_command(source_url: str, target_url: str, as_json: bool) -> None:
    """Copy a cluster's whole key-value store into an empty one, for example from LMDB to FoundationDB.

    All managers and metadata services have to be stopped; storage services may run. What was copied is compared at the
    end. After an interruption the same command goes on. The store copied from stays as it is.
    """
    started_s = time.monotonic()
    try:
        result = asyncio.run(_migrate(source_url, target_url))
    except KvError as e:
        _end_progress()
        code = Code.CODE_UNAVAILABLE if e.retryable else Code.CODE_INVALID_ARGUMENT
        raise error(code, str(e)) from e
    _end_progress()
    result["seconds"] = round(time.monotonic() - started_s, 3)
    if as_json:
        print_json(result)
        return
    size = human_bytes(result["content_bytes"])
    click.echo(f"{result['records']:,} records ({size}) are in {target_url}, compared with {source_url}")
    click.echo(f"sha256 {result['sha256']}")
    click.echo(f'set kv = "{target_url}" for all managers and metadata services, then start them', err=True)


async def _migrate(source_url: str, target_url: str) -> dict[str, Any]:
    _check_unused(source_url, must_exist=True)
    _check_unused(target_url, must_exist=False)
    source = open_store(source_url)
    try:
        target = open_store(target_url)
        try:
            if lmdb_directory(source_url) is None:
                await _check_no_manager(source)
            resumed = await migrate.copy(source, target, source_name=source_url, report=_progress("copied"))
            contents = await migrate.compare(source, target, report=_progress("compared"))
            await migrate.finish(target)
        finally:
            await target.close()
    finally:
        await source.close()
    return {"from": source_url, "to": target_url, "resumed": resumed, "verified": True, **asdict(contents)}


def _check_unused(url: str, *, must_exist: bool) -> None:
    """Refuse an LMDB directory that is missing or that a process has open; of other stores this cannot be told."""
    directory = lmdb_directory(url)
    if directory is None:
        return
    if must_exist and not (Path(directory) / "data.mdb").exists():
        raise error(Code.CODE_NOT_FOUND, f"{directory} holds no key-value store")
    if in_use(Path(directory)):
        raise error(Code.CODE_BUSY, f"{directory} is in use: stop all managers and metadata services first")


async def _check_no_manager(store: KvStore) -> None:
    """Refuse a store whose manager's lease is being renewed. One that was killed shows after LEASE_WATCH_S."""

    async def read(txn: Transaction) -> bytes | None:
        return await txn.get(LEASE_KEY, snapshot=True)

    record = await retry.run(store, read)
    if record is None or ManagerLease.FromString(record).released:
        return
    click.echo(f"the last manager was not stopped in order: watching its lease for {LEASE_WATCH_S:.0f} s", err=True)
    seen = observe(None, record, time.monotonic_ns())
    while time.monotonic_ns() - seen.since_ns < LEASE_WATCH_S * 1e9:
        await asyncio.sleep(LEASE_POLL_S)
        now = observe(seen, await retry.run(store, read), time.monotonic_ns())
        if now is not seen:
            raise error(
                Code.CODE_BUSY, f"a manager is running ({ManagerLease.FromString(record).address}): stop it first"
            )


def _end_progress() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


def _progress(verb: str) -> Callable[[int, int], None]:
    """Say how far it is: one line that is redrawn on a terminal, else a line now and then."""
    terminal = sys.stderr.isatty()
    said_s = time.monotonic()

    def report(records: int, content_bytes: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= (PROGRESS_S / 10 if terminal else PROGRESS_S):
            said_s = time.monotonic()
            line = f"{verb} {records:,} records, {human_bytes(content_bytes)}"
            click.echo(f"\r\x1b[K{line}" if terminal else line, err=True, nl=not terminal)

    return report
