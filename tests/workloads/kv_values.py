"""Values that say which key and which version they are, all through."""

from __future__ import annotations

import hashlib
import struct

from fs3.kvcache import KVCache

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


def keys_of(count: int) -> list[bytes]:
    """Some keys."""
    return [b"page-%d" % number for number in range(count)]


def put_all(cache: KVCache, keys: list[bytes], version: int, size: int) -> None:
    """Put values of one version; all are to be stored."""
    assert all(cache.put_batch(keys, [make(key, version, size) for key in keys]))


def versions(cache: KVCache, keys: list[bytes]) -> list[int | None]:
    """The version that each key has; no value may be wrong."""
    found = cache.get_batch(keys)
    return [None if value is None else version_of(key, value) for key, value in zip(keys, found, strict=True)]
