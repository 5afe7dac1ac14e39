"""Memory that O_DIRECT accepts: page aligned, and a pool that bounds how much of it there is."""

from __future__ import annotations

import mmap
import queue
from collections.abc import Iterator
from contextlib import contextmanager


def aligned(length_bytes: int) -> memoryview:
    """Return ``length_bytes`` writable zeros on a page boundary; they are given back with their last view."""
    return memoryview(mmap.mmap(-1, max(length_bytes, 1)))[:length_bytes]


class BufferPool:
    """``count`` buffers of ``buffer_bytes`` each, made when first wanted; who asks for one more waits until one is given back."""

    def __init__(self, count: int, buffer_bytes: int) -> None:
        self.buffer_bytes = buffer_bytes
        self._free: queue.LifoQueue[memoryview | None] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(None)

    def take(self, timeout_s: float | None = None) -> memoryview:
        """Return a buffer; its content is what its last user left. queue.Empty after ``timeout_s``."""
        return self._free.get(timeout=timeout_s) or aligned(self.buffer_bytes)

    def give(self, buffer: memoryview) -> None:
        """Take ``buffer`` back; the caller no longer looks at it."""
        self._free.put(buffer)

    @contextmanager
    def lent(self) -> Iterator[memoryview]:
        """Lend a buffer for as long as the context lasts."""
        buffer = self.take()
        try:
            yield buffer
        finally:
            self.give(buffer)
