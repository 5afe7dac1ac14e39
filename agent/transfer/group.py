"""Threads that stand or fall together: the first failure ends all of them and is the group's; none dies silently."""

from __future__ import annotations

import threading
from collections.abc import Callable


class ThreadGroup:
    """Threads with one fate. ``on_failure`` is called once, from the failing thread, and must make the others return soon."""

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        self._name = name
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self.ended = threading.Event()
        """Set at the first failure, or by ``end``."""

    def start(self, act: Callable[[], None]) -> None:
        """Run ``act`` in a thread of the group."""
        thread = threading.Thread(target=self._guarded, args=(act,), name=self._name, daemon=True)
        with self._lock:
            self._threads.append(thread)
        thread.start()

    def fail(self, error: BaseException) -> None:
        """End the group for ``error``, unless it ended before."""
        with self._lock:
            if self.ended.is_set():
                return
            self._failure = error
            self.ended.set()
        self._on_failure(error)

    def end(self) -> None:
        """End the group without a failure: what its threads still raise is the echo of that."""
        with self._lock:
            self.ended.set()

    def wait(self) -> None:
        """Return when every thread has returned; the caller's own thread is not waited for."""
        while True:
            with self._lock:
                alive = [thread for thread in self._threads if thread.is_alive() and thread is not threading.current_thread()]
            if not alive:
                return
            alive[0].join()

    @property
    def failure(self) -> BaseException | None:
        """The first failure, if there was one."""
        return self._failure

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            self.fail(error)
