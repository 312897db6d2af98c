"""Sizes and times as people write them."""

from __future__ import annotations

import re

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

_BYTES = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_NUMBER = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_NAMES = ("TiB", "GiB", "MiB", "KiB")


def parse_bytes(text: str) -> int:
    """Parse "4096", "64MiB", "1.5 GiB", "2GB" (decimal) or "64M" (binary, like MiB).

    Raises Fs3Error INVALID_ARGUMENT for anything else and for fractions of a byte.
    """
    match = _NUMBER.fullmatch(text)
    scale = _BYTES.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{text!r} is not a size; write for example 64MiB")
    number: str = match.group(1)
    whole, _, fraction = number.partition(".")
    denominator: int = 10 ** len(fraction)
    value, rest = divmod(int(whole + fraction) * scale, denominator)
    if rest:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{text!r} is not a whole number of bytes")
    return value


def parse_seconds(text: str) -> float:
    """Parse "90", "90s", "30m", "12h", "7d" or "2w" to seconds. Raises Fs3Error INVALID_ARGUMENT for anything else."""
    match = _NUMBER.fullmatch(text)
    scale = _SECONDS.get(match.group(2).lower()) if match else None
    if match is None or scale is None:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{text!r} is not a time; write for example 90s, 30m, 12h or 7d")
    return float(match.group(1)) * scale


def format_seconds(seconds: float) -> str:
    """Write a time with the largest unit of parse_seconds that makes it a whole number, in seconds otherwise."""
    for unit in ("d", "h", "m"):
        if seconds and seconds % _SECONDS[unit] == 0:
            return f"{seconds / _SECONDS[unit]:.0f}{unit}"
    return f"{seconds:g}s"


def format_bytes(count: int) -> str:
    """Write a size with the largest binary unit that keeps it at 1 or more, one decimal where needed."""
    for name in _NAMES:
        scale = _BYTES[name.lower()]
        if count >= scale:
            value = f"{count / scale:.1f}"
            return f"{value.removesuffix('.0')} {name}"
    return f"{count} B"
