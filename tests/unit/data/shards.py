"""Shards of other software's formats, made as that software makes them."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path


def write_ffrecord(path: Path, records: list[bytes]) -> None:
    """As `ffrecord.FileWriter`: checksum of the header, count, checksums, absolute offsets, records."""
    crcs = struct.pack(f"<{len(records)}I", *map(zlib.crc32, records))
    at, offsets = 12 + 12 * len(records), []
    for record in records:
        offsets.append(at)
        at += len(record)
    head = struct.pack("<Q", len(records)) + crcs + struct.pack(f"<{len(records)}Q", *offsets)
    path.write_bytes(struct.pack("<I", zlib.crc32(head)) + head + b"".join(records))


def write_tar(path: Path, members: list[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> None:
    """As `webdataset.TarWriter`: the members of a sample one after the other."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
