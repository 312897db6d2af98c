"""Whether a store is in use, as far as its contents tell."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from fs3.cli import admin
from fs3.core.errors import Fs3Error
from fs3.kv.memory import MemoryKv
from fs3.mgmtd import lease
from fs3.mgmtd.state import LEASE_KEY
from fs3.v1.disk_mgmtd_pb2 import ManagerLease
from fs3.v1.frame_pb2 import Code

HELD = lease.taken(None, b"h" * 16, "10.0.0.1:9000")


async def put(store: MemoryKv, record: ManagerLease) -> None:
    txn = store.transaction()
    txn.set(LEASE_KEY, record.SerializeToString())
    await txn.commit()


def test_a_manager_that_renews_its_lease_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "LEASE_POLL_S", 0.0)
    monkeypatch.setattr(admin, "LEASE_WATCH_S", 60.0)

    async def main() -> None:
        store = MemoryKv()
        await put(store, HELD)

        async def renew() -> None:
            held = HELD
            while True:
                held = lease.renewed(held)
                await put(store, held)

        manager = asyncio.create_task(renew())
        with pytest.raises(Fs3Error, match=r"a manager is running \(10\.0\.0\.1:9000\)") as caught:
            await admin._check_no_manager(store)
        assert caught.value.code == Code.CODE_BUSY
        manager.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await manager

    asyncio.run(main())


@pytest.mark.parametrize("record", [None, lease.released(HELD), HELD])
def test_a_lease_that_is_given_back_or_stands_still_is_no_manager(
    record: ManagerLease | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One that stands still is watched for this long; the others are not.
    monkeypatch.setattr(admin, "LEASE_WATCH_S", 0.0 if record is HELD else 1e9)

    async def main() -> None:
        store = MemoryKv()
        if record is not None:
            await put(store, record)
        await admin._check_no_manager(store)

    asyncio.run(main())
