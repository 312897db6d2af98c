"""What the synchronous and the asyncio file system have in common: arguments and results of native calls."""

from __future__ import annotations

import io
import os
import stat as stat_module
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

from google.protobuf.message import Message

from fs3 import native
from fs3.client.buffers import Readable, Writable, exported
from fs3.client.connection import Connection
from fs3.client.file import Mode, RawFile
from fs3.client.finish import name_paths
from fs3.client.paths import StrPath
from fs3.client.records import stat_result
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

M = TypeVar("M", bound=Message)


def stat_results(paths: Sequence[StrPath], found: list[native.Attr | OSError]) -> list[os.stat_result | OSError]:
    """Attributes of many paths; errors carry their paths."""
    for path, item in zip(paths, found, strict=True):
        if isinstance(item, OSError):
            name_paths(item, path)
    return [item if isinstance(item, OSError) else stat_result(item) for item in found]


def open_operation(
    connection: Connection, path: StrPath, mode: Mode, permissions: int, chunk_bytes: int
) -> native.Operation[native.File]:
    """Open or create a file as `mode` says."""
    where, client = connection.path(path), connection.client()
    if mode.action == "r":
        return client.open(where, read=True, write=mode.update)
    exclusive = mode.action == "x"
    return client.create(
        where,
        mode=permissions & 0o7777,
        umask=connection.umask,
        exclusive=exclusive,
        truncate=mode.action == "w",
        read=mode.reads,
        write=True,
        chunk_bytes=chunk_bytes,
        # O_EXCL does not follow a symlink in the last place.
        follow=not exclusive,
    )


def meta_call(client: native.Client, method: int, request: Message, response: type[M]) -> M:
    """Run a metadata operation. The client fills in who calls and, for what changes something, which call it is."""
    with_op = "op" in request.DESCRIPTOR.fields_by_name
    return response.FromString(client.meta_call(method, request.SerializeToString(), with_op).wait())


def native_reads(reads: Iterable[tuple[Any, int, Writable]]) -> list[tuple[native.File, int, Any]]:
    """(file of any kind, offset, buffer) with the native files. Raises TypeError for files of something else."""
    return _native_ops(reads, writing=False)


def native_writes(writes: Iterable[tuple[Any, int, Readable]]) -> list[tuple[native.File, int, Any]]:
    """As :func:`native_reads`, of files open for writing."""
    return _native_ops(writes, writing=True)


def _native_ops(ops: Iterable[tuple[Any, int, Any]], *, writing: bool) -> list[tuple[native.File, int, Any]]:
    found = []
    last: Any = None
    opened: Any = None
    for file, offset, buffer in ops:
        # Many ranges of one file are the common case.
        if opened is None or file is not last:
            last, opened = file, native_file(file, writing=writing)
        found.append((opened, offset, exported(buffer)))
    return found


def native_file(file: Any, *, writing: bool = False) -> native.File:
    """The native file of an open file of any kind. Raises TypeError for something else."""
    raw = getattr(file, "raw", file)
    if not isinstance(getattr(raw, "native", None), native.File):
        raise TypeError(f"not an open file of fs3: {file!r}")
    if isinstance(raw, RawFile) and not (raw.writable() if writing else raw.readable()):
        raise io.UnsupportedOperation("not writable" if writing else "not readable")
    return cast(native.File, raw.native)


def checked_counts(
    ranges: Sequence[tuple[Any, int, Any]], results: list[int | OSError], return_errors: bool
) -> list[int]:
    """The counts. Errors name their files; the first is raised, unless they are to be returned in their places."""
    for (file, _, _), result in zip(ranges, results, strict=True):
        if isinstance(result, OSError):
            name_paths(result, file.name)
            if not return_errors:
                raise result
    return cast(list[int], results)


def link_target(attr: native.Attr, path: StrPath) -> str:
    """Where a symlink points. Raises INVALID_ARGUMENT when it is none."""
    if not stat_module.S_ISLNK(stat_result(attr).st_mode):
        wrong = error(Code.CODE_INVALID_ARGUMENT, "not a symbolic link")
        name_paths(wrong, path)
        raise wrong
    return os.fsdecode(attr.symlink_target)


def time_changes(times: tuple[float, float] | None, ns: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments of ``setattr`` for :func:`os.utime`'s. Raises ValueError when both are given."""
    if times is not None and ns is not None:
        raise ValueError("utime: you may specify either 'times' or 'ns' but not both")
    if times is not None:
        ns = (round(times[0] * 1e9), round(times[1] * 1e9))
    if ns is None:
        return {"atime_now": True, "mtime_now": True}
    return {"atime_ns": ns[0], "mtime_ns": ns[1]}
