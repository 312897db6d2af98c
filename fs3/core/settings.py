"""Settings that change while the cluster runs: the manager keeps them, and they travel with the routing.

A service looks a setting up when it needs it, so that a change holds from the routing that brings it on. What is not
set is as the service's own configuration says.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from fs3.core.config import CHUNK_BYTES_MAX, CHUNK_BYTES_MIN, LOG_LEVELS
from fs3.core.errors import Fs3Error, error
from fs3.core.units import parse_bytes, parse_seconds
from fs3.v1.frame_pb2 import Code

log = logging.getLogger("fs3.core.settings")

T = TypeVar("T", int, str)


@dataclass(frozen=True)
class Setting:
    """One setting. ``parse`` makes a value of what a person wrote, or raises INVALID_ARGUMENT."""

    help: str
    parse: Callable[[str], int | str]


def _chunk_bytes(text: str) -> int:
    size = parse_bytes(text)
    if size & (size - 1) or not CHUNK_BYTES_MIN <= size <= CHUNK_BYTES_MAX:
        raise error(Code.CODE_INVALID_ARGUMENT, f"a chunk size is a power of two from 64KiB to 64MiB, not {text}")
    return size


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 32:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{text!r} is not a number")
    return int(text)


def _milliseconds(text: str) -> int:
    return round(parse_seconds(text) * 1000)


def _log_level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise error(Code.CODE_INVALID_ARGUMENT, f"a log level is one of {', '.join(LOG_LEVELS)}, not {text!r}")
    return text


LOG_LEVEL: Final = "log_level"
CHUNK_BYTES: Final = "meta.chunk_bytes"
STRIPE: Final = "meta.stripe"
GC_DELAY: Final = "meta.gc_delay"

SETTINGS: Final[Mapping[str, Setting]] = {
    LOG_LEVEL: Setting("What services log: debug, info, warning or error.", _log_level),
    CHUNK_BYTES: Setting(
        "Chunk size of new files whose directory does not say: a power of two, 64KiB to 64MiB.", _chunk_bytes
    ),
    STRIPE: Setting("Chains per new file whose directory does not say; 0: 16, growing with the file.", _count),
    GC_DELAY: Setting(
        "How long removed files stay, so that whoever has them open can say so: 10s, 10m.", _milliseconds
    ),
}


def check(name: str, value: str) -> None:
    """Raise INVALID_ARGUMENT for a setting that there is not, or a value that it cannot have."""
    known = SETTINGS.get(name)
    if known is None:
        close = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(SETTINGS)}"
        raise error(Code.CODE_INVALID_ARGUMENT, f"unknown setting {name!r}{hint}")
    known.parse(value)


def value_of(values: Mapping[str, str], name: str, default: T) -> T:
    """The value of a setting; `default` when it is not set, or set by another version to what is not known here."""
    text = values.get(name)
    if text is None:
        return default
    try:
        parsed = SETTINGS[name].parse(text)
    except Fs3Error as exc:
        log.warning("setting %s is ignored: %s", name, exc.message)
        return default
    assert isinstance(parsed, type(default))
    return parsed
