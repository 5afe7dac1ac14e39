"""Threads, and what they wait for: the kernel's, or those of whoever gives others, as a simulation does that runs one step at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

R = TypeVar("R")


class Event(Protocol):
    """Something that happens once."""

    def set(self) -> None:
        """Let it have happened."""

    def is_set(self) -> bool:
        """Whether it has happened."""

    def wait(self, timeout: float | None = None) -> bool:
        """Return whether it happened within ``timeout`` seconds; None: however long that takes."""


class Threads:
    """Threads of this process."""

    def lock(self) -> AbstractContextManager[Any]:
        """Return a lock for code that may wait while it holds it."""
        return threading.Lock()

    def event(self) -> Event:
        """Return an event that has not happened."""
        return threading.Event()

    def start(self, work: Callable[[], None], name: str) -> None:
        """Let ``work`` be done in the background, for no longer than this process lives."""
        threading.Thread(target=work, name=name, daemon=True).start()

    def beside(self, work: Callable[[], R]) -> Callable[[], R]:
        """Begin ``work``; return what waits for its result, or raises what it raised. It has to be called."""
        pool = ThreadPoolExecutor(max_workers=1)
        begun = pool.submit(work)
        pool.shutdown(wait=False)
        return begun.result
