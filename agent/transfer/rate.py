"""The limit on bytes a second, shared by all streams of a transfer."""

from __future__ import annotations

import threading

from agent.system.clock import monotonic_s


class RateLimit:
    """A token bucket that holds at most a quarter of a second's bytes; 0 bytes a second is no limit."""

    def __init__(self, bytes_s: int, cancelled: threading.Event) -> None:
        self._bytes_s = bytes_s
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._tokens = bytes_s / 4
        self._at = monotonic_s()

    def spend(self, length_bytes: int) -> None:
        """Wait until ``length_bytes`` may be sent; returns at once when the transfer is cancelled."""
        if not self._bytes_s:
            return
        with self._lock:
            now = monotonic_s()
            self._tokens = min(self._bytes_s / 4, self._tokens + (now - self._at) * self._bytes_s) - length_bytes
            self._at = now
            wait_s = -self._tokens / self._bytes_s
        if wait_s > 0:
            self._cancelled.wait(wait_s)
