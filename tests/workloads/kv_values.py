"""Values that say which key and which version they are, all through."""

from __future__ import annotations

import hashlib
import struct

HEAD = struct.Struct("<QQ32s")


def make(key: bytes, version: int, size: int) -> bytes:
    """A value of `size` bytes (at least 48) for a key."""
    head = HEAD.pack(version, size, hashlib.sha256(key).digest())
    block = hashlib.blake2b(head, digest_size=64).digest()
    return (head + block * (size // 64 + 1))[:size]


def version_of(key: bytes, value: bytes | bytearray | memoryview) -> int:
    """The version of a value. Fails when any byte is not what was put for this key."""
    version, size, _ = HEAD.unpack_from(value)
    assert bytes(value) == make(key, version, size), f"a wrong value for {key!r}"
    return int(version)
