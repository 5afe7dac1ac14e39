"""Queues of asynchronous reads, one for every thread that reads at the moment; none where the kernel has or allows none."""

from __future__ import annotations

import errno
import logging
import threading
from typing import Final

from agent.system import aio

DEPTH: Final = 32
"""Reads of one thread in flight: what keeps a disk of today busy."""

log = logging.getLogger("landfall.agent")


class Queues:
    """The queues of one device, made when wanted and used again. After a refusal there are none, and that is said once."""

    def __init__(self, depth: int = DEPTH) -> None:
        self._depth = depth
        self._lock = threading.Lock()
        self._free: list[aio.Queue] = []
        self._refused = False

    def take(self) -> aio.Queue | None:
        """Return a queue of the caller's own until it gives it back; None where reads are to be made by threads."""
        with self._lock:
            if self._refused:
                return None
            if self._free:
                return self._free.pop()
            try:
                return aio.Queue(self._depth)
            except OSError as error:
                self._refused = True
                log.warning("no asynchronous reads here (%s); threads read instead", errno.errorcode.get(error.errno or 0, error.errno))
                return None

    def give(self, queue: aio.Queue) -> None:
        """Take back a queue in which nothing is in flight."""
        with self._lock:
            self._free.append(queue)

    def close(self) -> None:
        """Give the queues that nobody has back to the kernel, by a thread that nobody waits for: io_destroy(2) takes tens of milliseconds.

        Nothing is in flight in them, and a process that ends gives them back as well.
        """
        with self._lock:
            free, self._free = self._free, []
        if free:
            threading.Thread(target=_close, args=(free,), name="queues", daemon=True).start()


def _close(free: list[aio.Queue]) -> None:
    for queue in free:
        queue.close()
