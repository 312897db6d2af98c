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


def format_bytes(count: int) -> str:
    """Write a size with the largest binary unit that keeps it at 1 or more, one decimal where needed."""
    for name in _NAMES:
        scale = _BYTES[name.lower()]
        if count >= scale:
            value = f"{count / scale:.1f}"
            return f"{value.removesuffix('.0')} {name}"
    return f"{count} B"
