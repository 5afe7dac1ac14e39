"""Wall time for people, monotonic time for limits. Nothing is ever decided by wall time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def wall_ns() -> int:
    """Return nanoseconds since the epoch."""
    return time.time_ns()


def monotonic_s() -> float:
    """Return seconds on a clock that never jumps."""
    return time.monotonic()


def boottime_ns() -> int:
    """Return nanoseconds since the boot, those of a suspended machine included (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def wait_until(condition: Callable[[], bool], limit_s: float, *, every_s: float = 0.02) -> bool:
    """Return whether ``condition`` came true within ``limit_s``; for facts no event announces, such as a program's readiness."""
    until = monotonic_s() + limit_s
    while not condition():
        if monotonic_s() > until:
            return False
        time.sleep(every_s)
    return True


def boot_id() -> str:
    """Return what tells this boot of the kernel from every other (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
