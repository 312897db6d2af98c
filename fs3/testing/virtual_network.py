"""gRPC in virtual time: calls and streams between simulated processes, over a network that loses and delays.

It stands in for :class:`fs3.rpc.network.Network` under unchanged stubs, servicers and the real guard, so requests,
replies and errors take their real encodings. What becomes of a message is asked of ``delays(origin, destination)``:
no number, it is lost; one, it arrives after so many nanoseconds; two, it arrives twice.

What follows from gRPC and TCP: a call whose request or reply is lost ends at its deadline; when the deadline passes,
or the caller goes away, the handler is cancelled; messages of a stream arrive in order, late ones hold up the rest,
and a stream that cannot deliver breaks; when a process dies its peers are told, unless that is lost as well.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from fs3.rpc.grpc_server import Guard
from fs3.testing.virtual_loop import NS, Process, VirtualLoop, current_process

Delays = Callable[[str, str], Sequence[int]]

# A broken connection that nobody could be told of is noticed after a time between these.
NOTICE_S: Final = (1.0, 20.0)
# A lost segment of a stream is sent again after a time between these, or else the connection breaks.
RESEND_S: Final = (0.2, 5.0)
BREAK: Final = 0.3
PORT: Final = 7000


class _Aborted(grpc.aio.AbortError):
    """What a handler ended with through ``context.abort``."""

    def __init__(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, Any]]) -> None:
        super().__init__()
        self.code = code
        self.details = details
        self.trailing = trailing


def _failure(code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, Any]] = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details, None)


class _Context:
    """What a handler is given besides the request."""

    def __init__(self, metadata: Sequence[tuple[str, str | bytes]]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing: Sequence[tuple[str, Any]] = ()) -> None:
        raise _Aborted(code, details, trailing)


@dataclass(frozen=True)
class _Details:
    """Which method is called, for the guard."""

    method: str
    invocation_metadata: Any = ()


@dataclass(eq=False)
class _Call:
    """One call as both ends see it."""

    method: str
    request: bytes
    metadata: Sequence[tuple[str, str | bytes]]
    timeout_s: float | None
    caller: Process
    origin: str
    address: str
    stream: bool
    # The client's end: replies in order, then how it ended (None: well).
    replies: deque[bytes] = field(default_factory=deque)
    ended: bool = False
    failure: grpc.aio.AioRpcError | None = None
    waiter: asyncio.Future[None] | None = None
    # The server's end.
    server: _Server | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    arrives_ns: int = 0

    @property
    def destination(self) -> str:
        return self.address.rpartition(":")[0]

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def end(self, failure: grpc.aio.AioRpcError | None) -> None:
        """Tell the client that nothing more comes."""
        if not self.ended:
            self.ended = True
            self.failure = failure
            self.wake()


class VirtualNetwork:
    """All connections of one simulated world. ``counts`` says what happened, ``trace`` hashes it."""

    def __init__(self, loop: VirtualLoop, delays: Delays, seed: int = 0) -> None:
        self.loop = loop
        self.counts: Counter[str] = Counter()
        self.trace = 0
        self._delays = delays
        self._rng = random.Random(f"network {seed}")
        self._listening: dict[str, _Server] = {}
        self._calls: dict[_Call, None] = {}
        # What is on its way belongs to nobody: it arrives even if the sender has died.
        self._wire = contextvars.Context()

    def at(self, party: str) -> PartyNetwork:
        """Return the network as the machine called `party` sees it."""
        return PartyNetwork(self, party)

    def died(self, process: Process) -> None:
        """Take note that `process` was killed: its peers find their connections broken."""
        for address in [a for a, server in self._listening.items() if server.process is process]:
            del self._listening[address]
        for call in list(self._calls):
            if call.caller is process:
                self._calls.pop(call)
                self._cancel_handlers(call, self.loop.now_ns)
            elif call.server is not None and call.server.process is process:
                self._calls.pop(call)
                self._break(call, "the connection was reset")

    # -- messages -----------------------------------------------------------------------------------------

    def _fate(self, origin: str, to: str) -> list[int]:
        """Draw when the copies of a message arrive, in nanoseconds from now."""
        delays = list(self._delays(origin, to))
        self.counts["control messages"] += 1
        if not delays:
            self.counts["control messages lost"] += 1
        elif len(delays) > 1:
            self.counts["control messages repeated"] += 1
        return delays

    def note(self, what: bytes) -> None:
        """Make what happens at this moment part of the trace."""
        self.trace = (self.trace * 0x100000001B3 ^ self.loop.now_ns ^ zlib.crc32(what)) & 0xFFFF_FFFF_FFFF_FFFF

    def _between(self, bounds: tuple[float, float]) -> int:
        return int(self._rng.uniform(*bounds) * NS)

    def start(self, call: _Call) -> None:
        """Send a request on its way."""
        self._calls[call] = None
        copies = self._fate(call.origin, call.destination)
        if call.stream and not copies:
            # Unlike a call it has no deadline: the connection that does not come about is given up.
            self._break(call, "the connection timed out", between=NOTICE_S)
        # A connection is opened once; a request may well be sent again by something on the way.
        for delay_ns in copies[:1] if call.stream else copies:
            self.loop.call_at_ns(self.loop.now_ns + delay_ns, self._arrive, call, context=self._wire)

    def _arrive(self, call: _Call) -> None:
        """Hand a request to whoever listens; a machine on which nobody does answers that."""
        server = self._listening.get(call.address)
        self.note(call.request)
        if server is None:
            self._break(call, "connection refused")
        else:
            server.process.call_at(self.loop.now_ns, server.take, call)

    def reply(self, call: _Call, message: bytes | None, failure: grpc.aio.AioRpcError | None, *, stream: bool) -> None:
        """Send a message, the end or both to the client."""
        delays = self._fate(call.destination, call.origin)
        if delays:
            self._deliver_at(call, self.loop.now_ns + delays[0], message, failure, end=not stream)
        elif stream and self._rng.random() >= BREAK:
            self._deliver_at(call, self.loop.now_ns + self._between(RESEND_S), message, failure, end=False)
        elif stream:
            self._cancel_handlers(call, self.loop.now_ns)
            self._break(call, "the connection was lost")

    def finish(self, call: _Call, failure: grpc.aio.AioRpcError | None) -> None:
        """Send the end of a stream to the client."""
        delays = self._fate(call.destination, call.origin)
        delay_ns = delays[0] if delays else self._between(RESEND_S)
        self._deliver_at(call, self.loop.now_ns + delay_ns, None, failure, end=True)

    def _break(self, call: _Call, why: str, *, between: tuple[float, float] | None = None) -> None:
        """Let the client notice that its connection is gone: by itself between those seconds, or because it is told."""
        delays = self._fate(call.destination, call.origin) if between is None else []
        delay_ns = delays[0] if delays else self._between(between or NOTICE_S)
        failure = _failure(grpc.StatusCode.UNAVAILABLE, why)
        self._deliver_at(call, self.loop.now_ns + delay_ns, None, failure, end=True)

    def _deliver_at(
        self, call: _Call, when_ns: int, message: bytes | None, failure: grpc.aio.AioRpcError | None, *, end: bool
    ) -> None:
        # In order: nothing overtakes what was sent before it.
        call.arrives_ns = max(when_ns, call.arrives_ns + 1)
        call.caller.call_at(call.arrives_ns, self._deliver, call, message, failure, end)

    def _deliver(self, call: _Call, message: bytes | None, failure: grpc.aio.AioRpcError | None, end: bool) -> None:
        if call.ended:
            return
        if message is not None:
            self.note(message)
            call.replies.append(message)
            call.wake()
        if end:
            self._calls.pop(call, None)
            call.end(failure)

    def abandon(self, call: _Call) -> None:
        """Take note that the client does not wait any more; the handler hears of it unless that is lost."""
        call.ended = True
        if call in self._calls:
            del self._calls[call]
            for delay_ns in self._fate(call.origin, call.destination)[:1]:
                self._cancel_handlers(call, self.loop.now_ns + delay_ns)

    def _cancel_handlers(self, call: _Call, when_ns: int) -> None:
        for task in call.tasks:
            assert call.server is not None
            call.server.process.call_at(when_ns, task.cancel)

    # -- servers ------------------------------------------------------------------------------------------

    def listen(self, server: _Server, address: str) -> None:
        """Begin to take calls for `address`."""
        if address in self._listening:
            raise OSError(98, f"cannot listen on {address}: the port is taken")
        self._listening[address] = server

    def close(self, server: _Server) -> None:
        """End a server in good order: its clients' connections close."""
        for address in [a for a, s in self._listening.items() if s is server]:
            del self._listening[address]
        for call in [c for c in self._calls if c.server is server]:
            self._calls.pop(call)
            for task in call.tasks:
                task.cancel()
            self._break(call, "the server ends")


class PartyNetwork:
    """See fs3.rpc.network.Network; what one simulated machine has of the network."""

    def __init__(self, network: VirtualNetwork, party: str) -> None:
        self._network = network
        self._party = party

    def connect(self, address: str) -> _Channel:
        """See Network. To be called by the simulated process that will use it."""
        return _Channel(self._network, self._party, address)

    def server(self, *, token: str, cluster_id: str) -> _Server:
        """See Network. To be called by the simulated process that will serve."""
        return _Server(self._network, Guard(token=token, cluster_id=cluster_id))

    async def listen(self, server: _Server, host: str, port: int) -> int:
        """See Network. Port 0 is always the same one: a machine has one service of a kind."""
        port = port or PORT
        self._network.listen(server, f"{host}:{port}")
        return port


class _Server:
    """The part of ``grpc.aio.Server`` that services use."""

    def __init__(self, network: VirtualNetwork, guard: Guard) -> None:
        process = current_process()
        assert process is not None, "a server belongs to a simulated process"
        self.process = process
        self._network = network
        self._guard = guard
        self._generic: list[Any] = []
        self._handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """Take the handlers of a service."""
        self._generic.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """Do nothing: they are among the generic ones."""

    async def stop(self, grace: float | None) -> None:
        """End; `grace` is not waited for."""
        self._network.close(self)

    def take(self, call: _Call) -> None:
        """Begin to handle a request."""
        if call.ended or (call.stream and not call.caller.alive):
            return
        call.server = self
        loop = self._network.loop
        task = loop.create_task(self._handle(call))
        call.tasks.append(task)
        if call.timeout_s is not None:
            self.process.call_at(loop.now_ns + int(call.timeout_s * NS), task.cancel)

    async def _handler(self, method: str) -> Any:
        if method not in self._handlers:
            details: Any = _Details(method)

            async def find(details: Any) -> Any:
                return next((h for g in self._generic if (h := g.service(details)) is not None), None)

            self._handlers[method] = await self._guard.intercept_service(find, details)
        return self._handlers[method]

    async def _handle(self, call: _Call) -> None:
        handler = await self._handler(call.method)
        if handler is None:
            failure = _failure(grpc.StatusCode.UNIMPLEMENTED, f"there is no method {call.method}")
            self._network.reply(call, None, failure, stream=False)
            return
        request = handler.request_deserializer(call.request)
        context = _Context(call.metadata)
        if handler.response_streaming:
            await self._stream(call, handler, handler.unary_stream(request, context))
            return
        try:
            response = await handler.unary_unary(request, context)
        except _Aborted as exc:
            self._network.reply(call, None, _failure(exc.code, exc.details, exc.trailing), stream=False)
            return
        self._network.reply(call, handler.response_serializer(response), None, stream=False)

    async def _stream(self, call: _Call, handler: Any, responses: Any) -> None:
        try:
            async for response in responses:
                if call.ended:
                    return
                self._network.reply(call, handler.response_serializer(response), None, stream=True)
        except _Aborted as exc:
            self._network.finish(call, _failure(exc.code, exc.details, exc.trailing))
            return
        finally:
            await responses.aclose()
        self._network.finish(call, None)


class _Channel:
    """The part of ``grpc.aio.Channel`` that stubs use. A client process' own."""

    def __init__(self, network: VirtualNetwork, party: str, address: str) -> None:
        process = current_process()
        assert process is not None, "a channel belongs to a simulated process"
        self._network = network
        self._party = party
        self._address = address
        self._process = process
        self._open: dict[_Call, None] = {}

    def _begin(self, method: str, request: bytes, metadata: Any, timeout_s: float | None, stream: bool) -> _Call:
        call = _Call(
            method, request, tuple(metadata or ()), timeout_s, self._process, self._party, self._address, stream
        )
        self._open[call] = None
        self._network.start(call)
        return call

    def _done(self, call: _Call) -> None:
        self._open.pop(call, None)
        if not call.ended:
            self._network.abandon(call)

    def unary_unary(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any
    ) -> Callable[..., Awaitable[Any]]:
        """Make the caller of a method with one reply."""

        async def invoke(request: Any, *, timeout: float | None = None, metadata: Any = None) -> Any:
            call = self._begin(method, request_serializer(request), metadata, timeout, stream=False)
            try:
                async with asyncio.timeout(timeout):
                    await _wait(call)
            except TimeoutError:
                raise _failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None
            finally:
                self._done(call)
            if call.failure is not None:
                raise call.failure
            return response_deserializer(call.replies.popleft())

        return invoke

    def unary_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any, **_: Any
    ) -> Callable[..., _Stream]:
        """Make the caller of a method with a stream of replies."""

        def invoke(request: Any, *, timeout: float | None = None, metadata: Any = None) -> _Stream:
            call = self._begin(method, request_serializer(request), metadata, timeout, stream=True)
            return _Stream(call, response_deserializer, self._done)

        return invoke

    async def close(self, grace: float | None = None) -> None:
        """Close the connection: the peer's handlers are cancelled."""
        for call in list(self._open):
            self._done(call)


class _Stream:
    """The part of a ``grpc.aio.UnaryStreamCall`` that clients use."""

    def __init__(self, call: _Call, deserialize: Any, done: Callable[[_Call], None]) -> None:
        self._call = call
        self._deserialize = deserialize
        self._done = done

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> Any:
        call = self._call
        if not call.replies and not call.ended:
            await _wait(call)
        if call.replies:
            return self._deserialize(call.replies.popleft())
        if call.failure is not None:
            raise call.failure
        raise StopAsyncIteration

    def cancel(self) -> bool:
        """Give up; the handler is cancelled."""
        self._done(self._call)
        return True


async def _wait(call: _Call) -> None:
    """Wait for the next reply or the end of a call."""
    call.waiter = asyncio.get_running_loop().create_future()
    try:
        await call.waiter
    finally:
        call.waiter = None
