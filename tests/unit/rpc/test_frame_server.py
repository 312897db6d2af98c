"""Server and client of the frame protocol over real sockets."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from fs3.core.errors import Fs3Error, NotFound, TimedOut, error
from fs3.rpc import frame
from fs3.rpc.client import FrameClient, Peers
from fs3.rpc.server import Context, FrameServer, Identity, Reply, ServerLimits
from fs3.v1.frame_pb2 import (
    Code,
    ErrorDetail,
    GetRoutingRequest,
    HelloRequest,
    HelloResponse,
    Method,
    Role,
)

ECHO, WAIT, FAIL, BUG, GATE, TIMEOUT_SCOPE = 1000, 1001, 1002, 1003, 1004, 1005
TOKEN = "secret"


class Harness:
    """A server with handlers that show each behaviour."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.started = 0
        self.cancelled = 0
        self.running = 0
        self.running_max = 0

    async def echo(self, ctx: Context, request: GetRoutingRequest) -> Reply:
        return request, ctx.payload

    async def wait(self, ctx: Context, request: GetRoutingRequest) -> Reply:
        await asyncio.sleep(request.wait_ms / 1000)
        return request

    async def fail(self, ctx: Context, request: GetRoutingRequest) -> Reply:
        raise error(Code.CODE_NOT_FOUND, "no such thing", routing_version=7)

    async def bug(self, ctx: Context, request: GetRoutingRequest) -> Reply:
        raise KeyError("a bug")

    async def gated(self, ctx: Context, request: GetRoutingRequest) -> Reply:
        self.started += 1
        self.running += 1
        self.running_max = max(self.running, self.running_max)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return request

    async def timeout_scope(self, ctx: Context, request: GetRoutingRequest) -> Reply:
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            request.known_version += 1
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(0))
        return request

    def server(self, limits: ServerLimits | None = None) -> FrameServer:
        handlers: Any = {
            ECHO: self.echo,
            WAIT: self.wait,
            FAIL: self.fail,
            BUG: self.bug,
            GATE: self.gated,
            TIMEOUT_SCOPE: self.timeout_scope,
        }
        identity = Identity("c1", Role.ROLE_META, node_id=3, token=TOKEN, version="1")
        return FrameServer(identity, {m: (GetRoutingRequest, f) for m, f in handlers.items()}, limits)


def run(body: Callable[[Harness, FrameServer, str], Awaitable[None]], limits: ServerLimits | None = None) -> None:
    async def main() -> None:
        harness = Harness()
        server = harness.server(limits)
        port = await server.start("127.0.0.1")
        try:
            async with asyncio.timeout(20):
                await body(harness, server, f"127.0.0.1:{port}")
        finally:
            harness.gate.set()
            await server.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def connect(address: str, **kwargs: Any) -> FrameClient:
    return await FrameClient.connect(address, **{"token": TOKEN, "cluster_id": "c1", **kwargs})


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def hello_frame(**changes: Any) -> bytes:
    hello = HelloRequest(
        protocol_min=1, protocol_max=1, cluster_id="c1", role=Role.ROLE_CLIENT, peer_id=bytes(16), token=TOKEN
    )
    for name, value in changes.items():
        setattr(hello, name, value)
    return frame.encode_request(1, Method.METHOD_HELLO, 1000, hello.SerializeToString())


async def raw_reply(reader: asyncio.StreamReader) -> tuple[frame.Header, bytes]:
    header = frame.decode_header(await reader.readexactly(frame.HEADER_BYTES))
    return header, await reader.readexactly(header.body_bytes + header.payload_bytes)


async def raw(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = address.split(":")
    return await asyncio.open_connection(host, int(port))


def test_body_and_payload_come_back_unchanged() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        assert client.hello.node_id == 3
        assert client.hello.transport == "tcp"
        payload = os.urandom(3 << 20)
        reply, back = await client.call(ECHO, GetRoutingRequest(known_version=9), GetRoutingRequest, 5, payload)
        assert reply.known_version == 9
        assert back == payload
        await client.close()

    run(body)


def test_replies_come_out_of_order_on_one_connection() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        slow = asyncio.create_task(client.call(GATE, GetRoutingRequest(known_version=1), GetRoutingRequest, 10))
        await until(lambda: h.started == 1)
        fast = [client.call(ECHO, GetRoutingRequest(known_version=i), GetRoutingRequest, 5) for i in range(200)]
        assert [r.known_version for r, _ in await asyncio.gather(*fast)] == list(range(200))
        assert not slow.done()
        h.gate.set()
        assert (await slow)[0].known_version == 1
        await client.close()

    run(body)


def test_errors_of_handlers_keep_their_class_and_hints() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        with pytest.raises(NotFound) as found:
            await client.call(FAIL, GetRoutingRequest(), GetRoutingRequest, 5)
        assert found.value.routing_version == 7
        with pytest.raises(Fs3Error) as bug:
            await client.call(BUG, GetRoutingRequest(), GetRoutingRequest, 5)
        assert bug.value.code == Code.CODE_INTERNAL
        assert "a bug" not in bug.value.message
        with pytest.raises(Fs3Error) as unknown:
            await client.call(9999, GetRoutingRequest(), GetRoutingRequest, 5)
        assert unknown.value.code == Code.CODE_UNIMPLEMENTED
        await client.call(Method.METHOD_PING, ErrorDetail(), ErrorDetail, 5)
        await client.close()

    run(body)


def test_a_request_beyond_its_deadline_is_cancelled_and_answered() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        reader, writer = await raw(address)
        writer.write(hello_frame() + frame.encode_request(2, GATE, 20, b""))
        await raw_reply(reader)
        header, detail = await raw_reply(reader)
        assert (header.request_id, header.status) == (2, Code.CODE_TIMEOUT)
        assert ErrorDetail.FromString(detail).maybe_applied
        assert h.cancelled == 1
        writer.close()

    run(body)


def test_each_of_several_requests_ends_at_its_own_deadline_whatever_the_order_they_came_in() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        reader, writer = await raw(address)
        deadlines_ms = {2: 90, 3: 30, 4: 60_000, 5: 60, 6: 30}
        writer.write(hello_frame() + b"".join(frame.encode_request(i, GATE, ms, b"") for i, ms in deadlines_ms.items()))
        await raw_reply(reader)
        ended = [(await raw_reply(reader))[0] for _ in range(4)]
        assert all(header.status == Code.CODE_TIMEOUT for header in ended)
        assert {header.request_id for header in ended} == {2, 3, 5, 6}
        assert (h.cancelled, h.running) == (4, 1)
        h.gate.set()
        header, _ = await raw_reply(reader)
        assert (header.request_id, header.status) == (4, 0)
        writer.close()

    run(body)


def test_the_client_gives_up_at_its_own_deadline() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        with pytest.raises(TimedOut):
            await client.call(GATE, GetRoutingRequest(), GetRoutingRequest, 0.02)
        await client.close()

    run(body)


def test_timeout_scopes_and_task_groups_work_in_handlers() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        reply, _ = await client.call(TIMEOUT_SCOPE, GetRoutingRequest(known_version=4), GetRoutingRequest, 5)
        assert reply.known_version == 5
        await client.close()

    run(body)


def test_requests_in_flight_are_bounded_and_all_are_served() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        calls = [
            asyncio.create_task(client.call(GATE, GetRoutingRequest(known_version=i), GetRoutingRequest, 10))
            for i in range(50)
        ]
        await until(lambda: h.started == 4)
        await client_idle(client)
        assert h.running_max == 4
        h.gate.set()
        assert [(await c)[0].known_version for c in calls] == list(range(50))
        assert h.running_max == 4
        await client.close()

    async def client_idle(client: FrameClient) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    run(body, ServerLimits(in_flight_max=4))


def test_a_peer_that_leaves_has_its_requests_cancelled() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        call = asyncio.create_task(client.call(GATE, GetRoutingRequest(), GetRoutingRequest, 10))
        await until(lambda: h.started == 1)
        await client.close()
        with pytest.raises(Fs3Error) as lost:
            await call
        assert lost.value.code == Code.CODE_UNAVAILABLE
        assert lost.value.maybe_applied
        await until(lambda: h.cancelled == 1)

    run(body)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"token": "wrong"}, Code.CODE_UNAUTHENTICATED),
        ({"token": ""}, Code.CODE_UNAUTHENTICATED),
        ({"cluster_id": "other"}, Code.CODE_WRONG_CLUSTER),
        ({"protocol_min": 2, "protocol_max": 3}, Code.CODE_PROTOCOL),
        ({"role": 0}, Code.CODE_INVALID_ARGUMENT),
        ({"peer_id": b"short"}, Code.CODE_INVALID_ARGUMENT),
    ],
)
def test_a_wrong_hello_is_refused_and_the_connection_closed(change: dict[str, Any], code: int) -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        reader, writer = await raw(address)
        writer.write(hello_frame(**change))
        header, detail = await raw_reply(reader)
        assert header.status == code
        assert ErrorDetail.FromString(detail).message
        assert await reader.read() == b""
        writer.close()

    run(body)


def test_an_empty_cluster_id_learns_the_clusters() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address, cluster_id="")
        assert client.hello.cluster_id == "c1"
        await client.close()

    run(body)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame.encode_request(5, ECHO, 0, b""), Code.CODE_UNAUTHENTICATED),
        (frame.encode_header(frame.Header(1, 5, 0, 0, 0, 65_537, 0)), Code.CODE_MESSAGE_TOO_BIG),
        (frame.encode_header(frame.Header(1, 5, 0, 0, 0, 40_000, 40_000)), Code.CODE_MESSAGE_TOO_BIG),
        (b"GET / HTTP/1.1\r\nHost: somewhere.example\r\n\r\n", Code.CODE_PROTOCOL),
        (frame.encode_response(5, ECHO, 0, b""), Code.CODE_PROTOCOL),
    ],
)
def test_strangers_get_one_error_and_are_closed(sent: bytes, code: int) -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        reader, writer = await raw(address)
        writer.write(sent)
        header, _ = await raw_reply(reader)
        assert header.status == code
        assert await reader.read() == b""
        writer.close()

    run(body)


def test_an_oversized_frame_of_a_known_peer_names_its_request() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        reader, writer = await raw(address)
        writer.write(hello_frame() + frame.encode_header(frame.Header(1, 77, ECHO, 0, 0, frame.BODY_BYTES_MAX + 1, 0)))
        await raw_reply(reader)
        header, _ = await raw_reply(reader)
        assert (header.request_id, header.status) == (77, Code.CODE_MESSAGE_TOO_BIG)
        writer.close()

    run(body)


def test_silent_and_half_sent_and_idle_connections_are_closed() -> None:
    limits = ServerLimits(hello_s=0.05, partial_frame_s=0.05, idle_s=0.2, sweep_s=0.01)

    async def body(h: Harness, s: FrameServer, address: str) -> None:
        silent, silent_writer = await raw(address)
        assert await silent.read() == b""
        silent_writer.close()
        half, half_writer = await raw(address)
        half_writer.write(hello_frame() + frame.encode_request(2, ECHO, 0, b"")[:20])
        await raw_reply(half)
        assert await half.read() == b""
        half_writer.close()
        idle, idle_writer = await raw(address)
        idle_writer.write(hello_frame())
        await raw_reply(idle)
        assert await idle.read() == b""
        idle_writer.close()
        await until(lambda: not list(s.connections))

    run(body, limits)


def test_a_frame_may_arrive_byte_by_byte() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        reader, writer = await raw(address)
        request = GetRoutingRequest(known_version=3).SerializeToString()
        for byte in hello_frame() + frame.encode_request(2, ECHO, 0, request, 3) + b"abc":
            writer.write(bytes([byte]))
            await writer.drain()
        await raw_reply(reader)
        header, data = await raw_reply(reader)
        assert header.request_id == 2
        assert data == request + b"abc"
        writer.close()

    run(body)


def test_a_peer_that_does_not_read_its_replies_is_not_served_further() -> None:
    limits = ServerLimits(unsent_bytes_max=1 << 16)

    async def body(h: Harness, s: FrameServer, address: str) -> None:
        reader, writer = await raw(address)
        writer.write(hello_frame())
        await raw_reply(reader)
        payload = bytes(1 << 20)
        count = 64
        sender = asyncio.create_task(send_all(writer, payload, count))
        for i in range(count):
            header, data = await raw_reply(reader)
            assert header.request_id == i
            assert data == payload
        await sender
        writer.close()

    async def send_all(writer: asyncio.StreamWriter, payload: bytes, count: int) -> None:
        for i in range(count):
            writer.write(frame.encode_request(i, ECHO, 0, b"", len(payload)) + payload)
            await writer.drain()

    run(body, limits)


def test_the_pool_shares_one_connection_and_makes_a_new_one_after_a_loss() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        peers = Peers(role=Role.ROLE_META, cluster_id="c1", token=TOKEN)
        await asyncio.gather(*(peers.call(address, ECHO, GetRoutingRequest(), GetRoutingRequest, 5) for _ in range(10)))
        (connection,) = s.connections
        connection.close(abort=True)
        client = await peers.get(address)
        await until(lambda: not client.connected)
        reply, _ = await peers.call(address, ECHO, GetRoutingRequest(known_version=2), GetRoutingRequest, 5)
        assert reply.known_version == 2
        await peers.close()

    run(body)


def test_the_pool_reports_an_address_nobody_listens_on() -> None:
    async def main() -> None:
        peers = Peers(role=Role.ROLE_CLIENT)
        for _ in range(2):
            with pytest.raises(Fs3Error) as gone:
                await peers.call("127.0.0.1:1", ECHO, GetRoutingRequest(), GetRoutingRequest, 5)
            assert gone.value.code == Code.CODE_UNAVAILABLE
        await peers.close()

    asyncio.run(main())


def test_stopping_answers_what_is_running() -> None:
    async def body(h: Harness, s: FrameServer, address: str) -> None:
        client = await connect(address)
        call = asyncio.create_task(client.call(GATE, GetRoutingRequest(known_version=8), GetRoutingRequest, 10))
        await until(lambda: h.started == 1)
        stopping = asyncio.create_task(s.stop())
        await asyncio.sleep(0)
        h.gate.set()
        assert (await call)[0].known_version == 8
        await stopping
        with pytest.raises(Fs3Error):
            await connect(address)
        await client.close()

    run(body)


def test_hello_response_parses_as_sent() -> None:
    reply = HelloResponse(protocol=1, cluster_id="x")
    assert HelloResponse.FromString(reply.SerializeToString()) == reply
