"""The connection behind a file system object: made when needed, and made anew in a forked child."""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import dataclass, field
from typing import Any

from fs3 import native
from fs3.client.paths import StrPath, current_umask, to_service
from fs3.client.url import ClusterUrl, find_token, parse_url
from fs3.core.config import RdmaOptions
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code


@dataclass(frozen=True)
class ConnectOptions:
    """Everything needed to connect, again if need be. Immutable.

    ``uid``, ``gid``, ``groups``: who the calls are made as. ``timeout_s``: how long one operation may take in all,
    retries included. ``rdma``: how RDMA is used. ``limits``: further keyword arguments of ``native.Client.connect``.
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


def connect_options(
    url: str,
    token: str | None = None,
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
    """Parse the URL, find the token, and fill in this process' user, groups and umask."""
    parsed = parse_url(url)
    if rdma is not None and not isinstance(rdma, RdmaOptions):
        raise error(Code.CODE_INVALID_ARGUMENT, f"rdma must be an fs3.RdmaOptions, not {rdma!r}")
    return ConnectOptions(
        url=parsed,
        token=find_token(parsed, token),
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
    """A native client with the options to make another. Thread-safe.

    A forked child cannot use its parent's client (the threads are not there); it connects anew at its first call.
    """

    def __init__(self, options: ConnectOptions, client: native.Client) -> None:
        self.options = options
        self._client: native.Client | None = client
        self._pid = os.getpid()
        self._turn = threading.Lock()

    def client(self) -> native.Client:
        """The client of this process. Raises UNAVAILABLE when closed."""
        if self._pid != os.getpid():
            return self._reconnect()
        if self._client is None:
            raise error(Code.CODE_UNAVAILABLE, "the file system is closed; connect again")
        return self._client

    def path(self, path: StrPath) -> bytes:
        """`path` from the cluster's root."""
        return to_service(self.options.base, path)

    @property
    def umask(self) -> int:
        """What the service takes from the mode of something new, unless a default access control list is there."""
        return self.options.umask & 0o777

    def release(self) -> native.Client | None:
        """The client to close, once; None when there is none of this process."""
        client, self._client = self._client, None
        return client if self._pid == os.getpid() else None

    def _reconnect(self) -> native.Client:
        # The lock may have been held by a thread of the parent that does not exist here.
        self._turn = threading.Lock() if self._pid != os.getpid() and self._turn.locked() else self._turn
        with self._turn:
            if self._pid != os.getpid():
                if self._client is None:
                    raise error(Code.CODE_UNAVAILABLE, "the file system is closed; connect again")
                self._client = self.options.start().wait()
                self._pid = os.getpid()
        return self.client()
