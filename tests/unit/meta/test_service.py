"""The service as clients meet it: real connections on both doors, a cluster manager stub, memory storage."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fs3.core.config import MetaConfig
from fs3.core.errors import Fs3Error
from fs3.core.routing import diff, known, received
from fs3.kv.memory import MemoryKv
from fs3.meta import service
from fs3.meta.routing import RoutingHolder
from fs3.meta.service import MetaServer, node_uuid
from fs3.rpc.client import FrameClient
from fs3.rpc.grpc_client import make_channel, metadata
from fs3.rpc.grpc_common import from_rpc_error
from fs3.rpc.grpc_server import listen, make_server
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code, ErrorDetail, GetRoutingRequest, Method
from fs3.v1.meta_pb2_grpc import MetaStub
from fs3.v1.mgmtd_pb2 import HeartbeatResponse, RegisterResponse, UnregisterResponse
from fs3.v1.mgmtd_pb2_grpc import MgmtdServicer, add_MgmtdServicer_to_server
from fs3.v1.routing_pb2 import GetRoutingResponse, Routing
from meta.harness import CHAINS, FakeChunks, code, routing, run, until

TOKEN = "secret"


def config(**fields: Any) -> MetaConfig:
    return MetaConfig(cluster_id="test", token=TOKEN, kv="memory:", gc_delay_ms=0, mgmtd=("127.0.0.1:1",), **fields)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[MetaServer, RoutingHolder, FakeChunks]]:
    holder, chunks, store = RoutingHolder(), FakeChunks(), MemoryKv()
    holder.take(routing())
    server = MetaServer(config(), store, chunks, holder)
    await server.listen(TOKEN)
    server.joined(7)
    try:
        yield server, holder, chunks
    finally:
        await server.stop()
        await store.close()


@contextlib.asynccontextmanager
async def connected(server: MetaServer) -> AsyncIterator[FrameClient]:
    client = await FrameClient.connect(f"127.0.0.1:{server.frame_port}", token=TOKEN, cluster_id="test")
    try:
        yield client
    finally:
        await client.close()


def test_a_file_lives_its_whole_life_through_frames() -> None:
    async def main() -> None:
        async with serving() as (server, _, chunks), connected(server) as client:
            assert client.hello.node_id == 7

            async def call(method: int, request: Any, response: Any) -> Any:
                return (await client.call(method, request, response, 10))[0]

            client_id = b"c" * 16
            at = pb.PathAt(inode=1, path=b"f")
            op = iter(pb.OpId(client_id=client_id, sequence=i) for i in range(100))
            request = pb.CreateRequest(op=next(op), at=at, mode=0o644, open_write=True)
            made = await call(Method.METHOD_META_CREATE, request, pb.OpenResponse)
            again = await call(Method.METHOD_META_CREATE, request, pb.OpenResponse)
            assert made == again
            chunks.write(made.attr, 200_000)
            report = pb.WriteReport(wrote=True, length=200_000)
            close = pb.CloseRequest(op=next(op), inode=made.attr.inode, session=made.session, report=report)
            await call(Method.METHOD_META_CLOSE, close, pb.AttrResponse)
            attr = (await call(Method.METHOD_META_STAT, pb.StatRequest(at=at), pb.AttrResponse)).attr
            assert attr.length == 200_000
            unlink = pb.UnlinkRequest(op=next(op), at=at)
            await call(Method.METHOD_META_UNLINK, unlink, pb.UnlinkResponse)
            with pytest.raises(FileNotFoundError):
                await call(Method.METHOD_META_STAT, pb.StatRequest(at=at), pb.AttrResponse)
            keepalive = pb.KeepaliveRequest(client_id=client_id)
            assert (await call(Method.METHOD_META_KEEPALIVE, keepalive, pb.KeepaliveResponse)).interval_ms == 15_000
            await call(Method.METHOD_PING, ErrorDetail(), ErrorDetail)
            await until(lambda: not chunks.chunks)

    run(main())


def test_pipelined_requests_are_all_answered() -> None:
    async def main() -> None:
        async with serving() as (server, _, _), connected(server) as client:

            async def create(i: int) -> int:
                at = pb.PathAt(inode=1, path=b"f%d" % i)
                op = pb.OpId(client_id=b"c" * 16, sequence=i)
                request = pb.CreateRequest(op=op, at=at, mode=0o600, exclusive=True)
                reply, _ = await client.call(Method.METHOD_META_CREATE, request, pb.OpenResponse, 10)
                return reply.attr.inode

            inodes = await asyncio.gather(*(create(i) for i in range(200)))
            assert len(set(inodes)) == 200
            request = pb.ListRequest(at=pb.PathAt(inode=1), limit=4096, with_attr=True)
            page, _ = await client.call(Method.METHOD_META_LIST, request, pb.ListResponse, 10)
            assert {entry.inode for entry in page.entries} == set(inodes)

    run(main())


def test_routing_is_relayed_by_long_poll() -> None:
    async def main() -> None:
        async with serving() as (server, holder, _), connected(server) as client:

            async def poll(known: int, wait_ms: int) -> GetRoutingResponse:
                request = GetRoutingRequest(known_version=known, wait_ms=wait_ms)
                return (await client.call(Method.METHOD_GET_ROUTING, request, GetRoutingResponse, 20))[0]

            first = await poll(0, 0)
            assert first.version == 1
            assert first.routing.tables[0].chain_ids == CHAINS
            current = await poll(1, 0)
            assert current.version == 1
            assert not current.HasField("routing")
            assert not (await poll(1, 20)).HasField("routing")
            waiting = asyncio.create_task(poll(1, 15_000))
            await poll(1, 0)
            assert not waiting.done()
            holder.take(routing(version=2))
            assert (await waiting).routing.version == 2

    run(main())


def test_what_changed_is_relayed_to_who_says_what_he_knows() -> None:
    async def main() -> None:
        async with serving() as (server, holder, _), connected(server) as client:

            async def poll(base: Routing) -> GetRoutingResponse:
                request = GetRoutingRequest(known_version=base.version, known=known(base))
                return (await client.call(Method.METHOD_GET_ROUTING, request, GetRoutingResponse, 20))[0]

            old, new = routing(version=2), routing(version=3)
            old.history = new.history = 5
            new.disks[0].free_bytes += 1
            holder.take(old)
            assert received(old, await poll(old)) is None
            holder.take(new, diff(old, new))
            news = received(old, await poll(old))
            assert news is not None
            assert news.delta is not None
            assert news.routing == new
            assert (await poll(Routing())).routing == new
            status, _ = await client.call(Method.METHOD_META_STATUS, pb.MetaStatusRequest(), pb.MetaStatus, 20)
            assert (status.routing_sent.deltas, status.routing_sent.wholes) == (1, 1)

    run(main())


def test_grpc_serves_the_same_operations_with_the_same_errors() -> None:
    async def main() -> None:
        async with serving() as (server, _, _):
            channel = make_channel(f"127.0.0.1:{server.grpc_port}")
            try:
                stub: Any = MetaStub(channel)
                credentials = {"metadata": metadata(TOKEN, "test")}
                at = pb.PathAt(inode=1, path=b"d/e")
                request = pb.MkdirRequest(at=at, mode=0o755, parents=True)
                made = await stub.Mkdir(request, **credentials)
                assert (await stub.Stat(pb.StatRequest(at=at), **credentials)).attr == made.attr
                assert (await stub.GetRouting(GetRoutingRequest(), **credentials)).version == 1
                with pytest.raises(grpc.RpcError) as caught:
                    await stub.Rmdir(pb.RmdirRequest(at=pb.PathAt(inode=1, path=b"d")), **credentials)
                assert from_rpc_error(caught.value, "").code == Code.CODE_NOT_EMPTY
                for wrong in (metadata("", "test"), metadata(TOKEN, "other")):
                    with pytest.raises(grpc.RpcError) as caught:
                        await stub.Stat(pb.StatRequest(at=at), metadata=wrong)
                    expected = {Code.CODE_UNAUTHENTICATED, Code.CODE_WRONG_CLUSTER}
                    assert from_rpc_error(caught.value, "").code in expected
            finally:
                await channel.close()

    run(main())


def test_a_wrong_token_does_not_get_in() -> None:
    async def main() -> None:
        async with serving() as (server, _, _):
            address = f"127.0.0.1:{server.frame_port}"
            assert await code(FrameClient.connect(address, token="wrong")) == Code.CODE_UNAUTHENTICATED

    run(main())


class Manager(MgmtdServicer):
    """Knows one node and one routing."""

    def __init__(self) -> None:
        self.registered: list[Any] = []
        self.gone = asyncio.Event()

    async def Register(self, request: Any, context: Any) -> RegisterResponse:
        self.registered.append(request.node)
        return RegisterResponse(node_id=42, cluster_id="test", routing=routing(), heartbeat_ms=50)

    async def Heartbeat(self, request: Any, context: Any) -> HeartbeatResponse:
        return HeartbeatResponse(routing_version=1)

    async def WatchRouting(self, request: Any, context: Any) -> AsyncIterator[GetRoutingResponse]:
        yield GetRoutingResponse(version=2, routing=routing(version=2))
        await self.gone.wait()

    async def Unregister(self, request: Any, context: Any) -> UnregisterResponse:
        self.gone.set()
        return UnregisterResponse()


def test_the_process_joins_serves_and_leaves(tmp_path: Path) -> None:
    async def main() -> None:
        manager = Manager()
        control = make_server(token=TOKEN, cluster_id="test")
        add_MgmtdServicer_to_server(manager, control)  # type: ignore[no-untyped-call]
        port = await listen(control, "127.0.0.1", 0)
        ready = tmp_path / "ready.json"
        settings = MetaConfig(
            cluster_id="test",
            token=TOKEN,
            kv="memory:",
            mgmtd=(f"127.0.0.1:{port}",),
            ready_file=str(ready),
            data_dir=str(tmp_path / "meta"),
        )
        stop = asyncio.Event()
        store = MemoryKv()
        task = asyncio.create_task(service.serve(settings, store, stop))
        try:
            await until(ready.exists)
            says = json.loads(ready.read_text())
            assert says["node_id"] == 42
            client = await FrameClient.connect(f"127.0.0.1:{says['frame_port']}", token=TOKEN)
            request = GetRoutingRequest(known_version=1, wait_ms=10_000)
            reply, _ = await client.call(Method.METHOD_GET_ROUTING, request, GetRoutingResponse, 15)
            assert reply.routing.version == 2
            await client.close()
            node = manager.registered[0]
            assert (node.role, node.frame_port, node.uuid) == ("meta", says["frame_port"], node_uuid(settings))
        finally:
            stop.set()
            await asyncio.wait_for(task, 20)
            await control.stop(0)
        assert manager.gone.is_set()

    run(main())


def test_node_identity_is_kept(tmp_path: Path) -> None:
    kept = config(data_dir=str(tmp_path / "a"))
    assert node_uuid(kept) == node_uuid(kept) != node_uuid(config(data_dir=str(tmp_path / "b")))
    assert node_uuid(config(frame_port=5)) == node_uuid(config(frame_port=5)) != node_uuid(config(frame_port=6))
    (tmp_path / "a" / "node_uuid").write_text("rubbish")
    with pytest.raises(Fs3Error, match="holds no uuid"):
        node_uuid(kept)
