"""Files of traces: JSON in the Trace Event Format, compressed when the name ends in .gz."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from typing import Any

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

StrPath = str | os.PathLike[str]


def write_trace(path: StrPath, header: dict[str, Any], events: Iterable[dict[str, Any]]) -> None:
    """Write a trace, one event per line. Replaces the file at once."""
    target = os.fspath(path)
    partial = f"{target}.{os.getpid()}.part"
    opening = gzip.open if target.endswith(".gz") else open
    try:
        with opening(partial, "wt", encoding="utf-8") as file:
            file.write(json.dumps(header, indent=1).removesuffix("\n}") + ',\n "traceEvents": [\n')
            separator = ""
            for event in events:
                file.write(separator + json.dumps(event))
                separator = ",\n"
            file.write("\n]}\n")
        os.replace(partial, target)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def read_trace(path: StrPath) -> dict[str, Any]:
    """A trace as an object with `traceEvents`. Raises INVALID_ARGUMENT for a file that is none, OSError."""
    source = os.fspath(path)
    opening = gzip.open if source.endswith(".gz") else open
    try:
        with opening(source, "rt", encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, EOFError, gzip.BadGzipFile) as e:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{source} is no JSON of a trace: {e}") from e
    if isinstance(found, list):
        found = {"traceEvents": found}
    if not isinstance(found, dict) or not isinstance(found.get("traceEvents"), list):
        raise error(Code.CODE_INVALID_ARGUMENT, f"{source} is no trace: it has no list of traceEvents")
    return found
