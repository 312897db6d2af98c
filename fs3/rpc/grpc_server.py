"""gRPC servers: token and cluster are checked, Fs3Error becomes a status with the exact error beside it."""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from fs3.core.errors import Fs3Error, error
from fs3.rpc.grpc_common import CLUSTER_KEY, ERROR_KEY, OPTIONS, TOKEN_KEY, status_of
from fs3.v1.frame_pb2 import Code

log = logging.getLogger("fs3.rpc.grpc")


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Stands before every method. An empty token lets everybody in."""

    def __init__(self, *, token: str, cluster_id: str) -> None:
        self._token = token.encode()
        self._cluster_id = cluster_id

    def _check(self, context: Any) -> None:
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get(TOKEN_KEY, "")
        given = token if isinstance(token, bytes) else str(token).encode()
        if self._token and not hmac.compare_digest(self._token, given):
            raise error(Code.CODE_UNAUTHENTICATED, "the token is missing or wrong; give the cluster's token")
        cluster = metadata.get(CLUSTER_KEY, "")
        if cluster and cluster != self._cluster_id:
            raise error(Code.CODE_WRONG_CLUSTER, f"this is cluster {self._cluster_id!r}, the peer wants {cluster!r}")

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap the method. Unary requests only: fs3 has no other."""
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler  # type: ignore[no-any-return]
        method = handler_call_details.method
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(self._stream(method, handler.unary_stream), **codec)
        return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), **codec)

    def _unary(self, method: str, inner: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        async def call(request: Any, context: Any) -> Any:
            try:
                self._check(context)
                return await inner(request, context)
            except (Fs3Error, Exception) as exc:
                await _abort(method, context, exc)

        return call

    def _stream(self, method: str, inner: Callable[[Any, Any], AsyncIterator[Any]]) -> Any:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                self._check(context)
                async for item in inner(request, context):
                    yield item
            except (Fs3Error, Exception) as exc:
                await _abort(method, context, exc)

        return call


async def _abort(method: str, context: Any, exc: Exception) -> None:
    if isinstance(exc, grpc.aio.AbortError):
        raise exc
    if not isinstance(exc, Fs3Error):
        log.error("%s failed", method, exc_info=exc)
        exc = error(Code.CODE_INTERNAL, "internal error; the server's log has the details", maybe_applied=True)
    detail = exc.to_detail().SerializeToString()
    await context.abort(status_of(exc), exc.message, ((ERROR_KEY, detail),))


def make_server(*, token: str, cluster_id: str) -> grpc.aio.Server:
    """Make a server with the guard; add servicers, then :func:`listen`. Belongs to the running loop."""
    return grpc.aio.server(interceptors=[Guard(token=token, cluster_id=cluster_id)], options=OPTIONS)


async def listen(server: grpc.aio.Server, host: str, port: int) -> int:
    """Bind and start; returns the port. Raises OSError when the port is taken."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    failure = f"cannot listen on {where}: "
    # gRPC says no more than "failed"; a plain socket says why.
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as exc:
            raise OSError(exc.errno, failure + (exc.strerror or str(exc))) from None
    try:
        bound = server.add_insecure_port(where)
    except RuntimeError as exc:
        raise OSError(failure + "the port was taken meanwhile") from exc
    await server.start()
    return int(bound)
