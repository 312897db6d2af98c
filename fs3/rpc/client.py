"""The frame protocol client: one connection, pipelined calls, a deadline on everything; and a pool by address."""

from __future__ import annotations

import asyncio
import os
from typing import Final, TypeVar, cast

from google.protobuf.message import DecodeError, Message

from fs3.core.errors import Fs3Error, error, from_detail
from fs3.rpc import frame
from fs3.v1.frame_pb2 import Code, ErrorDetail, HelloRequest, HelloResponse, Method, Role

M = TypeVar("M", bound=Message)

CONNECT_S: Final = 5.0
IN_FLIGHT_MAX: Final = 4096
# After a failed connection attempt others to the same address fail at once for this long.
RECONNECT_PAUSE_S: Final = 0.2


def split_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port" or "[v6]:port". Raises Fs3Error INVALID_ARGUMENT."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65536 or not host:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{address!r} is not an address; write host:port")
    return host.strip("[]"), int(port)


class _ClientProtocol(asyncio.Protocol):
    def __init__(self, address: str) -> None:
        self.address = address
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.waiting: dict[int, asyncio.Future[tuple[frame.Header, bytes, bytes]]] = {}
        self.closed = self.loop.create_future()
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._flush_scheduled = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.fail(error(Code.CODE_UNAVAILABLE, f"the connection to {self.address} was lost", maybe_applied=True))
        if not self.closed.done():
            self.closed.set_result(None)

    def fail(self, exc: Fs3Error) -> None:
        """Fail everything that waits and close."""
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(exc)
        self.waiting.clear()
        if self.transport is not None:
            self.transport.abort()

    def send(self, *parts: bytes) -> None:
        """Queue a frame; what is queued in one turn of the loop leaves in one write."""
        self._out.extend(parts)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        out, self._out = self._out, []
        if self.transport is not None:
            self.transport.write(out[0] if len(out) == 1 else b"".join(out))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= frame.HEADER_BYTES:
                header = frame.decode_header(buffer, at)
                if header.kind != frame.KIND_RESPONSE:
                    raise error(Code.CODE_PROTOCOL, "a server sent a request")
                end = at + header.frame_bytes
                if end > len(buffer):
                    break
                payload_at = at + frame.HEADER_BYTES + header.body_bytes
                body = bytes(buffer[at + frame.HEADER_BYTES : payload_at])
                payload = bytes(buffer[payload_at:end]) if header.payload_bytes else b""
                at = end
                self._deliver(header, body, payload)
        except Fs3Error as exc:
            self.fail(exc)
            return
        if at:
            del buffer[:at]

    def _deliver(self, header: frame.Header, body: bytes, payload: bytes) -> None:
        if header.request_id == 0 and header.status:
            # The server could not even read a request's header; it closes next.
            raise _parse_error(body, self.address)
        future = self.waiting.pop(header.request_id, None)
        if future is not None and not future.done():
            future.set_result((header, body, payload))


def _parse_error(body: bytes, address: str) -> Fs3Error:
    try:
        return from_detail(ErrorDetail.FromString(body))
    except DecodeError:
        return error(Code.CODE_PROTOCOL, f"{address} sent an error that cannot be parsed")


class FrameClient:
    """One authenticated connection. Belongs to one event loop; any number of tasks may call at once."""

    def __init__(self, protocol: _ClientProtocol) -> None:
        self._protocol = protocol
        self._next_id = 1
        self.hello = HelloResponse()

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        role: Role.ValueType = Role.ROLE_CLIENT,
        cluster_id: str = "",
        token: str = "",
        peer_id: bytes = b"",
        timeout_s: float = CONNECT_S,
    ) -> FrameClient:
        """Connect and say hello. `peer_id` is 16 bytes, random when empty.

        Raises Fs3Error: UNAVAILABLE, TIMEOUT, or what the server says against hello.
        """
        host, port = split_address(address)
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout_s
        try:
            async with asyncio.timeout_at(ends_s):
                _, protocol = await loop.create_connection(lambda: _ClientProtocol(address), host, port)
        except TimeoutError:
            raise error(Code.CODE_TIMEOUT, f"no connection to {address} within {timeout_s:g} s") from None
        except OSError as exc:
            raise error(Code.CODE_UNAVAILABLE, f"cannot connect to {address}: {exc.strerror or exc}") from None
        client = cls(protocol)
        hello = HelloRequest(
            protocol_min=frame.VERSION,
            protocol_max=frame.VERSION,
            cluster_id=cluster_id,
            role=role,
            peer_id=peer_id or os.urandom(16),
            token=token,
            transports=["tcp"],
        )
        try:
            left_s = max(0.001, ends_s - loop.time())
            client.hello, _ = await client.call(Method.METHOD_HELLO, hello, HelloResponse, left_s)
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def connected(self) -> bool:
        """Whether calls can still be made."""
        transport = self._protocol.transport
        return transport is not None and not transport.is_closing()

    async def call(
        self,
        method: int,
        request: Message,
        response_class: type[M],
        timeout: float,
        payload: bytes = b"",
    ) -> tuple[M, bytes]:
        """Send `request` and wait at most `timeout` seconds. Returns (response, payload).

        Raises the peer's Fs3Error; TIMEOUT (maybe applied) when no answer came; UNAVAILABLE when the
        connection is gone; BUSY when IN_FLIGHT_MAX calls wait already.
        """
        protocol = self._protocol
        if protocol.transport is None:
            raise error(Code.CODE_UNAVAILABLE, f"the connection to {protocol.address} is closed")
        if len(protocol.waiting) >= IN_FLIGHT_MAX:
            raise error(Code.CODE_BUSY, f"{IN_FLIGHT_MAX} calls to {protocol.address} are waiting already")
        body = request.SerializeToString()
        if len(body) > frame.BODY_BYTES_MAX or len(payload) > frame.PAYLOAD_BYTES_MAX:
            raise error(Code.CODE_MESSAGE_TOO_BIG, "the request is over the frame limits")
        request_id = self._next_id
        self._next_id += 1
        deadline_ms = min(frame.DEADLINE_MS_MAX, max(1, int(timeout * 1000)))
        loop = protocol.loop
        future: asyncio.Future[tuple[frame.Header, bytes, bytes]] = loop.create_future()
        protocol.waiting[request_id] = future
        head = frame.encode_request(request_id, method, deadline_ms, body, len(payload))
        protocol.send(head, payload) if payload else protocol.send(head)
        timer = loop.call_later(timeout, self._time_out, request_id, timeout)
        try:
            header, reply_body, reply_payload = await future
        finally:
            timer.cancel()
            protocol.waiting.pop(request_id, None)
        if header.status:
            raise _parse_error(reply_body, protocol.address)
        try:
            return response_class.FromString(reply_body), reply_payload
        except DecodeError:
            raise error(Code.CODE_PROTOCOL, f"{protocol.address} sent a reply that cannot be parsed") from None

    def _time_out(self, request_id: int, timeout: float) -> None:
        future = self._protocol.waiting.pop(request_id, None)
        if future is not None and not future.done():
            message = f"no answer from {self._protocol.address} within {timeout:g} s"
            future.set_exception(error(Code.CODE_TIMEOUT, message, maybe_applied=True))

    async def close(self) -> None:
        """Close; calls that wait fail with UNAVAILABLE."""
        protocol = self._protocol
        if protocol.transport is not None:
            protocol.transport.abort()
        await protocol.closed


class Peers:
    """Connections by address, made on demand and again after a loss. Belongs to one event loop."""

    def __init__(
        self,
        *,
        role: Role.ValueType,
        cluster_id: str = "",
        token: str = "",
        peer_id: bytes = b"",
        connect_s: float = CONNECT_S,
    ) -> None:
        self._role = role
        self._cluster_id = cluster_id
        self._token = token
        self._peer_id = peer_id or os.urandom(16)
        self._connect_s = connect_s
        self._clients: dict[str, FrameClient] = {}
        self._connecting: dict[str, asyncio.Task[FrameClient]] = {}
        self._failed: dict[str, tuple[float, Fs3Error]] = {}

    async def get(self, address: str) -> FrameClient:
        """Return the live connection to `address`. Concurrent callers share one attempt. Raises like connect."""
        client = self._clients.get(address)
        if client is not None and client.connected:
            return client
        loop = asyncio.get_running_loop()
        until_s, failure = self._failed.get(address, (0.0, None))
        if failure is not None and loop.time() < until_s:
            raise error(failure.code, failure.message)
        task = self._connecting.get(address)
        if task is None:
            task = self._connecting[address] = loop.create_task(self._connect(address))
        return await asyncio.shield(task)

    async def _connect(self, address: str) -> FrameClient:
        try:
            client = await FrameClient.connect(
                address,
                role=self._role,
                cluster_id=self._cluster_id,
                token=self._token,
                peer_id=self._peer_id,
                timeout_s=self._connect_s,
            )
        except Fs3Error as exc:
            self._failed[address] = (asyncio.get_running_loop().time() + RECONNECT_PAUSE_S, exc)
            raise
        finally:
            del self._connecting[address]
        self._failed.pop(address, None)
        self._clients[address] = client
        return client

    async def call(
        self,
        address: str,
        method: int,
        request: Message,
        response_class: type[M],
        timeout: float,
        payload: bytes = b"",
    ) -> tuple[M, bytes]:
        """:meth:`FrameClient.call` on the connection to `address`; connecting counts into `timeout`."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + timeout
        try:
            async with asyncio.timeout_at(ends_s):
                client = await self.get(address)
        except TimeoutError as exc:
            if isinstance(exc, Fs3Error):
                raise
            raise error(Code.CODE_TIMEOUT, f"no connection to {address} within {timeout:g} s") from None
        left_s = ends_s - loop.time()
        return await client.call(method, request, response_class, max(0.001, left_s), payload)

    async def close(self) -> None:
        """Close every connection."""
        for task in list(self._connecting.values()):
            task.cancel()
        await asyncio.gather(*self._connecting.values(), return_exceptions=True)
        clients, self._clients = list(self._clients.values()), {}
        for client in clients:
            await client.close()
