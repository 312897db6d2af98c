"""Damage to quotas: found, repaired, and nothing is found afterwards."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from fs3.meta import keys, model
from fs3.v1 import meta_pb2 as pb
from fs3.v1.disk_meta_pb2 import QuotaRecord
from meta.fsck.harness import change, fsck, kinds, record, store
from meta.harness import Meta, audit, run

Damage = Callable[[Meta], Awaitable[None]]


async def populated() -> Meta:
    """A quota of /q, one of /q/i inside it, files in both and in /q/d/e."""
    meta = await Meta.start()
    for path in ("/q/i", "/q/d/e"):
        await meta.do("Mkdir", path, mode=0o755, parents=True)
    await meta.set_quota("/q")
    await meta.set_quota("/q/i")
    for path in ("/q/f", "/q/i/f", "/q/d/e/f"):
        await meta.write(path, 100)
    await meta.settle_quotas()
    return meta


async def restamp(meta: Meta, path: str, quota: int) -> None:
    found = await record(meta, (await meta.stat(path)).inode)
    found.quota = quota
    await store(meta, found)


async def a_counter_is_wrong(meta: Meta) -> None:
    (inner, _) = await meta.quotas("/q/i")
    key = keys.quota_counter(inner.id, 0, 1, 5)
    await change(meta, sets={key: (1000).to_bytes(8, "little")})


async def counters_are_lost(meta: Meta) -> None:
    await change(meta, clears=tuple(key for key, _ in await meta.rows(keys.QUOTA_COUNTER)))


async def a_file_has_another_stamp_than_its_directory(meta: Meta) -> None:
    await restamp(meta, "/q/f", 0)


async def a_directory_has_another_stamp_than_what_is_in_it(meta: Meta) -> None:
    await restamp(meta, "/q/d", 0)


async def a_directory_has_lost_its_quota(meta: Meta) -> None:
    await restamp(meta, "/q/i", (await meta.quotas("/q"))[0].id)


async def a_quota_belongs_to_nothing(meta: Meta) -> None:
    stray = QuotaRecord(format=model.FORMAT, id=77 << 12, directory=78 << 12, state=pb.QUOTA_STATE_ACTIVE)
    await change(meta, sets={keys.quota(stray.id): stray.SerializeToString()})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (a_counter_is_wrong, ["quota-counters"]),
        (counters_are_lost, ["quota-counters", "quota-counters"]),
        (a_file_has_another_stamp_than_its_directory, ["quota-counters", "quota-stamp"]),
        (a_directory_has_another_stamp_than_what_is_in_it, ["quota-counters", "quota-stamp", "quota-stamp"]),
        (a_directory_has_lost_its_quota, ["quota-counters", "quota-stamp", "stray-quota"]),
        (a_quota_belongs_to_nothing, ["stray-quota"]),
    ],
)
def test_damage_is_found_and_repaired(damage: Damage, expected: list[str]) -> None:
    async def main() -> None:
        meta = await populated()
        await damage(meta)
        assert await kinds(meta) == expected
        repaired = await fsck(meta, repair=True)
        assert repaired.unrepaired == 0
        await meta.settle_quotas()
        await fsck(meta, repair=True)
        assert await kinds(meta) == []
        await audit(meta)

    run(main())


def test_what_waits_to_be_walked_is_not_reported() -> None:
    async def main() -> None:
        meta = await populated()
        await meta.set_quota("/q/d")
        await meta.do("QuotaSet", "/q", clear=True)
        assert await kinds(meta) == []
        await meta.engine.quota_walker._round(settling=False)
        report = await fsck(meta)
        assert report.findings == []
        await meta.settle_quotas()
        assert await kinds(meta) == []

    run(main())


def test_a_file_that_finds_a_place_in_lost_found_is_counted_there() -> None:
    async def main() -> None:
        meta = await populated()
        await change(meta, clears=(keys.dirent((await meta.stat("/q")).inode, b"f"),))
        assert (await fsck(meta, repair=True)).unrepaired == 0
        (name,) = await meta.names("/lost+found")
        assert await meta.quotas(f"/lost+found/{name.decode()}") == []
        assert await meta.used("/q") == (6, 200)
        assert (await meta.quotas("/q"))[0].state == pb.QUOTA_STATE_ACTIVE
        await audit(meta)

    run(main())
