"""Attributes of an inode behind an open descriptor: chattr flags, project id, extended attributes.

Sources: include/uapi/linux/fs.h (FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR); xattr(7). O_PATH descriptors are reached through /proc/self/fd,
which leads to the inode itself, also for symlinks, FIFOs and devices.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

_GETFLAGS: Final = 0x80086601
_SETFLAGS: Final = 0x40086602
_GETVERSION: Final = 0x80087601
_FSGETXATTR: Final = 0x801C581F
_FSSETXATTR: Final = 0x401C5820
_FSXATTR: Final = struct.Struct("<IIIII8x")  # xflags, extsize, nextents, projid, cowextsize

IMMUTABLE: Final = 0x10
APPEND: Final = 0x20
NOCOW: Final = 0x800000
PROJECT_INHERIT: Final = 0x20000000
SETTABLE_FLAGS: Final = 0x1 | 0x2 | 0x4 | 0x8 | IMMUTABLE | APPEND | 0x40 | 0x80 | 0x10000 | 0x20000 | NOCOW | PROJECT_INHERIT
"""Flags that chattr sets and Landfall promises: secure deletion, undelete, compress, sync, immutable, append, nodump, noatime,
dirsync, topdir, nocow, project inheritance. Inherent ones (extents, inline data, encrypted, verity, index) are left out."""


def generation(fd: int) -> int:
    """Return the generation of a regular file's or directory's inode (FS_IOC_GETVERSION): with its number it is a handle."""
    raw = bytearray(8)
    fcntl.ioctl(fd, _GETVERSION, raw)
    return int(struct.unpack_from("<I", raw)[0])


def flags(fd: int) -> int:
    """Return the promised chattr flags of a regular file or directory."""
    raw = bytearray(8)
    fcntl.ioctl(fd, _GETFLAGS, raw)
    return int(struct.unpack_from("<I", raw)[0]) & SETTABLE_FLAGS


def set_flags(fd: int, wanted: int) -> None:
    """Set the promised chattr flags, leaving the others as they are."""
    raw = bytearray(8)
    fcntl.ioctl(fd, _GETFLAGS, raw)
    now = int(struct.unpack_from("<I", raw)[0])
    value = (now & ~SETTABLE_FLAGS) | (wanted & SETTABLE_FLAGS)
    if value != now:
        fcntl.ioctl(fd, _SETFLAGS, struct.pack("<Q", value))


def project(fd: int) -> int:
    """Return the project id of a regular file or directory."""
    raw = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _FSGETXATTR, raw)
    return int(_FSXATTR.unpack(raw)[3])


def set_project(fd: int, wanted: int) -> None:
    """Set the project id if it is another."""
    raw = bytearray(_FSXATTR.size)
    fcntl.ioctl(fd, _FSGETXATTR, raw)
    values = list(_FSXATTR.unpack(raw))
    if values[3] != wanted:
        values[3] = wanted
        fcntl.ioctl(fd, _FSSETXATTR, _FSXATTR.pack(*values))


def xattrs(fd: int) -> dict[bytes, bytes]:
    """Return all extended attributes, ACLs among them."""
    path = f"/proc/self/fd/{fd}"
    return {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}


def set_xattrs(fd: int, wanted: dict[bytes, bytes]) -> None:
    """Make the extended attributes exactly ``wanted``."""
    path, now = f"/proc/self/fd/{fd}", xattrs(fd)
    for name in now.keys() - wanted.keys():
        try:
            os.removexattr(path, name)
        except OSError as error:
            if error.errno != errno.ENODATA:  # XFS lists an ACL under two names, and both go at once
                raise
    for name, value in wanted.items():
        if now.get(name) != value:
            os.setxattr(path, name, value)
