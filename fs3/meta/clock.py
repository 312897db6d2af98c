"""Time, as an argument: tests move it by hand."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Wall time for what users see, monotonic time for every decision."""

    def wall_ns(self) -> int:
        """Nanoseconds since the epoch."""

    def monotonic_s(self) -> float:
        """Seconds on the clock that asyncio's loop uses."""


class SystemClock:
    """The machine's clocks."""

    def wall_ns(self) -> int:
        """See :class:`Clock`."""
        return time.time_ns()

    def monotonic_s(self) -> float:
        """See :class:`Clock`."""
        return time.monotonic()
