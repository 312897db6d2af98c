"""Errors of fs3: one class per errno family, each carrying a wire code.

Every error is an :class:`OSError`, so that ``except FileNotFoundError`` works for users of the client API.
Callers branch on ``code``, ``retryable`` and ``maybe_applied``, never on message text.
"""

from __future__ import annotations

import errno as _errno
from typing import Any

from fs3.v1.frame_pb2 import Code, ErrorDetail

_ERRNO: dict[int, int] = {
    Code.CODE_INTERNAL: _errno.EIO,
    Code.CODE_INVALID_ARGUMENT: _errno.EINVAL,
    Code.CODE_NOT_FOUND: _errno.ENOENT,
    Code.CODE_EXISTS: _errno.EEXIST,
    Code.CODE_NOT_DIRECTORY: _errno.ENOTDIR,
    Code.CODE_IS_DIRECTORY: _errno.EISDIR,
    Code.CODE_NOT_EMPTY: _errno.ENOTEMPTY,
    Code.CODE_ACCESS: _errno.EACCES,
    Code.CODE_NOT_PERMITTED: _errno.EPERM,
    Code.CODE_NAME_TOO_LONG: _errno.ENAMETOOLONG,
    Code.CODE_NO_SPACE: _errno.ENOSPC,
    Code.CODE_FILE_TOO_LARGE: _errno.EFBIG,
    Code.CODE_SYMLINK_LOOP: _errno.ELOOP,
    Code.CODE_READ_ONLY: _errno.EROFS,
    Code.CODE_STALE_HANDLE: _errno.ESTALE,
    Code.CODE_TOO_MANY_LINKS: _errno.EMLINK,
    Code.CODE_NOT_SUPPORTED: _errno.EOPNOTSUPP,
    Code.CODE_NO_DATA: _errno.ENODATA,
    Code.CODE_OUT_OF_RANGE: _errno.ERANGE,
    Code.CODE_TOO_LARGE: _errno.E2BIG,
    Code.CODE_QUOTA_EXCEEDED: _errno.EDQUOT,
    Code.CODE_CROSS_QUOTA: _errno.EXDEV,
    Code.CODE_UNAUTHENTICATED: _errno.EACCES,
    Code.CODE_WRONG_CLUSTER: _errno.EINVAL,
    Code.CODE_PROTOCOL: _errno.EPROTO,
    Code.CODE_TIMEOUT: _errno.ETIMEDOUT,
    Code.CODE_UNAVAILABLE: _errno.EIO,
    Code.CODE_BUSY: _errno.EBUSY,
    Code.CODE_MESSAGE_TOO_BIG: _errno.EMSGSIZE,
    Code.CODE_UNIMPLEMENTED: _errno.ENOSYS,
    Code.CODE_NOT_PRIMARY: _errno.EIO,
    Code.CODE_STALE_CHAIN: _errno.EIO,
    Code.CODE_NOT_SERVING: _errno.EIO,
    Code.CODE_CHUNK_NOT_FOUND: _errno.ENOENT,
    Code.CODE_CHECKSUM_MISMATCH: _errno.EIO,
    Code.CODE_VERSION_GAP: _errno.EIO,
    Code.CODE_DISK_ERROR: _errno.EIO,
    Code.CODE_PAYLOAD_CHECKSUM: _errno.EIO,
    Code.CODE_SUPERSEDED: _errno.EIO,
}

_RETRYABLE = frozenset(
    {
        Code.CODE_TIMEOUT,
        Code.CODE_UNAVAILABLE,
        Code.CODE_BUSY,
        Code.CODE_NOT_PRIMARY,
        Code.CODE_STALE_CHAIN,
        Code.CODE_NOT_SERVING,
        Code.CODE_PAYLOAD_CHECKSUM,
    }
)


class Fs3Error(OSError):
    """An operating error of fs3.

    ``code`` is a :class:`fs3.v1.frame_pb2.Code`; ``errno`` follows from it. ``retryable``: the same request
    may succeed later or elsewhere. ``maybe_applied``: the effect may or may not have happened.
    ``routing_version`` and ``primary`` are hints of the server, 0 and "" when it gave none.
    """

    def __init__(
        self,
        code: int,
        message: str,
        *,
        retryable: bool | None = None,
        maybe_applied: bool = False,
        routing_version: int = 0,
        primary: str = "",
    ) -> None:
        super().__init__(_ERRNO.get(code, _errno.EIO), message)
        self.code = code
        self.message = message
        self.retryable = code in _RETRYABLE if retryable is None else retryable
        self.maybe_applied = maybe_applied
        self.routing_version = routing_version
        self.primary = primary

    def __reduce__(self) -> tuple[Any, ...]:
        # That of OSError would make another one of errno and text.
        return _unpickle, (self.to_detail().SerializeToString(), self.filename, self.filename2)

    def to_detail(self) -> ErrorDetail:
        """Return the wire form of this error."""
        return ErrorDetail(
            code=self.code,  # type: ignore[arg-type]
            message=self.message,
            retryable=self.retryable,
            maybe_applied=self.maybe_applied,
            routing_version=self.routing_version,
            primary=self.primary,
        )


class NotFound(Fs3Error, FileNotFoundError):
    """ENOENT."""


class Exists(Fs3Error, FileExistsError):
    """EEXIST."""


class NotDirectory(Fs3Error, NotADirectoryError):
    """ENOTDIR."""


class IsDirectory(Fs3Error, IsADirectoryError):
    """EISDIR."""


class Denied(Fs3Error, PermissionError):
    """EACCES or EPERM."""


class TimedOut(Fs3Error, TimeoutError):
    """ETIMEDOUT: the deadline passed."""


_CLASSES: dict[int, type[Fs3Error]] = {
    Code.CODE_NOT_FOUND: NotFound,
    Code.CODE_EXISTS: Exists,
    Code.CODE_NOT_DIRECTORY: NotDirectory,
    Code.CODE_IS_DIRECTORY: IsDirectory,
    Code.CODE_ACCESS: Denied,
    Code.CODE_NOT_PERMITTED: Denied,
    Code.CODE_UNAUTHENTICATED: Denied,
    Code.CODE_TIMEOUT: TimedOut,
}


def error(
    code: int,
    message: str,
    *,
    retryable: bool | None = None,
    maybe_applied: bool = False,
    routing_version: int = 0,
    primary: str = "",
) -> Fs3Error:
    """Make the error of the class that fits `code`."""
    return _CLASSES.get(code, Fs3Error)(
        code,
        message,
        retryable=retryable,
        maybe_applied=maybe_applied,
        routing_version=routing_version,
        primary=primary,
    )


def from_detail(detail: ErrorDetail) -> Fs3Error:
    """Make the error that a peer reported."""
    return error(
        detail.code,
        detail.message,
        retryable=detail.retryable,
        maybe_applied=detail.maybe_applied,
        routing_version=detail.routing_version,
        primary=detail.primary,
    )


def _unpickle(detail: bytes, filename: Any, filename2: Any) -> Fs3Error:
    made = from_detail(ErrorDetail.FromString(detail))
    made.filename, made.filename2 = filename, filename2
    return made
