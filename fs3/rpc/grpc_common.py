"""What gRPC servers and clients share: metadata names, limits, the mapping between errors and status codes."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from fs3.core.errors import Fs3Error, error, from_detail
from fs3.v1.frame_pb2 import Code, ErrorDetail

TOKEN_KEY: Final = "fs3-token"
CLUSTER_KEY: Final = "fs3-cluster"
ERROR_KEY: Final = "fs3-error-bin"
MESSAGE_BYTES_MAX: Final = 64 << 20

OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
]

_STATUS: Final[dict[int, grpc.StatusCode]] = {
    Code.CODE_INTERNAL: grpc.StatusCode.INTERNAL,
    Code.CODE_INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Code.CODE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.CODE_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Code.CODE_ACCESS: grpc.StatusCode.PERMISSION_DENIED,
    Code.CODE_NOT_PERMITTED: grpc.StatusCode.PERMISSION_DENIED,
    Code.CODE_UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Code.CODE_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.CODE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.CODE_BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.CODE_NO_SPACE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.CODE_UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Code.CODE_NOT_SUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
}

_CODES: Final[dict[grpc.StatusCode, int]] = {
    grpc.StatusCode.INVALID_ARGUMENT: Code.CODE_INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND: Code.CODE_NOT_FOUND,
    grpc.StatusCode.UNAUTHENTICATED: Code.CODE_UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED: Code.CODE_UNAUTHENTICATED,
    grpc.StatusCode.DEADLINE_EXCEEDED: Code.CODE_TIMEOUT,
    grpc.StatusCode.UNAVAILABLE: Code.CODE_UNAVAILABLE,
    grpc.StatusCode.CANCELLED: Code.CODE_UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Code.CODE_BUSY,
    grpc.StatusCode.UNIMPLEMENTED: Code.CODE_UNIMPLEMENTED,
}


def status_of(exc: Fs3Error) -> grpc.StatusCode:
    """Name the gRPC status that fits best; the exact error travels in the trailing metadata."""
    return _STATUS.get(exc.code, grpc.StatusCode.FAILED_PRECONDITION)


def from_rpc_error(exc: grpc.RpcError, address: str) -> Fs3Error:
    """Make the Fs3Error behind a failed call: the server's own, or one that fits the status."""
    trailing: Any = exc.trailing_metadata() if hasattr(exc, "trailing_metadata") else None
    for key, value in trailing or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            try:
                return from_detail(ErrorDetail.FromString(value))
            except DecodeError:
                break
    status = exc.code() if hasattr(exc, "code") else grpc.StatusCode.UNKNOWN
    code = _CODES.get(status, int(Code.CODE_INTERNAL))
    if code == Code.CODE_TIMEOUT:
        return error(code, f"no answer from {address} in time", maybe_applied=True)
    if code == Code.CODE_UNAVAILABLE:
        return error(code, f"{address} cannot be reached", maybe_applied=True)
    details = exc.details() if hasattr(exc, "details") else ""
    return error(code, f"{address}: {details or status.name}", maybe_applied=True)
