"""The two doors of the service: handlers of the frame protocol, and a gRPC service on the same operations."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import grpc
from google.protobuf.message import Message

from fs3.meta.engine import Engine
from fs3.meta.fsck.jobs import FsckJobs
from fs3.meta.registry import OPERATIONS, Operation
from fs3.meta.routing import RoutingHolder
from fs3.rpc.server import Context, HandlerFn
from fs3.v1.frame_pb2 import GetRoutingRequest, Method
from fs3.v1.meta_pb2 import (
    AwaitLockRequest,
    FsckCancelRequest,
    FsckPollRequest,
    FsckStartRequest,
    MetaStatus,
    MetaStatusRequest,
)
from fs3.v1.routing_pb2 import GetRoutingResponse

SERVICE: Final = "fs3.v1.Meta"
WAIT_MS_MAX: Final = 60_000
# Time kept back of a caller's deadline, so that the answer still reaches it.
MARGIN_S: Final = 0.05


async def get_routing(holder: RoutingHolder, request: GetRoutingRequest, left_s: float) -> GetRoutingResponse:
    """The routing, or what changed of it, when it is newer than the caller's, waiting up to ``wait_ms`` for that."""
    view = holder.view
    if view.version <= request.known_version and request.wait_ms:
        wait_s = min(request.wait_ms, WAIT_MS_MAX) / 1000
        view = await holder.wait_beyond(request.known_version, max(0.0, min(wait_s, left_s - MARGIN_S)))
    if view.version <= request.known_version:
        return GetRoutingResponse(version=view.version)
    return holder.teller.tell(request.known)


def frame_handlers(
    engine: Engine, holder: RoutingHolder, audits: FsckJobs
) -> dict[int, tuple[type[Message], HandlerFn]]:
    """Handlers by method for :class:`fs3.rpc.server.FrameServer`."""

    def handler(operation: Operation) -> HandlerFn:
        def handle(ctx: Context, request: Any) -> Coroutine[Any, Any, Message]:
            return engine.call(operation, request, ends_s=ctx.deadline_s)

        return handle

    async def routing(ctx: Context, request: GetRoutingRequest) -> GetRoutingResponse:
        return await get_routing(holder, request, ctx.remaining_s())

    handlers: dict[int, tuple[type[Message], HandlerFn]] = {
        operation.method: (operation.request, handler(operation)) for operation in OPERATIONS
    }

    async def status(ctx: Context, request: MetaStatusRequest) -> MetaStatus:
        return engine.status(holder.view.version, holder.teller.sent)

    async def await_lock(ctx: Context, request: AwaitLockRequest) -> Message:
        return await engine.await_lock(request, left_s=ctx.remaining_s() - MARGIN_S)

    handlers[Method.METHOD_GET_ROUTING] = (GetRoutingRequest, routing)
    handlers[Method.METHOD_META_STATUS] = (MetaStatusRequest, status)
    handlers[Method.METHOD_META_AWAIT_LOCK] = (AwaitLockRequest, await_lock)
    return handlers | fsck_handlers(audits)


def fsck_handlers(audits: FsckJobs) -> dict[int, tuple[type[Message], HandlerFn]]:
    """Handlers of audits."""

    async def start(ctx: Context, request: FsckStartRequest) -> Message:
        return await audits.start(request)

    async def poll(ctx: Context, request: FsckPollRequest) -> Message:
        return await audits.poll(request, ctx.remaining_s() - MARGIN_S)

    async def cancel(ctx: Context, request: FsckCancelRequest) -> Message:
        return await audits.cancel(request)

    return {
        Method.METHOD_META_FSCK_START: (FsckStartRequest, start),
        Method.METHOD_META_FSCK_POLL: (FsckPollRequest, poll),
        Method.METHOD_META_FSCK_CANCEL: (FsckCancelRequest, cancel),
    }


def grpc_handlers(engine: Engine, holder: RoutingHolder) -> Any:
    """The generic handler for a server of :func:`fs3.rpc.grpc_server.make_server`, which checks credentials."""

    def left_s(context: Any) -> float:
        left: float | None = context.time_remaining()
        return WAIT_MS_MAX / 1000 if left is None else left

    def method(operation: Operation) -> Any:
        async def call(request: Any, context: Any) -> Message:
            ends_s = asyncio.get_running_loop().time() + left_s(context)
            response: Message = await engine.call(operation, request, ends_s=ends_s)
            return response

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=operation.request.FromString,
            response_serializer=operation.response.SerializeToString,
        )

    async def routing(request: GetRoutingRequest, context: Any) -> GetRoutingResponse:
        return await get_routing(holder, request, left_s(context))

    methods = {operation.name: method(operation) for operation in OPERATIONS}
    methods["GetRouting"] = grpc.unary_unary_rpc_method_handler(
        routing,
        request_deserializer=GetRoutingRequest.FromString,
        response_serializer=GetRoutingResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(SERVICE, methods)
