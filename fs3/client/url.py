"""Where a cluster is: ``fs3://host:port[,host:port...][/base][?token_file=...]``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

SCHEME = "fs3"
EXAMPLE = "write fs3://host:port[,host:port]/[directory]"


@dataclass(frozen=True)
class ClusterUrl:
    """A parsed URL.

    ``metas``: "host:port" of meta services; ``base``: directory that paths start at, "" for the root, without slashes
    at its ends; ``token_file``: file that holds the token, if the URL names one.
    """

    metas: tuple[str, ...]
    base: str = ""
    token_file: str | None = None

    def __str__(self) -> str:
        return f"{SCHEME}://{','.join(self.metas)}/{self.base}"

    def complete(self) -> str:
        """The URL that :func:`parse_url` makes the same of, in any directory."""
        file = f"?token_file={quote(os.path.abspath(self.token_file))}" if self.token_file else ""
        return f"{SCHEME}://{','.join(self.metas)}/{quote(self.base)}{file}"


def given_url(url: str | None) -> str:
    """`url`, else that of FS3_URL. Raises INVALID_ARGUMENT when there is neither."""
    found = url or os.environ.get("FS3_URL")
    if not found:
        raise error(Code.CODE_INVALID_ARGUMENT, f"no URL was given and FS3_URL is not set: {EXAMPLE}")
    return found


def parse_url(url: str) -> ClusterUrl:
    """Parse `url`. Raises INVALID_ARGUMENT saying what is wrong and how it should look."""
    parts = urlsplit(url)
    if parts.scheme != SCHEME:
        raise _bad(url, f"it does not begin with {SCHEME}://")
    if "@" in parts.netloc:
        # Not repeated in the message: it may end in a log.
        raise _bad(f"{SCHEME}://...@{parts.netloc.rpartition('@')[2]}", "use token=, ?token_file= or FS3_TOKEN")
    if parts.fragment:
        raise _bad(url, "a '#' must be written as %23")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - {"token_file"})
    if unknown:
        raise _bad(url, f"it has the unknown option {unknown[0]!r}; there is token_file")
    metas = tuple(_address(url, part) for part in parts.netloc.split(","))
    return ClusterUrl(metas, unquote(parts.path).strip("/"), options.get("token_file"))


def find_token(url: ClusterUrl, token: str | None) -> str:
    """The token: the argument, else from the file the URL names, FS3_TOKEN, the file FS3_TOKEN_FILE names, or "".

    Raises ACCESS when a file that was named cannot be read.
    """
    if token is not None:
        return token
    if url.token_file:
        return _read_token(url.token_file)
    if "FS3_TOKEN" in os.environ:
        return os.environ["FS3_TOKEN"]
    path = os.environ.get("FS3_TOKEN_FILE")
    return _read_token(path) if path else ""


def _read_token(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not text"
        raise error(Code.CODE_ACCESS, f"the token file {path} cannot be read: {reason}") from e


def _address(url: str, text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not host or host == "[":
        raise _bad(url, f"{text!r} is not host:port")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise _bad(url, f"write the IPv6 address of {text!r} in brackets")
    if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise _bad(url, f"the port of {text!r} is not a number from 1 to 65535")
    return f"{host}:{int(port)}"


def _bad(url: str, why: str) -> OSError:
    return error(Code.CODE_INVALID_ARGUMENT, f"{url!r} is not the URL of a cluster: {why}; {EXAMPLE}")
