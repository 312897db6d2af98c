"""``fs3://`` for fsspec, and so for pandas, pyarrow, dask, zarr, duckdb, datasets: ``pip install fs3[fsspec]``."""

from __future__ import annotations

import datetime
import io
import os
import re
import shutil
import stat as stat_module
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote, unquote_plus

from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.spec import AbstractFileSystem
from fsspec.utils import isfilelike, stringify_path, tokenize

from fs3.client import transfer
from fs3.client.connection import Connection, connect_options
from fs3.client.file import BUFFER_BYTES
from fs3.client.filesystem import FileSystem
from fs3.client.url import given_url

# Host and port, path, and where the token is.
_URL = re.compile(r"fs3://(?P<host>[^/?]*)(?P<path>/.*?)?/?(?:\?token_file=(?P<token_file>[^?]*))?", re.DOTALL)
# What fsspec passes to every file system.
_FOR_FSSPEC = ("use_listings_cache", "listings_expiry_time", "max_paths", "asynchronous", "loop", "batch_size")


class Fs3FileSystem(AbstractFileSystem):  # type: ignore[misc]
    """A cluster for fsspec. Thread-safe; instances with the same arguments share one connection, made when needed.

    URLs are ``fs3://host:port/path``; paths are from the cluster's root. Storage options: ``host``, as "host:port",
    where the URL has none (default: what FS3_URL says; paths start at its directory then), ``token``, ``token_file``,
    and the other options of :func:`fs3.connect`. Listings are never cached: every call tells what is there now.
    Writing makes the directories that are missing. Pickles as its arguments, and works in forked children.
    """

    protocol = "fs3"
    root_marker = "/"

    def __init__(
        self, host: str | None = None, token: str | None = None, *, token_file: str | None = None, **options: Any
    ) -> None:
        super().__init__(**{name: options.pop(name) for name in _FOR_FSSPEC if name in options})
        url = given_url(f"fs3://{host}/" if host else None)
        if token_file is not None:
            url = f"{url.partition('?')[0]}?token_file={quote(token_file)}"
        self._fs = _shared(url, token, options)

    @property
    def fs(self) -> FileSystem:
        """The file system below."""
        return self._fs

    @property
    def fsid(self) -> str:
        """The cluster."""
        return f"fs3-{self.fs.cluster_id}"

    # ---- names

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        path = stringify_path(path)
        url = _URL.fullmatch(path)
        path = (url["path"] or "") if url else path.removeprefix("fs3::")
        return f"/{path.strip('/')}"

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        found = _URL.fullmatch(path)
        if not found or not found["host"]:
            return {}
        token_file = {"token_file": unquote_plus(found["token_file"])} if found["token_file"] else {}
        return {"host": found["host"], **token_file}

    def unstrip_protocol(self, name: str) -> str:
        """The URL of a path."""
        return f"{self.fs.url.rstrip('/')}{self._strip_protocol(name)}"

    def _isfilestore(self) -> bool:
        return True

    # ---- what is there

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Attributes of what is at a path, of a symlink's goal with ``islink``. Times are seconds since 1970."""
        path = self._strip_protocol(path)
        st = self.fs.lstat(path)
        if stat_module.S_ISLNK(st.st_mode):
            (goal,) = self.fs.stat_many([path])
            return _info(path, st, goal)
        return _info(path, st)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """What is in a directory, or the file itself: dictionaries as of :meth:`info`, or names."""
        path = self._strip_protocol(path)
        try:
            entries = list(self.fs.scandir(path))
        except NotADirectoryError:
            return [self.info(path) if detail else path]
        if not detail:
            return [entry.path for entry in entries]
        links = [entry.path for entry in entries if entry.is_symlink()]
        goals = dict(zip(links, self.fs.stat_many(links), strict=True)) if links else {}
        return [_info(e.path, e.stat(follow_symlinks=False), goals.get(e.path)) for e in entries]

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether something is there. Raises when the cluster does not answer."""
        return self.fs.exists(self._strip_protocol(path))

    def lexists(self, path: str, **kwargs: Any) -> bool:
        """Whether a name is there, a dangling symlink included."""
        return self.fs.lexists(self._strip_protocol(path))

    def isdir(self, path: str) -> bool:
        """Whether it is a directory, or a symlink to one."""
        return self.fs.isdir(self._strip_protocol(path))

    def isfile(self, path: str) -> bool:
        """Whether it is a regular file, or a symlink to one."""
        return self.fs.isfile(self._strip_protocol(path))

    def sizes(self, paths: Sequence[str]) -> list[int]:
        """Sizes of many files, in few round trips. Raises the first error."""
        return [_raised(st).st_size for st in self.fs.stat_many([self._strip_protocol(path) for path in paths])]

    def created(self, path: str) -> datetime.datetime:
        """When the inode last changed, in UTC: clusters do not keep when it was made."""
        return datetime.datetime.fromtimestamp(self.info(path)["created"], tz=datetime.UTC)

    def modified(self, path: str) -> datetime.datetime:
        """When the content last changed, in UTC."""
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    # ---- content

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Any = None,
        *,
        permissions: int = 0o666,
        chunk_bytes: int = 0,
        **kwargs: Any,
    ) -> Any:
        if mode == "rb":
            return _Reader(self.fs.open(path, mode, buffering=0), block_size or BUFFER_BYTES)
        buffering = block_size or -1
        if "r" in mode:
            return self.fs.open(path, mode, buffering)
        made: dict[str, Any] = {"permissions": permissions, "chunk_bytes": chunk_bytes}
        if not autocommit:
            return self._with_parent(path, lambda: _Deferred(self.fs, path, mode, **made))
        return self._with_parent(path, lambda: self.fs.open(path, mode, buffering, **made))

    def _with_parent(self, path: str, work: Callable[[], Any]) -> Any:
        """Do what makes `path`, with the directories above it where they are missing."""
        try:
            return work()
        except FileNotFoundError:
            self.fs.makedirs(self._parent(path), exist_ok=True)
            return work()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The bytes of a file from `start` to `end`, both as in a slice."""
        (content,) = self.cat_ranges([path], [start], [end], on_error="raise")
        assert isinstance(content, bytes)
        return content

    def cat_ranges(
        self,
        paths: list[str],
        starts: int | list[int | None] | None,
        ends: int | list[int | None] | None,
        max_gap: int | None = None,
        on_error: str = "return",
        **kwargs: Any,
    ) -> list[bytes | OSError]:
        """Ranges of files in one go, batched by node. `starts`, `ends`: as in a slice, one for all or a list."""
        if not isinstance(paths, list):
            raise TypeError(f"paths must be a list, not {type(paths).__name__}")
        firsts = starts if isinstance(starts, list) else [starts] * len(paths)
        lasts = ends if isinstance(ends, list) else [ends] * len(paths)
        names = [self._strip_protocol(path) for path in paths]
        slices = list(zip(names, firsts, lasts, strict=True))
        from_end = list({name for name, *bounds in slices if any((bound or 0) < 0 for bound in bounds)})
        sizes = {
            name: 0 if isinstance(st, OSError) else st.st_size
            for name, st in zip(from_end, self.fs.stat_many(from_end) if from_end else [], strict=True)
        }
        ranges = [(name, *_range(first, last, sizes.get(name, 0))) for name, first, last in slices]
        found: list[Any] = self.fs.read_batch(ranges, return_errors=on_error == "return")
        return [one if isinstance(one, OSError) else bytes(one) for one in found]

    def cat(self, path: Any, recursive: bool = False, on_error: str = "raise", **kwargs: Any) -> Any:
        """The content of a file, or of many as a dictionary, in one go. `on_error`: "raise", "omit", "return"."""
        paths = self.expand_path(path, recursive=recursive)
        if not isinstance(path, list) and paths == [self._strip_protocol(path)]:
            return self.cat_file(paths[0], **kwargs)
        if recursive:
            found = zip(paths, self.fs.stat_many(paths), strict=True)
            paths = [one for one, st in found if isinstance(st, OSError) or not stat_module.S_ISDIR(st.st_mode)]
        start, end = kwargs.get("start"), kwargs.get("end")
        contents = self.cat_ranges(paths, start, end, on_error="raise" if on_error == "raise" else "return")
        wanted = (bytes,) if on_error == "omit" else (bytes, OSError)
        return {name: one for name, one in zip(paths, contents, strict=True) if isinstance(one, wanted)}

    def pipe_file(self, path: str, value: Any, mode: str = "overwrite", **kwargs: Any) -> None:
        """Make a file of bytes. Mode "create": raises FileExistsError when it is there."""
        with self.open(path, "xb" if mode == "create" else "wb", **kwargs) as file:
            file.write(value)

    def touch(self, path: str, truncate: bool = True, **kwargs: Any) -> None:
        """Make an empty file, or set the times of one that is there, which is emptied only with `truncate`."""
        path = self._strip_protocol(path)
        self._with_parent(path, lambda: self.fs.open(path, "wb" if truncate else "ab", buffering=0)).close()
        self.fs.utime(path)

    # ---- copies

    def get_file(
        self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, outfile: Any = None, **kwargs: Any
    ) -> None:
        """Copy a file to the local file system, pieces of a large one at the same time."""
        rpath = self._strip_protocol(rpath)
        st = self.fs.lstat(rpath)
        if outfile is not None or isfilelike(lpath) or not stat_module.S_ISREG(st.st_mode):
            super().get_file(rpath, lpath, callback=callback, outfile=outfile, **kwargs)
            return
        os.makedirs(os.path.dirname(os.path.abspath(lpath)), exist_ok=True)
        callback.set_size(st.st_size)
        transfer.download(self.fs, rpath, lpath, preserve=False, progress=_progress(callback))

    def put_file(
        self, lpath: str, rpath: str, callback: Any = DEFAULT_CALLBACK, mode: str = "overwrite", **kwargs: Any
    ) -> None:
        """Copy a local file, pieces of a large one at the same time. Mode "create" as in :meth:`pipe_file`."""
        rpath = self._strip_protocol(rpath)
        # A symlink is followed.
        lpath = os.path.realpath(lpath)
        if self._intrans or not os.path.isfile(lpath):
            super().put_file(lpath, rpath, callback=callback, mode=mode, **kwargs)
            return
        callback.set_size(os.path.getsize(lpath))
        self.fs.makedirs(self._parent(rpath), exist_ok=True)
        transfer.upload(self.fs, lpath, rpath, preserve=False, overwrite=mode != "create", progress=_progress(callback))

    def cp_file(self, path1: str, path2: str, **kwargs: Any) -> None:
        """Copy a file, or make a directory where `path1` is one."""
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        source, target = self.fs.stat_many([path1, path2])
        if stat_module.S_ISDIR(_raised(source).st_mode):
            self.fs.makedirs(path2, exist_ok=True)
            return
        if not isinstance(target, OSError) and target.st_ino == _raised(source).st_ino:
            raise shutil.SameFileError(f"{path1!r} and {path2!r} are the same file")
        self.fs.makedirs(self._parent(path2), exist_ok=True)
        if self.fs.islink(path1):
            with self.open(path1) as reader, self.open(path2, "wb") as writer:
                shutil.copyfileobj(reader, writer, BUFFER_BYTES)
        else:
            transfer.copy(self.fs, path1, self.fs, path2, preserve=False)

    def mv(self, path1: Any, path2: str, recursive: bool = False, maxdepth: int | None = None, **kwargs: Any) -> None:
        """Give something another name, at once and whole; into `path2` where that is a directory. Replaces a file."""
        if not isinstance(path1, str) or maxdepth is not None or any(letter in path1 for letter in "*?["):
            super().mv(path1, path2, recursive=recursive, maxdepth=maxdepth, **kwargs)
            return
        source, target = self._strip_protocol(path1), self._strip_protocol(path2)
        if source == target:
            return
        if path2.endswith("/") or self.fs.isdir(target):
            target = f"{target.rstrip('/')}/{source.rpartition('/')[2]}"
        _raised(self.fs.stat_many([source], follow_symlinks=False)[0])
        self._with_parent(target, lambda: self.fs.replace(source, target))

    # ---- directories and removal

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        """Make a directory. Raises FileExistsError when something is there."""
        path = self._strip_protocol(path)
        if create_parents:
            self.fs.makedirs(path)
        else:
            self.fs.mkdir(path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory and those above it."""
        self.fs.makedirs(self._strip_protocol(path), exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""
        self.fs.rmdir(self._strip_protocol(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove files, and with `recursive` trees, each in one atomic step."""
        if maxdepth is not None:
            super().rm(path, recursive=recursive, maxdepth=maxdepth)
            return
        for one in self.expand_path(path):
            if recursive and stat_module.S_ISDIR(self.fs.lstat(one).st_mode):
                self.fs.rmtree(one)
            else:
                self.fs.remove(one)

    def _rm(self, path: str) -> None:
        path = self._strip_protocol(path)
        try:
            self.fs.remove(path)
        except IsADirectoryError:
            self.fs.rmdir(path)


class _Reader(io.BufferedReader):
    """A buffered file with what readers written for fsspec look for."""

    @property
    def size(self) -> int:
        """The length in bytes."""
        length: int = self.raw.length  # type: ignore[attr-defined]
        return length


class _Deferred(io.BufferedWriter):
    """A file of a transaction: written beside its place, which it takes when the transaction ends."""

    def __init__(self, fs: FileSystem, path: str, mode: str, **made: int) -> None:
        if "a" in mode:
            raise io.UnsupportedOperation("a transaction cannot append to a file")
        self._fs = fs
        self._exclusive = "x" in mode
        self._path = path
        directory, _, name = path.rpartition("/")
        self._temporary = f"{directory}/.{name[:200]}.{uuid.uuid4().hex}.tmp"
        super().__init__(fs.open(self._temporary, "xb", buffering=0, **made), BUFFER_BYTES)

    def commit(self) -> None:
        """Take the place."""
        self.close()
        if self._exclusive:
            self._fs.rename(self._temporary, self._path)
        else:
            self._fs.replace(self._temporary, self._path)

    def discard(self) -> None:
        """Leave nothing."""
        try:
            self.close()
        finally:
            self._fs.remove(self._temporary)


def _range(start: int | None, end: int | None, size: int) -> tuple[int, int | None]:
    """Offset and length of a slice; `size` is only looked at for negative numbers."""
    first, last = (bound if bound is None or bound >= 0 else max(0, size + bound) for bound in (start, end))
    first = first or 0
    return first, None if last is None else max(0, last - first)


def _raised(found: os.stat_result | OSError) -> os.stat_result:
    if isinstance(found, OSError):
        raise found
    return found


_TYPES = {stat_module.S_IFDIR: "directory", stat_module.S_IFREG: "file", stat_module.S_IFLNK: "link"}


def _info(path: str, st: os.stat_result, goal: os.stat_result | OSError | None = None) -> dict[str, Any]:
    """What fsspec tells of a file. `goal`: of a symlink; it stays one where that is nothing."""
    shown = st if goal is None or isinstance(goal, OSError) else goal
    return {
        "name": path,
        "size": shown.st_size,
        "type": _TYPES.get(stat_module.S_IFMT(shown.st_mode), "other"),
        "created": shown.st_ctime,
        "mtime": shown.st_mtime,
        "mode": shown.st_mode,
        "uid": shown.st_uid,
        "gid": shown.st_gid,
        "ino": shown.st_ino,
        "nlink": shown.st_nlink,
        "islink": goal is not None,
    }


def _progress(callback: Any) -> transfer.Callback:
    return lambda done: callback.absolute_update(done.bytes)


# fsspec makes an instance for every thread; they share a connection, which ends with the last of them.
_connected: weakref.WeakValueDictionary[str, FileSystem] = weakref.WeakValueDictionary()


def _shared(url: str, token: str | None, options: dict[str, Any]) -> FileSystem:
    """The file system with these arguments, which connects at its first call."""
    key = tokenize(url, token, **options)
    found = _connected.get(key)
    if found is None:
        found = _connected[key] = FileSystem(Connection(connect_options(url, token, **options)))
    return found
