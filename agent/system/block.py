"""The ioctls of block devices, images and mounted filesystems, each with its source.

Numbers and structures are those of include/uapi/linux/{loop.h,fs.h,fiemap.h,btrfs_tree.h} on 64-bit little-endian Linux. Every function
takes a descriptor and raises OSError as the kernel says it; what an operator can do about it is said by the callers.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]

_LIBC: Final = ctypes.CDLL(None, use_errno=True)

_LOOP_CLR_FD: Final = 0x4C01
_LOOP_GET_STATUS64: Final = 0x4C05
_LOOP_SET_CAPACITY: Final = 0x4C07
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_CTL_ADD: Final = 0x4C80
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_INFO64: Final = struct.Struct("<QQQQQIIII64s64s32sQQ")
_LOOP_CONFIG_HEAD: Final = struct.Struct("<II")
_LOOP_CONFIG_BYTES: Final = _LOOP_CONFIG_HEAD.size + _LOOP_INFO64.size + 64

_BLKROSET: Final = 0x125D
_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKGETSIZE64: Final = 0x80081272

_FICLONE: Final = 0x40049409
_FICLONERANGE: Final = 0x4020940D
_FIFREEZE: Final = 0xC0045877
_FITHAW: Final = 0xC0045878
_XFS_IOC_GOINGDOWN: Final = 0x8004587D

_FS_IOC_FIEMAP: Final = 0xC020660B
_FIEMAP_FLAG_SYNC: Final = 1
_FIEMAP_HEAD: Final = struct.Struct("<QQIIII")
_FIEMAP_EXTENT: Final = np.dtype(
    [("logical", "<u8"), ("physical", "<u8"), ("length", "<u8"), ("_a", "<u8", 2), ("flags", "<u4"), ("_b", "<u4", 3)]
)
_EXTENTS_A_PAGE: Final = 16384

_BTRFS_IOC_TREE_SEARCH_V2: Final = 0xC0709411
_BTRFS_SEARCH_KEY: Final = struct.Struct("<QQQQQQQIIII4Q")
_BTRFS_SEARCH_HEADER: Final = struct.Struct("<QQQII")
_BTRFS_CHUNK: Final = struct.Struct("<QQQQIIIHH")
_BTRFS_STRIPE: Final = struct.Struct("<QQ16s")
_BTRFS_CHUNK_TREE: Final = 3
_BTRFS_FIRST_CHUNK: Final = 256
_BTRFS_CHUNK_ITEM: Final = 228


class LoopFlag(IntFlag):
    """lo_flags of linux/loop.h."""

    READ_ONLY = 1
    AUTOCLEAR = 4
    PARTSCAN = 8
    DIRECT_IO = 16


class ExtentFlag(IntFlag):
    """fe_flags of linux/fiemap.h."""

    LAST = 0x0001
    UNKNOWN = 0x0002
    DELALLOC = 0x0004
    ENCODED = 0x0008
    DATA_ENCRYPTED = 0x0080
    NOT_ALIGNED = 0x0100
    DATA_INLINE = 0x0200
    DATA_TAIL = 0x0400
    UNWRITTEN = 0x0800
    MERGED = 0x1000
    SHARED = 0x2000


@dataclass(frozen=True, slots=True)
class LoopStatus:
    """What a bound loop device is made of: the backing file's st_dev and st_ino, and its flags."""

    backing_device: int
    backing_inode: int
    flags: LoopFlag


@dataclass(frozen=True, slots=True, eq=False)
class ExtentMap:
    """A file's extents in logical order, in bytes; flags are ``ExtentFlag``."""

    logical: U64
    physical: U64
    length: U64
    flags: U32


@dataclass(frozen=True, slots=True)
class BtrfsChunk:
    """A chunk of btrfs's address space: ``length`` bytes at ``logical`` are at each (device id, offset) of ``stripes``."""

    logical: int
    length: int
    type: int
    stripes: tuple[tuple[int, int], ...]


def free_loop_number(control_fd: int) -> int:
    """Return the number of a loop device nobody has bound, made if need be; another process may bind it first (loop(4))."""
    return fcntl.ioctl(control_fd, _LOOP_CTL_GET_FREE)


def add_loop(control_fd: int, number: int) -> None:
    """Make a loop device of this number (LOOP_CTL_ADD, loop(4)); EEXIST if there is one."""
    fcntl.ioctl(control_fd, _LOOP_CTL_ADD, number)


def configure_loop(loop_fd: int, image_fd: int, flags: LoopFlag, sector_bytes: int) -> None:
    """Bind an image to a loop device in one step (LOOP_CONFIGURE, loop(4)); EBUSY if somebody bound it first."""
    info = _LOOP_INFO64.pack(0, 0, 0, 0, 0, 0, 0, 0, int(flags), b"", b"", b"", 0, 0)
    fcntl.ioctl(loop_fd, _LOOP_CONFIGURE, _LOOP_CONFIG_HEAD.pack(image_fd, sector_bytes) + info + bytes(64))


def loop_status(loop_fd: int) -> LoopStatus:
    """Return what a loop device is bound to (LOOP_GET_STATUS64); OSError ENXIO if it is not bound."""
    raw = bytearray(_LOOP_INFO64.size)
    fcntl.ioctl(loop_fd, _LOOP_GET_STATUS64, raw)
    device, inode, _, _, _, _, _, _, flags, *_ = _LOOP_INFO64.unpack(raw)
    return LoopStatus(device, inode, LoopFlag(flags))


def follow_loop(loop_fd: int) -> None:
    """Let a bound loop device have the size that its image has now, whoever uses it (LOOP_SET_CAPACITY, loop(4))."""
    fcntl.ioctl(loop_fd, _LOOP_SET_CAPACITY)


def clear_loop(loop_fd: int) -> None:
    """Unbind a loop device, at once or, if others have it open, with its last user (LOOP_CLR_FD)."""
    fcntl.ioctl(loop_fd, _LOOP_CLR_FD)


def size_bytes(device_fd: int) -> int:
    """Return the size of a block device (BLKGETSIZE64)."""
    raw = bytearray(8)
    fcntl.ioctl(device_fd, _BLKGETSIZE64, raw)
    return int.from_bytes(raw, "little")


def sector_bytes(device_fd: int) -> int:
    """Return the logical sector size of a block device (BLKSSZGET)."""
    raw = bytearray(4)
    fcntl.ioctl(device_fd, _BLKSSZGET, raw)
    return int.from_bytes(raw, "little")


def set_read_only(device_fd: int, read_only: bool) -> None:
    """Set or lift a block device's own write protection (BLKROSET). It outlives the binding of a loop device."""
    fcntl.ioctl(device_fd, _BLKROSET, struct.pack("<i", read_only))


def is_read_only(device_fd: int) -> bool:
    """Whether the kernel refuses writes to a block device (BLKROGET)."""
    raw = bytearray(4)
    fcntl.ioctl(device_fd, _BLKROGET, raw)
    return int.from_bytes(raw, "little") != 0


def clone(source_fd: int, destination_fd: int) -> None:
    """Let the destination share all of the source's blocks (ioctl_ficlone(2)). EXDEV, EOPNOTSUPP, EINVAL (btrfs: +C on one only)."""
    fcntl.ioctl(destination_fd, _FICLONE, source_fd)


def clone_range(source_fd: int, offset: int, length: int, destination_fd: int, destination_offset: int) -> None:
    """Let a range of the destination share the source's blocks (ioctl_ficlonerange(2)); length 0 is "to the end"."""
    fcntl.ioctl(destination_fd, _FICLONERANGE, struct.pack("<qQQQ", source_fd, offset, length, destination_offset))


def extent_map(file_fd: int) -> ExtentMap:
    """Return every extent of a file after writing back what is dirty (FS_IOC_FIEMAP, Documentation/filesystems/fiemap.rst).

    Holes have no row. The file must not change meanwhile: the kernel gives the extents a page at a time.
    """
    pages: list[NDArray[np.void]] = []
    buffer = bytearray(_FIEMAP_HEAD.size + _EXTENTS_A_PAGE * _FIEMAP_EXTENT.itemsize)
    start = 0
    while True:
        _FIEMAP_HEAD.pack_into(buffer, 0, start, 2**64 - 1 - start, _FIEMAP_FLAG_SYNC, 0, _EXTENTS_A_PAGE, 0)
        fcntl.ioctl(file_fd, _FS_IOC_FIEMAP, buffer)
        mapped = _FIEMAP_HEAD.unpack_from(buffer)[3]
        page = np.frombuffer(buffer, _FIEMAP_EXTENT, mapped, _FIEMAP_HEAD.size).copy()
        pages.append(page)
        if mapped == 0 or int(page["flags"][-1]) & ExtentFlag.LAST:
            break
        start = int(page["logical"][-1]) + int(page["length"][-1])
    rows = np.concatenate(pages)
    return ExtentMap(*(np.ascontiguousarray(rows[name]) for name in ("logical", "physical", "length", "flags")))


def freeze(mount_fd: int) -> None:
    """Freeze the filesystem a descriptor is on (FIFREEZE, fsfreeze(8)); EBUSY if it is frozen already."""
    fcntl.ioctl(mount_fd, _FIFREEZE, 0)


def thaw(mount_fd: int) -> None:
    """Thaw the filesystem a descriptor is on (FITHAW); EINVAL if it is not frozen."""
    fcntl.ioctl(mount_fd, _FITHAW, 0)


def go_down(mount_fd: int, *, flush_log: bool = False) -> None:
    """Shut an XFS down as a power cut would (XFS_IOC_GOINGDOWN; ext4 takes the same number). Only an unmount ends it."""
    fcntl.ioctl(mount_fd, _XFS_IOC_GOINGDOWN, struct.pack("<I", 1 if flush_log else 2))


def btrfs_chunks(fd: int) -> tuple[BtrfsChunk, ...]:
    """Return the chunks of a mounted btrfs in logical order (BTRFS_IOC_TREE_SEARCH_V2 over the chunk tree).

    FIEMAP's "physical" is an address of this space on btrfs, not of a device; the chunks say where on which device it is.
    """
    chunks: list[BtrfsChunk] = []
    offset, room = 0, 1 << 16
    key_bytes = _BTRFS_SEARCH_KEY.size
    while True:
        key = _BTRFS_SEARCH_KEY.pack(
            _BTRFS_CHUNK_TREE, _BTRFS_FIRST_CHUNK, _BTRFS_FIRST_CHUNK, offset, 2**64 - 1, 0, 2**64 - 1,
            _BTRFS_CHUNK_ITEM, _BTRFS_CHUNK_ITEM, 2**32 - 1, 0, 0, 0, 0, 0,
        )  # fmt: skip
        buffer = bytearray(key + struct.pack("<Q", room) + bytes(room))
        fcntl.ioctl(fd, _BTRFS_IOC_TREE_SEARCH_V2, buffer)
        found = int(_BTRFS_SEARCH_KEY.unpack_from(buffer)[9])
        at = key_bytes + 8
        for _ in range(found):
            _, _, logical, _, length = _BTRFS_SEARCH_HEADER.unpack_from(buffer, at)
            chunks.append(_chunk(logical, memoryview(buffer)[at + _BTRFS_SEARCH_HEADER.size :][:length]))
            at += _BTRFS_SEARCH_HEADER.size + length
            offset = logical + 1
        if found == 0:
            return tuple(chunks)


def _chunk(logical: int, item: memoryview) -> BtrfsChunk:
    length, _, _, kind, _, _, _, stripes, _ = _BTRFS_CHUNK.unpack_from(item)
    places = (_BTRFS_STRIPE.unpack_from(item, _BTRFS_CHUNK.size + n * _BTRFS_STRIPE.size) for n in range(stripes))
    return BtrfsChunk(logical, length, kind, tuple((device, offset) for device, offset, _ in places))


def sync_filesystem(fd: int) -> None:
    """Write back everything dirty of the filesystem a descriptor is on (syncfs(2))."""
    if _LIBC.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
