"""Walks through directories that got or lost a quota."""

import pytest

from fs3.meta import keys, model, quota_walk
from meta.harness import Meta, audit, run


async def populated() -> Meta:
    meta = await Meta.start()
    for i in range(5):
        await meta.do("Mkdir", f"/q/{i}", mode=0o755, parents=True)
        for j in range(5):
            await meta.write(f"/q/{i}/{j}", 10)
    return meta


def test_a_walk_goes_on_where_it_was_on_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota_walk, "PAGE_ENTRIES", 2)

    async def main() -> None:
        meta = await populated()
        peer = await meta.peer()
        quota = await meta.set_quota("/q")
        top = (await meta.stat("/q")).inode
        assert not await meta.engine.quota_walker._run(quota_walk._page, quota.id, top)
        walks = dict(await meta.rows(keys.QUOTA_WALK))
        assert model.decode_quota_walk(walks[keys.quota_walk(quota.id, top)]).after == b"1"
        assert (await meta.quotas("/q/1"))[0].inodes == 3
        assert await meta.quotas("/q/2") == []
        await peer.settle_quotas()
        assert await meta.used("/q/4/4") == (31, 250)
        await audit(meta)

    run(main())


def test_what_is_removed_during_a_walk_ends_it() -> None:
    async def main() -> None:
        meta = await populated()
        await meta.set_quota("/q")
        await meta.do("RemoveAll", "/q/3")
        await meta.do("RemoveAll", "/q")
        await meta.settle_quotas()
        await meta.collect()
        await meta.settle_quotas()
        assert await meta.rows(keys.QUOTA_WALK) == []
        assert await meta.rows(keys.QUOTA) == []
        await audit(meta)

    run(main())


def test_only_the_owner_of_a_directory_walks_it() -> None:
    async def main() -> None:
        meta = await populated()
        meta.engine.quota_walker.owns = lambda ino: False
        await meta.set_quota("/q")
        assert await meta.engine.quota_walker.step() == 0
        peer = await meta.peer()
        await peer.settle_quotas()
        assert await meta.used("/q") == (31, 250)

    run(main())
