"""Directories that are durable namespaces of the KV cache: their chunks go with them."""

from __future__ import annotations

import json

import pytest

from fs3.core.clock import VirtualClock
from fs3.core.kv_namespaces import ATTRIBUTE, SPACE, durable_layout
from fs3.meta import keys
from fs3.v1.meta_pb2 import Layout
from meta.harness import CHAINS, CHUNK, Meta, audit, run

FIELDS = {"format": 2, "table": [1, 1], "first": 1, "chains": 2, "chunk_bytes": CHUNK, "replicas": 3}


def attribute(**changed: object) -> bytes:
    return json.dumps({**FIELDS, **changed}).encode()


async def namespace(meta: Meta, path: str = "/kv", value: bytes = attribute()) -> int:
    made = await meta.do("Mkdir", path, mode=0o755)
    await meta.do("Setxattr", path, name=ATTRIBUTE, value=value)
    return int(made.attr.inode)


def removals(meta: Meta, inode: int) -> set[int]:
    """Chains that were told to remove the entries."""
    return {call[1] for call in meta.chunks.calls if call[0] == "remove" and call[2:] == (inode, 0, SPACE)}


@pytest.mark.parametrize("how", ["rmdir", "rename"])
def test_an_empty_namespace_goes_through_the_queue_and_takes_its_chunks_along(how: str) -> None:
    async def main() -> None:
        meta = await Meta.start()
        inode = await namespace(meta)
        if how == "rmdir":
            await meta.do("Rmdir", "/kv")
        else:
            await meta.do("Mkdir", "/other", mode=0o755)
            await meta.rename("/other", "/kv")
        assert len(await meta.rows(keys.GC)) == 1
        await meta.collect()
        assert removals(meta, inode) == {CHAINS[1], CHAINS[2]}
        assert await meta.rows(keys.GC) == []
        await audit(meta)

    run(main())


def test_the_directory_stays_queued_until_every_chain_has_removed_its_entries() -> None:
    async def main() -> None:
        clock = VirtualClock()
        meta = await Meta.start(clock=clock)
        inode = await namespace(meta)
        meta.chunks.down = {CHAINS[2]}
        await meta.do("Rmdir", "/kv")
        await meta.engine.collector.step()
        assert len(await meta.rows(keys.GC)) == 1
        meta.chunks.down = set()
        await clock.advance(5)
        await meta.engine.collector.step()
        assert removals(meta, inode) == {CHAINS[1], CHAINS[2]}
        assert await meta.rows(keys.GC) == []

    run(main())


@pytest.mark.parametrize("value", [attribute(format=1), b"[]", b"nonsense", b"\xff", attribute(chains=1 << 40)])
def test_other_directories_are_removed_at_once(value: bytes) -> None:
    async def main() -> None:
        meta = await Meta.start()
        await namespace(meta, value=value)
        await meta.do("Rmdir", "/kv")
        assert await meta.rows(keys.GC) == []
        assert meta.chunks.calls == []
        await audit(meta)

    run(main())


def test_the_attribute_names_the_chains() -> None:
    expected = Layout(table_id=1, table_version=1, chunk_bytes=CHUNK, stripe=2, first=1)
    assert durable_layout(attribute()) == expected
    for wrong in (attribute(chains=0), attribute(chains="2"), attribute(table=[1]), attribute(first=-1), b"5", b"{}"):
        assert durable_layout(wrong) is None
