"""Seconds of a clock's monotonic time; the clock itself is :mod:`fs3.core.clock`."""

from __future__ import annotations

from fs3.core.clock import Clock


def monotonic_s(clock: Clock) -> float:
    """Every deadline and age in this package is on this scale; with the real clock it is that of asyncio's loop."""
    return clock.monotonic_ns() * 1e-9
