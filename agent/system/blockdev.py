"""Facts and acts of block devices (and image files) that Python has no call for.

Sources: include/uapi/linux/fs.h (BLKSSZGET, BLKROGET), fallocate(2): punching a hole in a device zeroes the range or fails, never less.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from typing import Final

_BLKSSZGET: Final = 0x1268
_BLKROGET: Final = 0x125E
_PUNCH_HOLE: Final = 0x02
_KEEP_SIZE: Final = 0x01
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_FILE_SECTOR_BYTES: Final = 512


def logical_sector_bytes(fd: int) -> int:
    """Return the smallest unit of I/O of a block device; 512 for a regular file."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return _FILE_SECTOR_BYTES
    raw = bytearray(4)
    fcntl.ioctl(fd, _BLKSSZGET, raw)
    return int(struct.unpack("=i", raw)[0])


def read_only(fd: int) -> bool:
    """Return whether the kernel refuses writes to a block device, which it may let be opened for writing all the same."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return False
    raw = bytearray(4)
    fcntl.ioctl(fd, _BLKROGET, raw)
    return bool(struct.unpack("=i", raw)[0])


def punch(fd: int, offset: int, length: int) -> bool:
    """Make a range read as zeros and give its space back; False (nothing done) where the device or filesystem cannot."""
    call = _LIBC.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(number, os.strerror(number))
