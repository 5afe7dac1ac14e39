"""One open block device (or image file): whole blocks in and out past the page cache.

The size of a volume need not be a multiple of a block: the missing bytes of the last block read as zeros, and are cut off when it is
written. Every failure names path, offset, length and errno.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from agent.blockio.buffers import aligned
from agent.blockio.queues import Queues
from agent.contract.errors import DeviceBusy, DeviceFailed
from agent.contract.identity import BLOCK_BYTES
from agent.system.blockdev import logical_sector_bytes, punch, read_only

MAX_VECTOR: Final = 1024
"""Buffers in one preadv (IOV_MAX)."""

_ZEROS_BYTES: Final = 1 << 20


class Device:
    """An open device. Any number of threads may read and write it at once; ``sync`` covers what was written before it was called."""

    def __init__(self, path: Path, fd: int, *, writable: bool) -> None:
        self.path = path
        self.writable = writable
        self._fd = fd
        self._lost: DeviceFailed | None = None
        self._queues = Queues()
        try:
            self.size_bytes = os.lseek(fd, 0, os.SEEK_END)
            self.sector_bytes = logical_sector_bytes(fd)
            if writable and read_only(fd):
                raise DeviceFailed(f"{path} cannot be written: it is read-only", fix="Name the writable device.")
        except OSError as error:
            self._fail(error, "looking at", 0, 0)
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        if is_device and not self.size_bytes:
            raise DeviceFailed(f"nothing is attached to {path}")
        if is_device and self.size_bytes % self.sector_bytes:
            raise DeviceFailed(
                f"{path} ends inside a sector: {self.size_bytes} bytes, sectors of {self.sector_bytes}",
                fix="Make the device's size a multiple of its sector.",
            )

    @classmethod
    def open_reading(cls, path: Path) -> Device:
        """Return ``path`` open for reading, O_DIRECT. DeviceFailed."""
        return cls._open(path, os.O_RDONLY, writable=False)

    @classmethod
    def open_writing(cls, path: Path) -> Device:
        """Return ``path`` open for reading and writing, O_DIRECT; a block device exclusively.

        DeviceBusy if it is mounted or open exclusively elsewhere; DeviceFailed if it is read-only or not there (it is never created).
        """
        exclusive = os.O_EXCL if path.is_block_device() else 0
        return cls._open(path, os.O_RDWR | exclusive, writable=True)

    @classmethod
    def _open(cls, path: Path, flags: int, *, writable: bool) -> Device:
        try:
            fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            cause = f"open {path}: {errno.errorcode.get(error.errno or 0, '?')} {error.strerror}"
            if error.errno == errno.EBUSY:
                raise DeviceBusy(f"{path} is mounted or in use", cause=cause) from error
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and writable:
                raise DeviceFailed(f"{path} cannot be written: it is read-only", cause=cause) from error
            raise DeviceFailed(f"{path} cannot be opened", cause=cause) from error
        try:
            return cls(path, fd, writable=writable)
        except BaseException:
            os.close(fd)
            raise

    @property
    def size_blocks(self) -> int:
        """Blocks of the device, the last one possibly partial."""
        return -(-self.size_bytes // BLOCK_BYTES)

    def read(self, first_block: int, blocks: int) -> memoryview:
        """Return ``blocks`` blocks from ``first_block`` in a fresh aligned buffer."""
        buffer = aligned(blocks * BLOCK_BYTES)
        self.read_into(first_block, [buffer])
        return buffer

    def read_into(self, first_block: int, buffers: Sequence[memoryview]) -> None:
        """Fill aligned ``buffers`` (whole blocks each) one after another with the blocks from ``first_block``.

        At most MAX_VECTOR of them. DeviceFailed for an error, or for blocks past the end: nothing is filled in for what cannot be read.
        """
        self._trusted()
        length = sum(map(len, buffers))
        offset = first_block * BLOCK_BYTES
        self._inside(first_block, length)
        there = min(length, self.size_bytes - offset)
        done = self._read_once(offset, buffers)
        while done < there:
            if done == 0 or done % self.sector_bytes:
                self._fail(OSError(errno.EIO, f"only {done} of {there} bytes came"), "reading", offset, length)
            more = self._read_once(offset + done, _rest(buffers, done))
            if more == 0:
                self._fail(OSError(errno.EIO, f"only {done} of {there} bytes came"), "reading", offset, length)
            done += more
        if there < length:
            last = buffers[-1]
            last[len(last) - (length - there) :] = bytes(length - there)

    def read_scattered(self, first: NDArray[np.int64], blocks: NDArray[np.int64], buffer: memoryview) -> bool:
        """Fill an aligned buffer with runs of blocks, one after another in the order given, many of them at once by asynchronous reads.

        False (nothing done) where the kernel refuses those. DeviceFailed as ``read_into``, for the first run that cannot be read.
        """
        self._trusted()
        for row in np.flatnonzero((first < 0) | (blocks < 0) | (first > self.size_blocks - blocks)).tolist():
            self._inside(int(first[row]), int(blocks[row]) * BLOCK_BYTES)
        queue = self._queues.take()
        if queue is None:
            return False
        try:
            ends = np.cumsum(blocks)
            # Runs that follow each other on the device are one read: they do so in the buffer anyway.
            heads = np.flatnonzero(np.append(True, first[1:] != first[:-1] + blocks[:-1]))
            place = (ends - blocks)[heads]
            count = np.diff(np.append(place, ends[-1]))
            start = first[heads]
            memory = np.uint64(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
            results = queue.read(self._fd, memory + (place * BLOCK_BYTES).astype(np.uint64), start * BLOCK_BYTES, count * BLOCK_BYTES)
        finally:
            self._queues.give(queue)
        for row in np.flatnonzero(results != count * BLOCK_BYTES).tolist():
            # An error, or the end of the device: the plain way knows what to make of it.
            at = int(place[row]) * BLOCK_BYTES
            self.read_into(int(start[row]), [buffer[at : at + int(count[row]) * BLOCK_BYTES]])
        return True

    def write(self, first_block: int, data: memoryview | bytes | bytearray) -> None:
        """Write whole blocks of ``data`` from ``first_block``; durable after the next ``sync``.

        Data that is not aligned is copied to where it is. Bytes past the end of the device must be zeros.
        """
        self._trusted()
        view = memoryview(data).cast("B")
        self._inside(first_block, len(view))
        offset = first_block * BLOCK_BYTES
        there = min(len(view), self.size_bytes - offset)
        if there < len(view):
            if any(view[there:]):
                raise DeviceFailed(f"there is data past the end of {self.path}", cause=f"block {first_block}, {len(view)} bytes")
            view = view[:there]
        done = 0
        while done < there:
            try:
                done += self._write_once(offset + done, view[done:])
            except OSError as error:
                self._fail(error, "writing", offset + done, there - done)

    def write_scattered(self, first: NDArray[np.int64], place: NDArray[np.int64], blocks: NDArray[np.int64], data: memoryview) -> None:
        """Write runs that do not overlap: ``blocks`` blocks of ``data``, from its block ``place`` on, go to block ``first``, for every row.

        Many at once where the kernel allows that and ``data`` is aligned. Durable after the next ``sync``. DeviceFailed as ``write``; any
        of the runs may have been written then.
        """
        self._trusted()
        left = np.arange(len(first))
        whole = (first >= 0) & (first <= self.size_bytes // BLOCK_BYTES - blocks)  # a write past the end would make an image longer
        queue = self._queues.take() if len(first) > 1 and bool(np.all(whole)) else None
        if queue is not None:
            try:
                address = np.uint64(np.frombuffer(data, dtype=np.uint8).ctypes.data) + (place * BLOCK_BYTES).astype(np.uint64)
                results = queue.write(self._fd, address, first * BLOCK_BYTES, blocks * BLOCK_BYTES)
            finally:
                self._queues.give(queue)
            left = np.flatnonzero(results != blocks * BLOCK_BYTES)  # the plain way knows what to make of an error
        for row in left.tolist():
            self.write(int(first[row]), data[int(place[row]) * BLOCK_BYTES : int(place[row] + blocks[row]) * BLOCK_BYTES])

    def write_zeros(self, first_block: int, blocks: int) -> None:
        """Make ``blocks`` blocks zeros, as a hole where the device can have one."""
        self._trusted()
        self._inside(first_block, blocks * BLOCK_BYTES)
        offset = first_block * BLOCK_BYTES
        length = min(blocks * BLOCK_BYTES, self.size_bytes - offset)
        try:
            if punch(self._fd, offset, length):
                return
        except OSError as error:
            self._fail(error, "zeroing", offset, length)
        zeros = aligned(min(_ZEROS_BYTES, blocks * BLOCK_BYTES))
        per_write = len(zeros) // BLOCK_BYTES
        for at in range(0, blocks, per_write):
            self.write(first_block + at, zeros[: min(per_write, blocks - at) * BLOCK_BYTES])

    def sync(self) -> None:
        """Make everything written before durable. After a failure the device is not trusted again: every later call fails.

        The kernel reports a lost write once and forgets it, so a second fdatasync that succeeds proves nothing.
        """
        self._trusted()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            try:
                self._fail(error, "syncing", 0, self.size_bytes)
            except DeviceFailed as lost:
                self._lost = lost
                raise

    def close(self) -> None:
        """Close the device; durable is only what was synced."""
        if self._fd >= 0:
            self._queues.close()
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _read_once(self, offset: int, buffers: Sequence[memoryview]) -> int:
        try:
            return os.preadv(self._fd, buffers, offset)
        except OSError as error:
            self._fail(error, "reading", offset, sum(map(len, buffers)))

    def _write_once(self, offset: int, view: memoryview) -> int:
        """Write aligned memory as it is; memory at another address is refused by O_DIRECT with EINVAL and goes through a copy."""
        try:
            return os.pwrite(self._fd, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        buffer = aligned(len(view))
        buffer[:] = view
        return os.pwrite(self._fd, buffer, offset)

    def _inside(self, first_block: int, length: int) -> None:
        if length % BLOCK_BYTES or first_block < 0 or first_block + length // BLOCK_BYTES > self.size_blocks:
            raise DeviceFailed(f"blocks outside {self.path}", cause=f"block {first_block}, {length} bytes of {self.size_bytes}")

    def _trusted(self) -> None:
        if self._lost is not None:
            raise DeviceFailed(f"{self.path} is not trusted any more", cause=str(self._lost.cause)) from self._lost

    def _fail(self, error: OSError, act: str, offset: int, length: int) -> NoReturn:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise DeviceFailed(f"{act} {self.path} failed", cause=f"{name} {error.strerror} at byte {offset}, length {length}") from error


def _rest(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """Return what is left of ``buffers`` after their first ``done`` bytes."""
    rest = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
        else:
            rest.append(buffer[done:])
            done = 0
    return rest
