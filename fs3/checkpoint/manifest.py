"""What a checkpoint's directory holds, and how it is told from one that is being written.

::

    step-100/
      checkpoint.json    what it is; small. A directory without it is no checkpoint
      checksums.json     where every item lies, and its CRCs
      .metadata          DCP's metadata (pickle, as DCP's own), with a StoredItem for every item
      __0_0.distcp       the bytes of what rank 0 wrote, items one after the other
    .step-200.tmp-6f1c.. one that is being written, or that a killed job has left

Formats carry versions; unknown fields are ignored.
"""

from __future__ import annotations

import json
import posixpath
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

FORMAT = 1
SUMMARY = "checkpoint.json"
CHECKSUMS = "checksums.json"
METADATA = ".metadata"
# An item longer than this has a CRC for each part of it, to be verified with little memory. Part of the format.
CRC_BYTES = 4 << 20

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.tmp-[0-9a-f]{16}")


@dataclass(frozen=True)
class StoredItem:
    """Where an item lies: its part of `metadata.storage_data`.

    `offset` and `length` are bytes in the file `relative_path` of the checkpoint. A tensor is its elements in C order,
    of `dtype` (a ``torch.dtype``) and `shape`; both are None for what was serialized by the planner. `crcs`: CRC32C of
    every CRC_BYTES. DCP's metadata has it pickled under this name, in this module: neither may change.
    """

    relative_path: str
    offset: int
    length: int
    crcs: tuple[int, ...]
    dtype: Any = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Summary:
    """What `checkpoint.json` says."""

    save_id: str
    created_ns: int
    """Since 1970; greater than that of every checkpoint which was beside it when it was published."""
    length: int
    """Bytes of all items, without padding and metadata."""
    items: int
    files: int
    torch: str
    """The version of PyTorch that wrote it."""
    metadata_crc: int
    checksums_crc: int
    version: int = FORMAT

    def dump(self) -> bytes:
        """As it is stored."""
        return json.dumps(asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> Summary:
        """Raises ValueError for what is no summary, or of a newer format."""
        found = json.loads(data)
        if not isinstance(found, dict) or not isinstance(found.get("version"), int):
            raise ValueError("it is no summary of a checkpoint")
        if found["version"] > FORMAT:
            raise ValueError(f"its format is {found['version']}; this fs3 knows {FORMAT}: update fs3")
        try:
            return cls(**{field.name: found[field.name] for field in fields(cls)})
        except KeyError as e:
            raise ValueError(f"it lacks {e}") from e


@dataclass(frozen=True)
class Sums:
    """An item in `checksums.json`."""

    name: str
    offset: int
    length: int
    crcs: tuple[int, ...]


def dump_sums(files: dict[str, list[Sums]]) -> bytes:
    """`checksums.json`, of files of a checkpoint."""
    listed = {name: [[s.name, s.offset, s.length, list(s.crcs)] for s in sums] for name, sums in files.items()}
    return json.dumps({"version": FORMAT, "files": listed}, separators=(",", ":")).encode()


def parse_sums(data: bytes) -> dict[str, list[Sums]]:
    """The reverse of :func:`dump_sums`. Raises ValueError."""
    try:
        found = json.loads(data)["files"]
        return {
            name: [Sums(item, offset, length, tuple(crcs)) for item, offset, length, crcs in sums]
            for name, sums in found.items()
        }
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{CHECKSUMS} is not in its format") from e


def split(path: str) -> tuple[str, str]:
    """The directory and the name of a checkpoint. Raises INVALID_ARGUMENT for a path without a name."""
    directory, name = posixpath.split(path.rstrip("/"))
    if name in ("", ".", ".."):
        raise error(Code.CODE_INVALID_ARGUMENT, f"{path!r} is no name for a checkpoint: write /directory/name")
    if _TEMPORARY.fullmatch(name):
        raise error(Code.CODE_INVALID_ARGUMENT, f"{path!r} is no name for a checkpoint: it is one for unfinished ones")
    return directory or "/", name


def temporary(path: str) -> str:
    """A new name beside `path` for writing it. No other save ever has it."""
    directory, name = split(path)
    return posixpath.join(directory, f".{name}.tmp-{secrets.token_hex(8)}")


def unfinished_name(name: str) -> str | None:
    """What the checkpoint would be called of which `name` is the temporary name; None for any other."""
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else None


def sums_of(items: Iterable[tuple[str, StoredItem]]) -> dict[str, list[Sums]]:
    """The sums of named items, by file and offset."""
    files: dict[str, list[Sums]] = {}
    for name, item in sorted(items, key=lambda pair: (pair[1].relative_path, pair[1].offset)):
        files.setdefault(item.relative_path, []).append(Sums(name, item.offset, item.length, item.crcs))
    return files
