"""One device onto another of the same size, in the order in which the workers come to it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.contract.digest import BlockDigests, block_digests
from agent.contract.errors import DeviceFailed
from agent.contract.identity import BLOCK_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Copied:
    """What was copied and is durable; ``digests`` has one per block if it was asked for."""

    size_bytes: int
    digests: BlockDigests | None


def copy(source: Path, target: Path, *, workers: int = 4, chunk_bytes: int = 4 << 20, digest: bool) -> Copied:
    """Copy all of ``source`` onto ``target`` and sync it. DeviceFailed unless both have one size; DeviceBusy if the target is in use.

    Memory is ``workers`` times ``chunk_bytes``. If we die here the target is a mixture and must be copied again.
    """
    with Device.open_reading(source) as reading, Device.open_writing(target) as writing:
        if reading.size_bytes != writing.size_bytes:
            raise DeviceFailed(
                f"{target} has another size than {source}",
                cause=f"{writing.size_bytes} and {reading.size_bytes} bytes",
                fix="Make the target as large as the source.",
            )
        digests = np.empty(reading.size_blocks, dtype=np.uint64) if digest else None
        chunks = _Chunks(reading.size_blocks, chunk_bytes // BLOCK_BYTES)
        with ThreadPoolExecutor(workers, thread_name_prefix="copy") as executor:
            running = [executor.submit(_copy_chunks, reading, writing, chunks, digests) for _ in range(workers)]
        for worker in running:
            worker.result()
        writing.sync()
        return Copied(reading.size_bytes, digests)


class _Chunks:
    """Deals out what is left to copy; after ``stop`` there is nothing left."""

    def __init__(self, total_blocks: int, chunk_blocks: int) -> None:
        self.chunk_blocks = chunk_blocks
        self._total = total_blocks
        self._next = 0
        self._lock = threading.Lock()

    def take(self) -> tuple[int, int]:
        """Return (first block, blocks) of the next chunk, of no blocks at the end."""
        with self._lock:
            first = self._next
            self._next = min(first + self.chunk_blocks, self._total)
            return first, self._next - first

    def stop(self) -> None:
        with self._lock:
            self._next = self._total


def _copy_chunks(reading: Device, writing: Device, chunks: _Chunks, digests: BlockDigests | None) -> None:
    buffer = aligned(chunks.chunk_blocks * BLOCK_BYTES)
    try:
        while True:
            first, blocks = chunks.take()
            if not blocks:
                return
            view = buffer[: blocks * BLOCK_BYTES]
            reading.read_into(first, [view])
            if digests is not None:
                digests[first : first + blocks] = block_digests(view)
            writing.write(first, view)
    except BaseException:
        chunks.stop()
        raise
