"""Wall time for people, monotonic time for limits. Nothing is ever decided by wall time.

Which clock that is stands in ``CLOCK``, a variable of the context: the kernel's, unless whoever runs this code has one of his own, as a
simulation has for each of its nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Final, Protocol


class Clock(Protocol):
    """What tells the time, and lets it go by."""

    def wall_ns(self) -> int:
        """Return nanoseconds since the epoch."""

    def monotonic_s(self) -> float:
        """Return seconds on a clock that never jumps."""

    def boottime_ns(self) -> int:
        """Return nanoseconds since the boot, those of a suspended machine included."""

    def boot_id(self) -> str:
        """Return what tells this boot from every other."""

    def sleep(self, seconds: float) -> None:
        """Return when so much time has gone by."""


class KernelClock:
    """The clocks of this machine's kernel (clock_gettime(2))."""

    def wall_ns(self) -> int:
        return time.time_ns()

    def monotonic_s(self) -> float:
        return time.monotonic()

    def boottime_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def boot_id(self) -> str:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


_KERNEL: Final = KernelClock()
CLOCK: Final[ContextVar[Clock]] = ContextVar("clock", default=_KERNEL)


def wall_ns() -> int:
    """Return nanoseconds since the epoch."""
    return CLOCK.get().wall_ns()


def monotonic_s() -> float:
    """Return seconds on a clock that never jumps."""
    return CLOCK.get().monotonic_s()


def boottime_ns() -> int:
    """Return nanoseconds since the boot, those of a suspended machine included (clock_gettime(2), CLOCK_BOOTTIME)."""
    return CLOCK.get().boottime_ns()


def sleep(seconds: float) -> None:
    """Return when so much time has gone by; for limits that have to be waited out, and pauses before the next try."""
    CLOCK.get().sleep(seconds)


def wait_until(condition: Callable[[], bool], limit_s: float, *, every_s: float = 0.02) -> bool:
    """Return whether ``condition`` came true within ``limit_s``; for facts no event announces, such as a program's readiness."""
    until = monotonic_s() + limit_s
    while not condition():
        if monotonic_s() > until:
            return False
        sleep(every_s)
    return True


def boot_id() -> str:
    """Return what tells this boot of the kernel from every other (random(4))."""
    return CLOCK.get().boot_id()
