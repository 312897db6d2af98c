"""Which chains new files are put on."""

from __future__ import annotations

from collections import Counter

from fs3.core import settings
from fs3.core.layout import chains_of, place_of, width
from fs3.meta.routing import RoutingView
from fs3.v1 import meta_pb2 as pb
from fs3.v1.routing_pb2 import ChainTable, Routing
from meta.harness import CHUNK, FakeChunks, Meta, audit, run

MANY = list(range(1, 101))


def test_with_few_chains_a_file_is_on_all_with_many_its_stripe_grows() -> None:
    async def main() -> None:
        few = await Meta.start(chains=MANY[:16])
        layout = (await few.create("/f")).attr.layout
        assert (layout.stripe, layout.stripe_first, layout.stripe_max) == (16, 0, 0)
        many = await Meta.start(chains=MANY, chunks=FakeChunks(MANY))
        layout = (await many.create("/f")).attr.layout
        assert (layout.stripe, layout.stripe_first, layout.stripe_max) == (0, 16, 100)
        await many.do("Setattr", "/", stripe=20)
        layout = (await many.create("/g")).attr.layout
        assert (layout.stripe, layout.stripe_first, layout.stripe_max) == (20, 0, 0)

    run(main())


def test_the_newest_version_of_a_table_that_has_chains_counts_and_the_first_table_where_none_is_named() -> None:
    tables = [(3, 9, [1]), (2, 7, [1]), (2, 8, [1]), (2, 5, [1]), (2, 10, []), (1, 4, [])]
    routing = Routing(tables=[ChainTable(table_id=i, table_version=v, chain_ids=chains) for i, v, chains in tables])
    view = RoutingView.of(routing)
    newest = {number: table and table.table_version for number in range(5) for table in [view.newest_table(number)]}
    assert newest == {0: 8, 1: None, 2: 8, 3: 9, 4: None}


def test_settings_of_the_cluster_take_the_place_of_the_services_own() -> None:
    async def main() -> None:
        meta = await Meta.start()
        changed = Routing()
        changed.CopyFrom(meta.holder.view.routing)
        changed.version += 1
        changed.settings.values.update({settings.CHUNK_BYTES: "256KiB", settings.STRIPE: "2"})
        meta.holder.take(changed)
        layout = (await meta.create("/f")).attr.layout
        assert (layout.chunk_bytes, layout.stripe) == (256 << 10, 2)
        await meta.do("Setattr", "/", chunk_bytes=CHUNK, stripe=1)
        layout = (await meta.create("/g")).attr.layout
        assert (layout.chunk_bytes, layout.stripe) == (CHUNK, 1)

    run(main())


def test_files_are_spread_evenly() -> None:
    async def main() -> None:
        meta = await Meta.start(chains=MANY, chunks=FakeChunks(MANY))
        load: Counter[int] = Counter()
        for i in range(200):
            layout = (await meta.create(f"/{i}")).attr.layout
            load.update(chains_of(layout, MANY)[: width(layout, 0)])
        assert set(load) == set(MANY)
        assert max(load.values()) - min(load.values()) <= 1

    run(main())


def test_a_grown_file_is_cut_and_removed_on_all_its_chains() -> None:
    async def main() -> None:
        meta = await Meta.start(chains=MANY, chunks=FakeChunks(MANY))
        made = await meta.create("/f", open_write=True)
        chunks = 700
        meta.chunks.write(made.attr, chunks * CHUNK)
        assert len({chain for chain, _, _ in meta.chunks.chunks}) == 100
        report = pb.WriteReport(wrote=True, length=chunks * CHUNK)
        await meta.do("Close", inode=made.attr.inode, session=made.session, report=report)
        await meta.do("Truncate", "/f", length=200 * CHUNK + 1)
        assert sorted(meta.chunks.of(made.attr.inode)) == list(range(201))
        layout = made.attr.layout
        assert width(layout, 200) == 32
        held = {chain for chain, _, _ in meta.chunks.chunks}
        assert held == {chains_of(layout, MANY)[place_of(layout, index)] for index in range(201)}
        await meta.do("Unlink", "/f")
        await meta.collect()
        assert not meta.chunks.chunks
        await audit(meta)

    run(main())
