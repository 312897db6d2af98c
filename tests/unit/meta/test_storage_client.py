"""The chunk control client against a network of fake storage nodes."""

from __future__ import annotations

import asyncio
from typing import Any

from fs3.core.clock import RealClock
from fs3.core.errors import Fs3Error, error
from fs3.meta.routing import RoutingHolder
from fs3.meta.storage_client import StorageClient
from fs3.v1.frame_pb2 import Code, Method
from fs3.v1.meta_pb2 import Layout
from fs3.v1.routing_pb2 import Chain, ChainTable, ChainTarget, Node, PublicState, Routing, Target
from fs3.v1.storage_pb2 import QueryLastResponse, RemoveResponse, WriteResponse
from meta.harness import code, run

SERVING, OFFLINE = PublicState.PUBLIC_STATE_SERVING, PublicState.PUBLIC_STATE_OFFLINE


def routing(version: int, order: list[int], chain_version: int, states: list[int] | None = None) -> Routing:
    states = states or [SERVING] * len(order)
    return Routing(
        version=version,
        nodes=[Node(node_id=i, role="storage", host=f"host{i}", frame_port=9000) for i in (1, 2, 3)],
        targets=[Target(target_id=i * 1000, node_id=i, chain_id=5) for i in (1, 2, 3)],
        chains=[
            Chain(
                chain_id=5,
                version=chain_version,
                targets=[ChainTarget(target_id=i * 1000, state=s) for i, s in zip(order, states, strict=True)],
            )
        ],
        tables=[ChainTable(table_id=1, table_version=1, chain_ids=[5, 6])],
    )


class Network:
    """Answers of the nodes by script: exceptions are raised, everything else is returned."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.requests: list[tuple[str, int, Any]] = []

    async def call(
        self, address: str, method: int, request: Any, response_class: Any, timeout: float, payload: bytes = b""
    ) -> Any:
        assert timeout > 0
        self.requests.append((address, method, request))
        await asyncio.sleep(0)
        answer = self.script.pop(0)
        if callable(answer):
            answer = answer()
        if isinstance(answer, Fs3Error):
            raise answer
        return answer, b""


def client(network: Network, holder: RoutingHolder) -> StorageClient:
    return StorageClient(network, holder, RealClock(), b"m" * 16)


def soon(seconds: float = 10.0) -> float:
    return RealClock().monotonic_ns() * 1e-9 + seconds


def test_updates_go_to_the_head_with_chain_version_and_writer() -> None:
    async def main() -> None:
        holder = RoutingHolder()
        holder.take(routing(1, [2, 1, 3], 9))
        network = Network(RemoveResponse(removed_chunks=4), WriteResponse())
        storage = client(network, holder)
        assert await storage.remove(5, 77, 3, ends_s=soon()) == 4
        await storage.truncate_chunk(5, 77, 2, chunk_bytes=65536, length=10, ends_s=soon())
        (address, method, request), (_, second_method, second) = network.requests
        assert (address, method) == ("host2:9000", Method.METHOD_STORAGE_REMOVE)
        assert (request.chain_version, request.target_id, request.inode) == (9, 2000, 77)
        assert (request.first_index, request.last_index) == (3, 0xFFFF_FFFF)
        assert second_method == Method.METHOD_STORAGE_TRUNCATE
        assert second.chunk_id == bytes(4) + (77).to_bytes(8, "big") + (2).to_bytes(4, "big")
        assert second.writer.sequence > request.writer.sequence

    run(main())


def test_a_retry_follows_the_routing_and_repeats_the_writer() -> None:
    async def main() -> None:
        holder = RoutingHolder()
        holder.take(routing(1, [2, 1, 3], 9))

        def failover() -> Fs3Error:
            holder.take(routing(2, [1, 3, 2], 10, [SERVING, SERVING, OFFLINE]))
            return error(Code.CODE_STALE_CHAIN, "stale", routing_version=2)

        network = Network(error(Code.CODE_TIMEOUT, "lost", maybe_applied=True), failover, RemoveResponse())
        await client(network, holder).remove(5, 77, 0, ends_s=soon())
        assert [address for address, _, _ in network.requests] == ["host2:9000", "host2:9000", "host1:9000"]
        assert network.requests[2][2].chain_version == 10
        writers = {r.writer.SerializeToString() for _, _, r in network.requests}
        assert len(writers) == 1

    run(main())


def test_concurrent_requests_use_different_channels() -> None:
    async def main() -> None:
        holder = RoutingHolder()
        holder.take(routing(1, [1, 2, 3], 1))
        network = Network(*[RemoveResponse()] * 300)
        storage = client(network, holder)
        await asyncio.gather(*(storage.remove(5, i, 0, ends_s=soon()) for i in range(300)))
        first = [r.writer.channel for _, _, r in network.requests[:256]]
        assert len(set(first)) == 256
        assert len({r.writer.sequence for _, _, r in network.requests}) == 300

    run(main())


def test_queries_try_every_serving_replica() -> None:
    async def main() -> None:
        holder = RoutingHolder()
        holder.take(routing(1, [3, 1, 2], 1, [SERVING, SERVING, OFFLINE]))
        network = Network(
            error(Code.CODE_NOT_SERVING, "lease"),
            error(Code.CODE_UNAVAILABLE, "down"),
            QueryLastResponse(found=True, index=8, length=5),
            QueryLastResponse(found=False),
        )
        storage = client(network, holder)
        assert await storage.query_last(5, 77, ends_s=soon()) == (8, 5)
        assert await storage.query_last(5, 77, ends_s=soon()) is None
        assert [address for address, _, _ in network.requests][:3] == ["host3:9000", "host1:9000", "host3:9000"]

    run(main())


def test_no_answer_ends_at_the_deadline_and_bugs_at_once() -> None:
    async def main() -> None:
        holder = RoutingHolder()
        storage = client(Network(), holder)
        assert await code(storage.remove(5, 77, 0, ends_s=soon(0.1))) == Code.CODE_UNAVAILABLE
        holder.take(routing(1, [1, 2, 3], 1))
        network = Network(error(Code.CODE_INVALID_ARGUMENT, "bug"))
        assert await code(client(network, holder).remove(5, 77, 0, ends_s=soon())) == Code.CODE_INVALID_ARGUMENT
        assert len(network.requests) == 1

    run(main())


def test_a_chain_without_serving_replica_is_waited_for() -> None:
    async def main() -> None:
        holder = RoutingHolder()
        holder.take(routing(1, [1, 2, 3], 1, [OFFLINE] * 3))
        network = Network(RemoveResponse(removed_chunks=1))
        task = asyncio.create_task(client(network, holder).remove(5, 77, 0, ends_s=soon()))
        await asyncio.sleep(0)
        assert not network.requests
        holder.take(routing(2, [1, 2, 3], 2))
        assert await task == 1

    run(main())


def test_stripe_comes_from_the_table_version_of_the_layout() -> None:
    holder = RoutingHolder()
    holder.take(routing(1, [1, 2, 3], 1))
    storage = client(Network(), holder)
    assert storage.stripe(Layout(table_id=1, table_version=1, stripe=2, first=1)) == [6, 5]


def test_an_unknown_table_is_unavailable() -> None:
    async def main() -> None:
        storage = client(Network(), RoutingHolder())

        async def stripe() -> None:
            storage.stripe(Layout(table_id=1, table_version=1, stripe=2))

        assert await code(stripe()) == Code.CODE_UNAVAILABLE

    run(main())
