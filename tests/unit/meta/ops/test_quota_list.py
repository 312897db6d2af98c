from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run, user


def test_pages_cover_every_quota_once() -> None:
    async def main() -> None:
        meta = await Meta.start()
        for i in range(7):
            await meta.mkdir(f"/d{i}")
            await meta.set_quota(f"/d{i}")
        found, after = [], 0
        while True:
            page = await meta.do("QuotaList", after=after, limit=3)
            found += [quota.path for quota in page.quotas]
            if page.end:
                break
            after = page.quotas[-1].id
        assert sorted(found) == [f"/d{i}".encode() for i in range(7)]
        assert await meta.code("QuotaList", caller=user(7)) == Code.CODE_NOT_PERMITTED
        assert (await meta.do("QuotaList", after=(1 << 64) - 1)).end

    run(main())
