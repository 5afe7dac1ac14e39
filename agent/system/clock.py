"""Wall time for people, monotonic time for limits. Nothing is ever decided by wall time."""

from __future__ import annotations

import time


def wall_ns() -> int:
    """Return nanoseconds since the epoch."""
    return time.time_ns()


def monotonic_s() -> float:
    """Return seconds on a clock that never jumps."""
    return time.monotonic()
