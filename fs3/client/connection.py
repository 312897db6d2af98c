"""The connection behind a file system object: made when needed, and made anew in a forked child."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from dataclasses import dataclass, field, replace
from typing import Any

from fs3 import native
from fs3.client.paths import StrPath, current_umask, to_service
from fs3.client.url import ClusterUrl, find_token, given_url, parse_url
from fs3.core.config import RdmaOptions
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code


@dataclass(frozen=True)
class ConnectOptions:
    """Everything needed to connect, again if need be. Immutable.

    ``uid``, ``gid``, ``groups``: who the calls are made as. ``timeout_s``: how long one operation may take in all,
    retries included. ``rdma``: how RDMA is used. ``limits``: further keyword arguments of ``native.Client.connect``.
    ``given``: the arguments of :func:`connect_options` that make the same in another process.
    """

    url: ClusterUrl
    token: str = field(repr=False)
    cluster_id: str | None
    uid: int
    gid: int
    groups: tuple[int, ...]
    umask: int
    timeout_s: float
    description: str
    rdma: RdmaOptions
    limits: dict[str, Any]
    given: tuple[str, str | None, dict[str, Any]] = field(default=("", None, {}), repr=False)

    @property
    def base(self) -> bytes:
        """Directory that paths start at."""
        return os.fsencode(self.url.base)

    def start(self) -> native.Operation[native.Client]:
        """A connection, not begun yet."""
        return native.Client.connect(
            self.url.metas,
            self.token,
            cluster_id=self.cluster_id,
            uid=self.uid,
            gid=self.gid,
            groups=self.groups,
            op_timeout_s=self.timeout_s,
            description=self.description,
            rdma=self.rdma,
            **self.limits,
        )


def connect_options(url: str | None = None, token: str | None = None, **options: Any) -> ConnectOptions:
    """The options that arguments of :func:`connect` stand for. Raises as that does for those that are wrong."""
    parsed = parse_url(given_url(url))
    return replace(_filled_in(parsed, token, **options), given=(parsed.complete(), token, options))


def _filled_in(
    url: ClusterUrl,
    token: str | None,
    *,
    cluster_id: str | None = None,
    uid: int | None = None,
    gid: int | None = None,
    groups: list[int] | tuple[int, ...] | None = None,
    umask: int | None = None,
    timeout_s: float = 30.0,
    description: str | None = None,
    rdma: RdmaOptions | None = None,
    **limits: Any,
) -> ConnectOptions:
    """Find the token, and fill in this process' user, groups and umask."""
    if rdma is not None and not isinstance(rdma, RdmaOptions):
        raise error(Code.CODE_INVALID_ARGUMENT, f"rdma must be an fs3.RdmaOptions, not {rdma!r}")
    return ConnectOptions(
        url=url,
        token=find_token(url, token),
        cluster_id=cluster_id,
        uid=os.geteuid() if uid is None else uid,
        gid=os.getegid() if gid is None else gid,
        groups=tuple(os.getgroups() if groups is None else groups),
        umask=current_umask() if umask is None else umask,
        timeout_s=timeout_s,
        description=_description() if description is None else description,
        rdma=rdma or RdmaOptions(),
        limits=limits,
    )


def _description() -> str:
    return f"{os.path.basename(sys.argv[0]) or 'python'}, pid {os.getpid()}"


class Connection:
    """A native client with the options to make another; made when it is first needed if none is given. Thread-safe.

    A forked child cannot use its parent's client (the threads are not there); it connects anew at its first call.
    """

    def __init__(self, options: ConnectOptions, client: native.Client | None = None) -> None:
        self.options = options
        self._client = client
        self._pid = 0 if client is None else os.getpid()
        self._closed = False
        # One thread connects.
        self._turn = threading.Lock()
        _connections.add(self)

    def client(self) -> native.Client:
        """The client of this process. Raises UNAVAILABLE when closed."""
        # In this order: `_connect` sets the process last.
        if self._pid == os.getpid() and (client := self._client) is not None:
            return client
        return self._connect()

    def path(self, path: StrPath) -> bytes:
        """`path` from the cluster's root."""
        return to_service(self.options.base, path)

    @property
    def umask(self) -> int:
        """What the service takes from the mode of something new, unless a default access control list is there."""
        return self.options.umask & 0o777

    def release(self) -> native.Client | None:
        """The client to close, once; None when there is none of this process."""
        with self._turn:
            self._closed = True
            client, self._client = self._client, None
            return client if self._pid == os.getpid() else None

    def forked(self) -> None:
        """Called in a forked child: whoever held the lock is not there."""
        self._turn = threading.Lock()

    def _connect(self) -> native.Client:
        with self._turn:
            if self._closed:
                raise error(Code.CODE_UNAVAILABLE, "the file system is closed; connect again")
            if self._client is None or self._pid != os.getpid():
                self._client = self.options.start().wait()
                self._pid = os.getpid()
            return self._client


_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _forked() -> None:
    for connection in _connections:
        connection.forked()


os.register_at_fork(after_in_child=_forked)
