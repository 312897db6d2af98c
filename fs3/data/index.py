"""Where the records of a shard are, as arrays; and how an index is stored (docs/data.md, "Record files")."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fs3 import native
from fs3.client.finish import name_paths
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

MAGIC = b"fs3rec\r\n"
VERSION = 1
HEADER_BYTES = 64
# magic, version, flags, fields, records, offset and bytes of the index, bytes of keys and metadata in it, its CRC, zero
_HEADER = struct.Struct("<8sHHIQQQQIII")
# The index is of another file.
FLAG_BESIDE = 1
# The records have no checksums; those of the index are 0.
FLAG_UNCHECKED = 2
# A field that a record does not have.
MISSING = 0xFFFFFFFF
RECORD_BYTES_MAX = MISSING - 1
FIELD = "data"


@dataclass(frozen=True)
class Header:
    """The first bytes of a record file or an index beside a shard."""

    records: int
    fields: int
    index_offset: int
    index_bytes: int
    keys_bytes: int
    metadata_bytes: int
    index_crc32c: int
    flags: int = 0

    def pack(self) -> bytes:
        """As stored, with its own checksum at the end."""
        packed = _HEADER.pack(
            MAGIC,
            VERSION,
            self.flags,
            self.fields,
            self.records,
            self.index_offset,
            self.index_bytes,
            self.keys_bytes,
            self.metadata_bytes,
            self.index_crc32c,
            0,
        )
        return packed + struct.pack("<I", native.crc32c(packed))

    @staticmethod
    def unpack(data: bytes, path: str) -> Header:
        """Check and read it. Raises an error that names `path`."""
        if not data.startswith(MAGIC):
            raise wrong(path, "it is no record file of fs3")
        if len(data) < HEADER_BYTES:
            raise wrong(path, "its header is cut")
        packed, (crc,) = data[: HEADER_BYTES - 4], struct.unpack_from("<I", data, HEADER_BYTES - 4)
        if native.crc32c(packed) != crc:
            raise wrong(path, "its header is damaged", Code.CODE_CHECKSUM_MISMATCH)
        _, version, flags, fields, records, offset, length, keys, metadata, index_crc, _ = _HEADER.unpack(packed)
        if version != VERSION:
            raise wrong(path, f"it has version {version} of the format, this fs3 reads {VERSION}: use a newer fs3")
        return Header(records, fields, offset, length, keys, metadata, index_crc, flags)


@dataclass(frozen=True)
class Keys:
    """The names of records: `ends` says where each ends in `text` (UTF-8)."""

    ends: NDArray[np.uint64]
    text: memoryview

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle_keys, (self.ends, bytes(self.text))

    def __getitem__(self, record: int) -> str:
        start = int(self.ends[record - 1]) if record else 0
        return bytes(self.text[start : int(self.ends[record])]).decode("utf-8", "surrogateescape")


@dataclass(frozen=True)
class Index:
    """Where the records of one shard are. Arrays have an entry for each record.

    ``starts``: absolute byte; ``lengths``: bytes; ``crcs``: checksums by ``checksum``, None where there are none.
    ``places``: for records of several fields, (offset in the record, length) of each; a length of MISSING: not there.
    """

    starts: NDArray[np.uint64]
    lengths: NDArray[np.uint32] | NDArray[np.uint64]
    crcs: NDArray[np.uint32] | None = None
    fields: tuple[str, ...] = (FIELD,)
    places: NDArray[np.uint32] | None = None
    keys: Keys | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    checksum: Callable[[memoryview], int] = native.crc32c

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        arrays = (self.starts, self.lengths, self.crcs, self.places, self.keys.ends if self.keys else None)
        return sum(a.nbytes for a in arrays if a is not None) + (len(self.keys.text) if self.keys else 0)


def pack_index(index: Index, offset: int, *, flags: int = 0) -> tuple[Header, bytes]:
    """The stored form of an index that begins at byte `offset`, and the header that tells of it."""
    keys = bytes(index.keys.text) if index.keys else b""
    about: dict[str, Any] = {"fields": list(index.fields), "keys": index.keys is not None, "user": index.metadata}
    metadata = json.dumps(about, separators=(",", ":")).encode()
    crcs = np.zeros(len(index), "<u4") if index.crcs is None else index.crcs.astype("<u4")
    parts = [index.starts.astype("<u8").tobytes(), index.lengths.astype("<u4").tobytes(), crcs.tobytes()]
    if len(index.fields) > 1:
        assert index.places is not None
        parts.append(index.places.astype("<u4").tobytes())
    if index.keys:
        parts.append(index.keys.ends.astype("<u8").tobytes())
    parts += [keys, metadata]
    block = b"".join(parts)
    header = Header(
        records=len(index),
        fields=len(index.fields),
        index_offset=offset,
        index_bytes=len(block),
        keys_bytes=len(keys),
        metadata_bytes=len(metadata),
        index_crc32c=native.crc32c(block),
        flags=flags,
    )
    return header, block


def unpack_index(header: Header, block: memoryview, path: str) -> Index:
    """Check an index against its header and take it apart; arrays are views of `block`."""
    if native.crc32c(block) != header.index_crc32c:
        raise wrong(path, "its index is damaged", Code.CODE_CHECKSUM_MISMATCH)
    text_at = len(block) - header.metadata_bytes - header.keys_bytes
    about = json.loads(bytes(block[len(block) - header.metadata_bytes :]))
    count, at = header.records, 0

    def array(kind: str, items: int) -> NDArray[Any]:
        nonlocal at
        found: NDArray[Any] = np.frombuffer(block, kind, items, at)
        at += found.nbytes
        return found

    starts, lengths, crcs = array("<u8", count), array("<u4", count), array("<u4", count)
    places = array("<u4", count * header.fields * 2).reshape(count, header.fields, 2) if header.fields > 1 else None
    keys = Keys(array("<u8", count), block[text_at : text_at + header.keys_bytes]) if about["keys"] else None
    if at != text_at or len(about["fields"]) != header.fields:
        raise wrong(path, "its index does not fit its header", Code.CODE_CHECKSUM_MISMATCH)
    checked = None if header.flags & FLAG_UNCHECKED else crcs
    return Index(starts, lengths, checked, tuple(about["fields"]), places, keys, about["user"])


def _unpickle_keys(ends: NDArray[np.uint64], text: bytes) -> Keys:
    return Keys(ends, memoryview(text))


def make_keys(keys: Sequence[str]) -> Keys:
    """The stored form of names."""
    raw = [key.encode("utf-8", "surrogateescape") for key in keys]
    return Keys(np.cumsum([len(r) for r in raw], dtype="<u8"), memoryview(b"".join(raw)))


def wrong(path: str, why: str, code: int = Code.CODE_INVALID_ARGUMENT) -> OSError:
    """The error of a file that is not what it should be."""
    found = error(code, why)
    name_paths(found, path)
    return found
