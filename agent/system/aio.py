"""Many reads or writes of one descriptor at once, by the kernel's own asynchronous I/O.

io_setup(2), io_submit(2), io_getevents(2) and io_destroy(2) are called directly, so there is nothing to compile or install. Only O_DIRECT
makes them truly asynchronous; others work and take turns. Sources: include/uapi/linux/aio_abi.h, and the tables of system calls of the two
machines below.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long
_CALLS: Final = {"x86_64": (206, 209, 208, 207), "aarch64": (0, 2, 4, 1)}
"""Numbers of io_setup, io_submit, io_getevents and io_destroy."""
_PREAD: Final = 0
_PWRITE: Final = 1
_IOCB: Final = np.dtype(
    [
        ("data", "<u8"), ("key", "<u4"), ("rw_flags", "<i4"), ("opcode", "<u2"), ("priority", "<i2"), ("fd", "<u4"),
        ("buffer", "<u8"), ("length", "<u8"), ("offset", "<i8"), ("reserved", "<u8"), ("flags", "<u4"), ("eventfd", "<u4"),
    ]
)  # fmt: skip
_EVENT: Final = np.dtype([("data", "<u8"), ("object", "<u8"), ("result", "<i8"), ("result2", "<i8")])

I64 = NDArray[np.int64]
U64 = NDArray[np.uint64]


class Queue:
    """A queue of at most ``depth`` reads or writes in flight, for one thread at a time."""

    def __init__(self, depth: int) -> None:
        """OSError where the kernel has or allows no such queue (ENOSYS, EPERM, EACCES), or no more of them (EAGAIN, aio-max-nr)."""
        numbers = _CALLS.get(platform.machine())
        if numbers is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        setup, self._submit, self._events, self._destroy = numbers
        self.depth = depth
        context = ctypes.c_ulong(0)
        _call(setup, depth, ctypes.addressof(context))
        self._context = context.value
        self._room = np.zeros(depth, dtype=_EVENT)

    def read(self, fd: int, address: U64, offset: I64, length: I64) -> I64:
        """Read ``length`` bytes at ``offset`` to the memory at ``address``, for every row; return what each read gave: bytes, or -errno.

        The memory must be the caller's until this returns. It returns, or raises, only when nothing is in flight any more.
        """
        return self._run(_PREAD, fd, address, offset, length)

    def write(self, fd: int, address: U64, offset: I64, length: I64) -> I64:
        """Write in the same way. Rows are written in any order, so none may overlap another."""
        return self._run(_PWRITE, fd, address, offset, length)

    def close(self) -> None:
        """Give the queue back; it is empty."""
        _call(self._destroy, self._context)

    def _run(self, opcode: int, fd: int, address: U64, offset: I64, length: I64) -> I64:
        total = len(offset)
        blocks = np.zeros(total, dtype=_IOCB)
        blocks["data"], blocks["opcode"], blocks["fd"] = np.arange(total), opcode, fd
        blocks["buffer"], blocks["length"], blocks["offset"] = address, length, offset
        pointers = np.uint64(blocks.ctypes.data) + np.arange(total, dtype=np.uint64) * np.uint64(_IOCB.itemsize)
        results = np.full(total, -errno.ECANCELED, dtype=np.int64)
        submitted = ended = 0
        try:
            while ended < total:
                room = min(self.depth - (submitted - ended), total - submitted)
                if room:
                    submitted += _call(self._submit, self._context, room, int(pointers.ctypes.data) + 8 * submitted)
                # A few at a time: a call for every single one would cost more than the I/O.
                ended += self._take(min(submitted - ended, max(1, self.depth // 4)), results)
        finally:
            while ended < submitted:  # after a failed submission, or Ctrl-C: the kernel still uses this memory
                ended += self._take(submitted - ended, results)
        return results

    def _take(self, least: int, results: I64) -> int:
        """Wait for ``least`` of them to end and return how many did."""
        while True:
            try:
                got = _call(self._events, self._context, least, self.depth, int(self._room.ctypes.data), 0)
            except InterruptedError:
                continue
            events: NDArray[Any] = self._room[:got]
            results[events["data"].astype(np.int64)] = events["result"]
            return got


def _call(number: int, *arguments: int) -> int:
    """Return what a system call returns; other threads run meanwhile."""
    result = int(_LIBC.syscall(ctypes.c_long(number), *(ctypes.c_ulong(argument) for argument in arguments)))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
