"""The frame codec: header, limits and refusals. See proto/fs3/v1/frame.proto for the layout. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from fs3.core.errors import Fs3Error, error
from fs3.rpc.crc import crc32c_36
from fs3.v1.frame_pb2 import Code

MAGIC: Final = b"FS3F"
VERSION: Final = 1
HEADER_BYTES: Final = 40
KIND_REQUEST: Final = 1
KIND_RESPONSE: Final = 2
BODY_BYTES_MAX: Final = 16 << 20
PAYLOAD_BYTES_MAX: Final = 64 << 20
UNAUTHENTICATED_BYTES_MAX: Final = 64 << 10
DEADLINE_MS_MAX: Final = 0xFFFFFFFF

_HEAD36 = struct.Struct("<4sBBHQHHIIII")
_HEAD40 = struct.Struct("<4sBBHQHHIIIII")
_CRC = struct.Struct("<I")
assert _HEAD36.size == HEADER_BYTES - 4
assert _HEAD40.size == HEADER_BYTES


class Header(NamedTuple):
    """The fields of a frame header that vary. `deadline_ms` is the requester's remaining patience."""

    kind: int
    request_id: int
    method: int
    status: int
    deadline_ms: int
    body_bytes: int
    payload_bytes: int

    @property
    def frame_bytes(self) -> int:
        """Size of the whole frame, header included."""
        return HEADER_BYTES + self.body_bytes + self.payload_bytes


@dataclass(frozen=True, slots=True)
class Limits:
    """What one frame may carry at most; checked before anything is allocated for it."""

    body_bytes: int = BODY_BYTES_MAX
    payload_bytes: int = PAYLOAD_BYTES_MAX
    # Body and payload together.
    total_bytes: int = BODY_BYTES_MAX + PAYLOAD_BYTES_MAX


LIMITS: Final = Limits()
# 64 KiB for the whole frame, header included.
UNAUTHENTICATED_LIMITS: Final = Limits(
    UNAUTHENTICATED_BYTES_MAX, UNAUTHENTICATED_BYTES_MAX, UNAUTHENTICATED_BYTES_MAX - HEADER_BYTES
)


def _protocol(message: str) -> Fs3Error:
    return error(Code.CODE_PROTOCOL, message)


def encode_header(header: Header) -> bytes:
    """Encode the 40 bytes of `header`."""
    kind, request_id, method, status, deadline_ms, body_bytes, payload_bytes = header
    head = _HEAD36.pack(MAGIC, VERSION, kind, 0, request_id, method, status, deadline_ms, body_bytes, payload_bytes, 0)
    return head + _CRC.pack(crc32c_36(head))


def encode_request(request_id: int, method: int, deadline_ms: int, body: bytes, payload_bytes: int = 0) -> bytes:
    """Encode a request frame up to its payload, which the caller sends behind it."""
    head = _HEAD36.pack(
        MAGIC, VERSION, KIND_REQUEST, 0, request_id, method, 0, deadline_ms, len(body), payload_bytes, 0
    )
    return head + _CRC.pack(crc32c_36(head)) + body


def encode_response(request_id: int, method: int, status: int, body: bytes, payload_bytes: int = 0) -> bytes:
    """Encode a response frame up to its payload, which the caller sends behind it."""
    head = _HEAD36.pack(MAGIC, VERSION, KIND_RESPONSE, 0, request_id, method, status, 0, len(body), payload_bytes, 0)
    return head + _CRC.pack(crc32c_36(head)) + body


def decode_header(data: bytes | bytearray, offset: int = 0, limits: Limits = LIMITS) -> Header:
    """Parse and check the 40 bytes at `offset`.

    Raises Fs3Error CODE_PROTOCOL (not a frame, wrong version, damaged, unknown bits) or
    CODE_MESSAGE_TOO_BIG (a length over `limits`).
    """
    (magic, version, kind, flags, request_id, method, status, deadline_ms, body_bytes, payload_bytes, reserved, crc) = (
        _HEAD40.unpack_from(data, offset)
    )
    if magic != MAGIC:
        raise _protocol("the peer does not speak the fs3 frame protocol (bad magic)")
    if version != VERSION:
        raise _protocol(f"frame version {version} is not understood; this side speaks {VERSION}")
    if crc != crc32c_36(bytes(data[offset : offset + 36])):
        raise _protocol("the frame header is damaged (checksum)")
    if flags or reserved:
        raise _protocol("the frame has flags that are not understood")
    if kind != KIND_REQUEST and kind != KIND_RESPONSE:
        raise _protocol(f"frame kind {kind} is not understood")
    if (kind == KIND_REQUEST and status) or (kind == KIND_RESPONSE and deadline_ms):
        raise _protocol("a request has no status and a response has no deadline")
    if status and payload_bytes:
        raise _protocol("an error response has no payload")
    if (
        body_bytes > limits.body_bytes
        or payload_bytes > limits.payload_bytes
        or body_bytes + payload_bytes > limits.total_bytes
    ):
        raise error(
            Code.CODE_MESSAGE_TOO_BIG,
            f"a frame of {body_bytes} body and {payload_bytes} payload bytes is over the limit",
        )
    return Header(kind, request_id, method, status, deadline_ms, body_bytes, payload_bytes)
