"""The I/O priority of a thread: whether what it reads and writes waits for the clients of the same disk.

ioprio_set(2), ioprio_get(2). The numbers of the calls are those of the two machines below. Threads and programs begun meanwhile inherit
the priority (block/blk-ioc.c, __copy_io). What it is worth is up to the scheduler of the disk: bfq and mq-deadline know priorities.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_CALLS: Final = {"x86_64": (251, 252), "aarch64": (30, 31)}
"""Numbers of ioprio_set and ioprio_get."""
_THREAD: Final = 1
"""IOPRIO_WHO_PROCESS, which means a thread; 0 is the one that asks."""


class IoPriority(StrEnum):
    """How a thread stands among those that use a disk."""

    NORMAL = "normal"  # as everybody
    LOW = "low"  # the last of those that get a share: class best effort, level 7
    IDLE = "idle"  # while nobody else wants the disk


_VALUES: Final = {IoPriority.LOW: 2 << 13 | 7, IoPriority.IDLE: 3 << 13}


@contextmanager
def io_priority(priority: IoPriority) -> Iterator[None]:
    """Let the calling thread, and what it begins meanwhile, have this priority; where the kernel has none, nothing happens."""
    calls = _CALLS.get(platform.machine())
    if calls is None or priority is IoPriority.NORMAL:
        yield
        return
    setting, getting = calls
    before = _LIBC.syscall(getting, _THREAD, 0)
    _LIBC.syscall(setting, _THREAD, 0, _VALUES[priority])
    try:
        yield
    finally:
        _LIBC.syscall(setting, _THREAD, 0, max(before, 0))
