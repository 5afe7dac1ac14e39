"""Threads that stand or fall together: the first failure ends all of them and is the group's; none dies silently."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from agent.contract.errors import LinkLost

_LAST_WORD_S: Final = 1.0


class ThreadGroup:
    """Threads with one fate. ``on_failure`` is called once, from the failing thread, and must make the others return soon.

    A peer that gives up says why on its connections and closes them. Who notices the closing first waits a moment for those who still
    listen, so that the reason becomes the group's failure and not the closing.
    """

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        self._name = name
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._listening = 0
        self._failure: BaseException | None = None
        self.ended = threading.Event()
        """Set at the first failure, or by ``end``."""

    def start(self, act: Callable[[], None], *, listens: bool = False) -> None:
        """Run ``act`` in a thread of the group; ``listens``: it receives, and would hear the peer's last word."""
        thread = threading.Thread(target=self._guarded, args=(act, listens), name=self._name, daemon=True)
        with self._changed:
            self._threads.append(thread)
            self._listening += listens
        thread.start()

    def fail(self, error: BaseException) -> None:
        """End the group for ``error``, unless it ended before."""
        with self._changed:
            if isinstance(error, LinkLost):
                self._changed.wait_for(lambda: self.ended.is_set() or not self._listening, _LAST_WORD_S)
            if self.ended.is_set():
                return
            self._failure = error
            self.ended.set()
            self._changed.notify_all()
        self._on_failure(error)

    def end(self) -> None:
        """End the group without a failure: what its threads still raise is the echo of that."""
        with self._changed:
            self.ended.set()
            self._changed.notify_all()

    def wait(self) -> None:
        """Return when every thread has returned; the caller's own thread is not waited for."""
        while True:
            with self._changed:
                alive = [thread for thread in self._threads if thread.is_alive() and thread is not threading.current_thread()]
            if not alive:
                return
            alive[0].join()

    @property
    def failure(self) -> BaseException | None:
        """The first failure, if there was one."""
        return self._failure

    def _guarded(self, act: Callable[[], None], listens: bool) -> None:
        failure: BaseException | None = None
        try:
            act()
        except BaseException as error:
            failure = error
        with self._changed:
            self._listening -= listens
            self._changed.notify_all()
        if failure is not None:
            self.fail(failure)
