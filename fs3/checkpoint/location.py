"""Where a checkpoint is: a path on a file system, or an URL that says both."""

from __future__ import annotations

import os
from dataclasses import replace

from fs3.client import FileSystem, connect
from fs3.client.connection import connect_options
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code


def located(path: str | os.PathLike[str], fs: FileSystem | None) -> tuple[FileSystem, str]:
    """The file system and the path on it. Without `fs`, `path` is an ``fs3://`` URL, which is connected to.

    Raises INVALID_ARGUMENT where neither fits, and as :func:`fs3.connect` does.
    """
    text = os.fspath(path)
    if not text.startswith("fs3://"):
        if fs is None:
            raise error(Code.CODE_INVALID_ARGUMENT, f"{text!r}: give fs=fs3.connect(...), or an fs3:// URL")
        return fs, text
    url = connect_options(text).url
    if fs is None:
        return connect(replace(url, base="").complete()), f"/{url.base}"
    if fs.url != str(replace(url, base="")):
        raise error(Code.CODE_INVALID_ARGUMENT, f"{text!r} is not a path on {fs.url}, which was given as fs")
    return fs, f"/{url.base}"
