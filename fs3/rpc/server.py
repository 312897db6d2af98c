"""The frame protocol server: one uvloop `Protocol` per connection, pipelined requests, replies out of order.

A handler is ``async def handler(ctx, request) -> response | (response, payload)``. It is driven inline until its
first real suspension, so that a handler that does not wait costs no task. Replies that become ready in one turn
of the loop leave in one write. Every connection has named limits: frame sizes before allocation, requests in
flight, unsent reply bytes (beyond either, reading pauses), time for hello, time for a frame to be complete,
idle time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from asyncio import tasks as _tasks
from collections.abc import Callable, Coroutine, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

from google.protobuf.message import DecodeError, Message

from fs3.core.errors import Fs3Error, error
from fs3.rpc import frame
from fs3.v1.frame_pb2 import Code, ErrorDetail, HelloRequest, HelloResponse, Method, Role

log = logging.getLogger("fs3.rpc.server")

Buffer: TypeAlias = bytes | bytearray | memoryview
Reply: TypeAlias = Message | tuple[Message, Buffer]
HandlerFn: TypeAlias = Callable[["Context", Any], Coroutine[Any, Any, Reply]]
Handlers: TypeAlias = Mapping[int, tuple[type[Message], HandlerFn]]

_HELLO: Final = int(Method.METHOD_HELLO)


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Every bound of a server. Times are seconds."""

    frame: frame.Limits = frame.LIMITS
    connections_max: int = 16_384
    in_flight_max: int = 1024
    unsent_bytes_max: int = 8 << 20
    hello_s: float = 10.0
    partial_frame_s: float = 30.0
    idle_s: float = 900.0
    # Longest time a request may run, also when the requester would wait longer or names no deadline.
    deadline_s: float = 60.0
    stop_grace_s: float = 5.0
    sweep_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this server is and whom it lets in. An empty token lets everybody in."""

    cluster_id: str
    role: Role.ValueType
    node_id: int = 0
    token: str = ""
    version: str = ""
    roles_allowed: frozenset[int] = field(
        default_factory=lambda: frozenset({Role.ROLE_CLIENT, Role.ROLE_META, Role.ROLE_STORAGE, Role.ROLE_MGMTD})
    )


class Context:
    """What a handler may know of its request. `deadline_s` is on the clock of ``loop.time()``."""

    __slots__ = ("connection", "deadline_s", "method", "payload", "request_id")

    def __init__(
        self, connection: ServerConnection, request_id: int, method: int, deadline_s: float, payload: bytes
    ) -> None:
        self.connection = connection
        self.request_id = request_id
        self.method = method
        self.deadline_s = deadline_s
        self.payload = payload

    @property
    def peer_role(self) -> int:
        """Role the peer named in hello."""
        return self.connection.peer_role

    @property
    def peer_id(self) -> bytes:
        """The 16 bytes the peer named in hello: a client id or a node uuid."""
        return self.connection.peer_id

    @property
    def peer_name(self) -> str:
        """host:port of the peer, for logs."""
        return self.connection.peer_name

    def remaining_s(self) -> float:
        """Time left until the requester gives up, never negative."""
        return max(0.0, self.deadline_s - self.connection.server.loop.time())


class _Inline:
    """Stands in as the current task while a handler runs inline, so that asyncio.timeout and TaskGroup work.

    It passes cancellation on to the real task, which exists by the time anybody can cancel.
    """

    __slots__ = ("task",)

    def __init__(self) -> None:
        self.task: asyncio.Task[Any] | None = None

    def cancel(self, msg: Any = None) -> bool:
        return self.task is not None and self.task.cancel(msg)

    def cancelling(self) -> int:
        return 0 if self.task is None else self.task.cancelling()

    def uncancel(self) -> int:
        return 0 if self.task is None else self.task.uncancel()

    def done(self) -> bool:
        return self.task is not None and self.task.done()


class _Resumed:
    """Awaits a coroutine that has already been started and yielded `first`."""

    __slots__ = ("coro", "first")

    def __init__(self, coro: Coroutine[Any, Any, Reply], first: Any) -> None:
        self.coro = coro
        self.first = first

    def __await__(self) -> Generator[Any, Any, Reply]:
        waited = self.first
        while True:
            try:
                value = yield waited
            except GeneratorExit:
                self.coro.close()
                raise
            except BaseException as exc:
                try:
                    waited = self.coro.throw(exc)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
            else:
                try:
                    waited = self.coro.send(value)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]


async def _finish(resumed: _Resumed) -> Reply:
    return await resumed


class ServerConnection(asyncio.Protocol):
    """One peer. Used by the loop only; handlers see it through their Context."""

    def __init__(self, server: FrameServer) -> None:
        self.server = server
        self.peer_role: int = Role.ROLE_UNSPECIFIED
        self.peer_id = b""
        self.peer_name = "?"
        self.authenticated = False
        self._limits = frame.UNAUTHENTICATED_LIMITS
        self._buffer = bytearray()
        self._out: list[Buffer] = []
        self._flush_scheduled = False
        self._in_flight = 0
        # With their deadlines. The alarm goes off at the first one, or early.
        self._tasks: dict[asyncio.Task[Reply], float] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_s = 0.0
        self._transport: asyncio.Transport | None = None
        self._write_blocked = False
        self._reading = True
        self._closing = False
        self._parsing = False
        self.connected_s = self.heard_s = server.loop.time()
        # When the first byte of a frame that is still incomplete arrived.
        self.partial_since_s: float | None = None

    # -- connection ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        transport = cast(asyncio.Transport, transport)
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self.peer_name = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else str(peer or "local")
        if not self.server._admit(self):
            self._closing = True
            transport.abort()
            return
        transport.set_write_buffer_limits(high=self.server.limits.unsent_bytes_max)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel what still runs for this peer."""
        self._closing = True
        self._transport = None
        self._buffer.clear()
        self._out.clear()
        for task in list(self._tasks):
            task.cancel()
        if self._alarm is not None:
            self._alarm.cancel()
        self.server._forget(self)

    def pause_writing(self) -> None:
        """Stop reading: the peer does not take its replies."""
        self._write_blocked = True
        self._pause()

    def resume_writing(self) -> None:
        """Read again."""
        self._write_blocked = False
        self._resume()

    def _pause(self) -> None:
        if self._reading and self._transport is not None and not self._closing:
            self._reading = False
            self._transport.pause_reading()

    def _resume(self) -> None:
        """Take up reading again when no limit stands against it; first what is buffered."""
        if self._reading or self._closing or self._write_blocked or self._in_flight >= self.server.limits.in_flight_max:
            return
        self._reading = True
        if self._buffer and not self._parsing:
            self._parse()
        if self._reading and self._transport is not None and not self._closing:
            self._transport.resume_reading()

    @property
    def in_flight(self) -> int:
        """Requests that have not been answered."""
        return self._in_flight

    def close(self, *, abort: bool = False) -> None:
        """Close after what is already written is sent, or at once."""
        self._closing = True
        if self._transport is not None:
            if abort:
                self._transport.abort()
            else:
                self._flush()
                self._transport.close()

    def expired(self, now_s: float) -> str:
        """Why the connection has to go, or ""."""
        limits = self.server.limits
        if not self.authenticated and now_s - self.connected_s > limits.hello_s:
            return "no hello in time"
        if self.partial_since_s is not None and self._reading and now_s - self.partial_since_s > limits.partial_frame_s:
            return "a frame was not completed in time"
        if not self._in_flight and not self._buffer and now_s - self.heard_s > limits.idle_s:
            return "idle"
        return ""

    # -- frames -------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Serve what is complete."""
        self.heard_s = self.server.loop.time()
        self._buffer += data
        self._parse()

    def _parse(self) -> None:
        """Serve the complete frames of the buffer, as far as the limits allow."""
        buffer = self._buffer
        in_flight_max = self.server.limits.in_flight_max
        at = 0
        self._parsing = True
        try:
            while len(buffer) - at >= frame.HEADER_BYTES and not self._closing:
                if self._in_flight >= in_flight_max or self._write_blocked:
                    self._pause()
                    break
                header = frame.decode_header(buffer, at, self._limits)
                body_at = at + frame.HEADER_BYTES
                payload_at = body_at + header.body_bytes
                end = payload_at + header.payload_bytes
                if end > len(buffer):
                    break
                body = bytes(buffer[body_at:payload_at])
                payload = bytes(buffer[payload_at:end]) if header.payload_bytes else b""
                at = end
                self._serve(header, body, payload)
        except Fs3Error as exc:
            self._refuse(buffer, at, exc)
            return
        finally:
            self._parsing = False
            if at:
                del buffer[:at]
        self.partial_since_s = self.heard_s if buffer and (at or self.partial_since_s is None) else self.partial_since_s
        if not buffer:
            self.partial_since_s = None
        self._flush()

    def _refuse(self, buffer: bytearray, at: int, exc: Fs3Error) -> None:
        """Answer a frame that cannot be served, then close: what follows it has no known border."""
        request_id = method = 0
        if exc.code == Code.CODE_MESSAGE_TOO_BIG:
            request_id = int.from_bytes(buffer[at + 8 : at + 16], "little")
            method = int.from_bytes(buffer[at + 16 : at + 18], "little")
        log.warning("connection from %s closed: %s", self.peer_name, exc.message)
        self._send_error(request_id, method, exc)
        self.close()

    def _serve(self, header: frame.Header, body: bytes, payload: bytes) -> None:
        if header.kind != frame.KIND_REQUEST:
            raise error(Code.CODE_PROTOCOL, "a client sent a response")
        method = header.method
        if not self.authenticated or method == _HELLO:
            self._serve_hello(header, body)
            return
        entry = self.server.handlers.get(method)
        if entry is None:
            self._send_error(header.request_id, method, error(Code.CODE_UNIMPLEMENTED, f"no method {method} here"))
            return
        try:
            request = entry[0].FromString(body)
        except DecodeError:
            exc = error(Code.CODE_INVALID_ARGUMENT, f"the body of method {method} cannot be parsed")
            self._send_error(header.request_id, method, exc)
            return
        limit_s = self.server.limits.deadline_s
        if header.deadline_ms:
            limit_s = min(limit_s, header.deadline_ms / 1000)
        ctx = Context(self, header.request_id, method, self.heard_s + limit_s, payload)
        self._drive(ctx, entry[1](ctx, request))

    def _drive(self, ctx: Context, coro: Coroutine[Any, Any, Reply]) -> None:
        """Run a handler until it waits; answer now, or make a task of the rest."""
        loop = self.server.loop
        inline = _Inline()
        current = _tasks.current_task(loop)
        if current is not None:
            _tasks._leave_task(loop, current)
        _tasks._enter_task(loop, inline)  # type: ignore[arg-type]
        try:
            waited = coro.send(None)
        except StopIteration as stop:
            self._answer(ctx, stop.value)
            return
        except Exception as exc:
            self._fail(ctx, exc)
            return
        finally:
            _tasks._leave_task(loop, inline)  # type: ignore[arg-type]
            if current is not None:
                _tasks._enter_task(loop, current)
        task = loop.create_task(_finish(_Resumed(coro, waited)))
        inline.task = task
        self._in_flight += 1
        self._tasks[task] = ctx.deadline_s
        self._wake_at(ctx.deadline_s)
        task.add_done_callback(lambda done: self._task_done(ctx, done))

    def _wake_at(self, deadline_s: float) -> None:
        """Have the alarm go off by then. One for all costs less than each its own: nearly all tasks end long before."""
        if self._alarm is not None:
            if self._alarm_s <= deadline_s:
                return
            self._alarm.cancel()
        self._alarm_s = deadline_s
        self._alarm = self.server.loop.call_at(deadline_s, self._ring)

    def _ring(self) -> None:
        """Cancel the tasks whose deadline has passed."""
        self._alarm = None
        now_s = self.server.loop.time()
        left = [deadline_s for deadline_s in self._tasks.values() if deadline_s > now_s]
        for task, deadline_s in self._tasks.items():
            if deadline_s <= now_s:
                task.cancel()
        if left:
            self._wake_at(min(left))

    def _task_done(self, ctx: Context, task: asyncio.Task[Reply]) -> None:
        del self._tasks[task]
        self._in_flight -= 1
        self.server._changed.set()
        if task.cancelled():
            if self._transport is not None:
                late = error(Code.CODE_TIMEOUT, "the deadline of the request passed", maybe_applied=True)
                self._send_error(ctx.request_id, ctx.method, late)
        else:
            exc = task.exception()
            if exc is None:
                self._answer(ctx, task.result())
            else:
                self._fail(ctx, exc)
        if not self._flush_scheduled and self._out:
            self._flush_scheduled = True
            self.server.loop.call_soon(self._flush)
        self._resume()

    # -- replies ------------------------------------------------------------------------------------------

    def _answer(self, ctx: Context, reply: Reply) -> None:
        if self._transport is None:
            return
        if isinstance(reply, tuple):
            message, payload = reply
            size = memoryview(payload).nbytes
            body = message.SerializeToString()
            self._out.append(frame.encode_response(ctx.request_id, ctx.method, 0, body, size))
            if size:
                self._out.append(payload)
            return
        self._out.append(frame.encode_response(ctx.request_id, ctx.method, 0, reply.SerializeToString()))

    def _fail(self, ctx: Context, exc: BaseException) -> None:
        if isinstance(exc, Fs3Error):
            self._send_error(ctx.request_id, ctx.method, exc)
            return
        log.error("method %d from %s failed", ctx.method, self.peer_name, exc_info=exc)
        hidden = error(Code.CODE_INTERNAL, "internal error; the server's log has the details", maybe_applied=True)
        self._send_error(ctx.request_id, ctx.method, hidden)

    def _send_error(self, request_id: int, method: int, exc: Fs3Error) -> None:
        if self._transport is None:
            return
        detail: ErrorDetail = exc.to_detail()
        status = exc.code or int(Code.CODE_INTERNAL)
        self._out.append(frame.encode_response(request_id, method, status, detail.SerializeToString()))

    def _flush(self) -> None:
        self._flush_scheduled = False
        out = self._out
        if not out:
            return
        if self._transport is not None:
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        out.clear()

    # -- hello --------------------------------------------------------------------------------------------

    def _serve_hello(self, header: frame.Header, body: bytes) -> None:
        try:
            if self.authenticated:
                raise error(Code.CODE_PROTOCOL, "hello was already accepted on this connection")
            if header.method != _HELLO:
                raise error(Code.CODE_UNAUTHENTICATED, "the first request of a connection must be hello")
            reply = self._hello(body)
        except Fs3Error as exc:
            log.warning("hello from %s refused: %s", self.peer_name, exc.message)
            self._send_error(header.request_id, header.method, exc)
            self.close()
            return
        self.authenticated = True
        self._limits = self.server.limits.frame
        self._out.append(frame.encode_response(header.request_id, _HELLO, 0, reply.SerializeToString()))

    def _hello(self, body: bytes) -> HelloResponse:
        me = self.server.identity
        try:
            hello = HelloRequest.FromString(body)
        except DecodeError:
            raise error(Code.CODE_PROTOCOL, "hello cannot be parsed") from None
        if not hello.protocol_min <= frame.VERSION <= hello.protocol_max:
            raise error(
                Code.CODE_PROTOCOL,
                f"the peer speaks protocol {hello.protocol_min} to {hello.protocol_max}; "
                f"this side speaks {frame.VERSION}; use a matching fs3 version",
            )
        if hello.cluster_id and hello.cluster_id != me.cluster_id:
            raise error(
                Code.CODE_WRONG_CLUSTER, f"this is cluster {me.cluster_id!r}, the peer wants {hello.cluster_id!r}"
            )
        if me.token and not hmac.compare_digest(me.token.encode(), hello.token.encode()):
            raise error(Code.CODE_UNAUTHENTICATED, "the token is missing or wrong; give the cluster's token")
        if hello.role not in me.roles_allowed:
            raise error(Code.CODE_INVALID_ARGUMENT, f"role {hello.role} may not connect here")
        if len(hello.peer_id) != 16:
            raise error(Code.CODE_INVALID_ARGUMENT, "peer_id must be 16 bytes")
        if hello.transports and "tcp" not in hello.transports:
            raise error(Code.CODE_NOT_SUPPORTED, "this server offers the transport tcp only")
        self.peer_role = hello.role
        self.peer_id = hello.peer_id
        return HelloResponse(
            protocol=frame.VERSION,
            cluster_id=me.cluster_id,
            role=me.role,
            node_id=me.node_id,
            transport="tcp",
            body_bytes_max=self.server.limits.frame.body_bytes,
            payload_bytes_max=self.server.limits.frame.payload_bytes,
            server_version=me.version,
        )


async def _ping(_ctx: Context, _request: ErrorDetail) -> ErrorDetail:
    """PING has an empty body both ways; any message without required fields parses it."""
    return ErrorDetail()


class FrameServer:
    """Listens and keeps the connections. Belongs to one event loop."""

    def __init__(self, identity: Identity, handlers: Handlers, limits: ServerLimits | None = None) -> None:
        self.identity = identity
        self.handlers: dict[int, tuple[type[Message], HandlerFn]] = {
            int(Method.METHOD_PING): (ErrorDetail, _ping),
            **handlers,
        }
        self.limits = limits or ServerLimits()
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self._connections: set[ServerConnection] = set()
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self.port = 0

    @property
    def connections(self) -> Iterable[ServerConnection]:
        """The connections that are open now."""
        return tuple(self._connections)

    async def start(self, host: str, port: int = 0) -> int:
        """Listen; returns the port (a free one was chosen for 0). Raises OSError."""
        self._server = await self.loop.create_server(lambda: ServerConnection(self), host, port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]
        self._sweeper = self.loop.call_later(self.limits.sweep_s, self._sweep)
        return self.port

    async def stop(self) -> None:
        """Stop listening, give running requests `stop_grace_s`, then close every connection."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
        ends = self.loop.time() + self.limits.stop_grace_s
        while any(c.in_flight for c in self._connections) and self.loop.time() < ends:
            await self._wait_change(ends)
        for connection in list(self._connections):
            connection.close()
        ends = self.loop.time() + 1.0
        while self._connections and self.loop.time() < ends:
            await self._wait_change(ends)
        for connection in list(self._connections):
            connection.close(abort=True)
        await server.wait_closed()

    async def _wait_change(self, until_s: float) -> None:
        """Wait until some request or connection has ended, at most until `until_s`."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until_s):
                await self._changed.wait()

    def _admit(self, connection: ServerConnection) -> bool:
        if self._server is None or len(self._connections) >= self.limits.connections_max:
            return False
        self._connections.add(connection)
        return True

    def _forget(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)
        self._changed.set()

    def _sweep(self) -> None:
        now_s = self.loop.time()
        for connection in list(self._connections):
            why = connection.expired(now_s)
            if why:
                log.info("connection from %s closed: %s", connection.peer_name, why)
                connection.close(abort=True)
        self._sweeper = self.loop.call_later(self.limits.sweep_s, self._sweep)
