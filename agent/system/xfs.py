"""What a mounted XFS tells: its inode chunks, and who owns which blocks.

Sources: xfs/xfs_fs.h of xfsprogs (XFS_IOC_INUMBERS, ioctl_xfs_inumbers(2)); linux/fsmap.h (FS_IOC_GETFSMAP, ioctl_getfsmap(2)).
Addresses are blocks of 4096 bytes, counted from the start of
the device. OSError where the kernel refuses; nothing is changed by any of them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.identity import BLOCK_BYTES

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]

_INUMBERS: Final = 0x80405880  # _IOR('X', 128, struct xfs_inumbers_req)
_GETFSMAP: Final = 0xC0C0583B  # _IOWR('X', 59, struct fsmap_head)

_BULK_IREQ: Final = np.dtype(
    [("ino", "<u8"), ("flags", "<u4"), ("icount", "<u4"), ("ocount", "<u4"), ("agno", "<u4"), ("reserved", "<u8", 5)]
)
_INUMBERS_RECORD: Final = np.dtype(
    [("startino", "<u8"), ("allocmask", "<u8"), ("alloccount", "u1"), ("version", "u1"), ("padding", "u1", 6)]
)
_FSMAP: Final = np.dtype(
    [
        ("device", "<u4"),
        ("flags", "<u4"),
        ("physical", "<u8"),
        ("owner", "<u8"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("reserved", "<u8", 3),
    ]
)
_FSMAP_HEAD: Final = np.dtype(
    [
        ("iflags", "<u4"),
        ("oflags", "<u4"),
        ("count", "<u4"),
        ("entries", "<u4"),
        ("reserved", "<u8", 6),
        ("low", _FSMAP),
        ("high", _FSMAP),
    ]
)
MAP_ATTR_FORK: Final = 0x2
MAP_EXTENT_MAP: Final = 0x4
MAP_SPECIAL_OWNER: Final = 0x10
_MAP_LAST: Final = 0x20
OWNER_FREE: Final = 1
OWNER_UNKNOWN: Final = 2
OWNER_LOG: Final = ord("X") << 32 | 2


@dataclass(frozen=True, slots=True, eq=False)
class InodeChunks:
    """Chunks of 64 inode numbers in ascending order; bit ``i`` of ``allocated`` says that inode ``first + i`` is in use.

    Inodes that a sparse chunk does not have are not in use.
    """

    first: U64
    allocated: U64


@dataclass(frozen=True, slots=True, eq=False)
class SpaceMap:
    """Records of who owns which blocks, in order of address; shared blocks stand in several.

    ``owner`` is an inode number, or an OWNER_* code where ``flags`` has MAP_SPECIAL_OWNER.
    """

    first: U64
    blocks: U64
    owner: U64
    flags: U32


def inode_chunks(mount_fd: int) -> InodeChunks:
    """Return all inode chunks of the filesystem that ``mount_fd`` is on."""
    rows = 16384
    buffer = np.zeros(_BULK_IREQ.itemsize + rows * _INUMBERS_RECORD.itemsize, np.uint8)
    head = buffer[: _BULK_IREQ.itemsize].view(_BULK_IREQ)
    records = buffer[_BULK_IREQ.itemsize :].view(_INUMBERS_RECORD)
    head["icount"] = rows
    first: list[U64] = []
    allocated: list[U64] = []
    while True:
        fcntl.ioctl(mount_fd, _INUMBERS, buffer.data)  # the kernel moves head["ino"] on
        found = int(head["ocount"][0])
        if not found:
            return InodeChunks(_joined(first, np.uint64), _joined(allocated, np.uint64))
        first.append(records["startino"][:found].astype(np.uint64))
        allocated.append(records["allocmask"][:found].astype(np.uint64))


def space_map(mount_fd: int, ranges: Iterable[tuple[int, int]]) -> SpaceMap:
    """Return the records that touch the block ranges (first, end); ranges ascend and are disjoint.

    Without reverse mapping, or without CAP_SYS_ADMIN, only free space is told apart: all else has OWNER_UNKNOWN. A record that
    touches two ranges stands twice.
    """
    found = [records for first, end in ranges for records in _range_records(mount_fd, first, end)]
    joined = np.concatenate(found) if found else np.zeros(0, _FSMAP)
    return SpaceMap(
        joined["physical"] // np.uint64(BLOCK_BYTES),
        joined["length"] // np.uint64(BLOCK_BYTES),
        joined["owner"].astype(np.uint64),
        joined["flags"].astype(np.uint32),
    )


def _range_records(mount_fd: int, first: int, end: int) -> Iterator[NDArray[np.void]]:
    rows = 16 if end - first < 64 else 4096
    buffer = np.zeros(_FSMAP_HEAD.itemsize + rows * _FSMAP.itemsize, np.uint8)
    head = buffer[: _FSMAP_HEAD.itemsize].view(_FSMAP_HEAD)
    records = buffer[_FSMAP_HEAD.itemsize :].view(_FSMAP)
    # The keys compare whole records: the device must be named, and the high key be the last of its address.
    device = _encoded_device(mount_fd)
    head["count"] = rows
    head["low"]["device"], head["low"]["physical"] = device, first * BLOCK_BYTES
    high = head["high"]
    high["device"], high["flags"], high["physical"] = device, 2**32 - 1, end * BLOCK_BYTES - 1
    high["owner"], high["offset"] = 2**64 - 1, 2**64 - 1
    while True:
        fcntl.ioctl(mount_fd, _GETFSMAP, buffer.data)
        found = int(head["entries"][0])
        if not found:
            return
        yield records[:found].copy()
        if records["flags"][found - 1] & _MAP_LAST:
            return
        head["low"] = records[found - 1]


def _encoded_device(mount_fd: int) -> int:
    """Return the device number in the kernel's 32-bit form (new_encode_dev in linux/kdev_t.h)."""
    device = os.fstat(mount_fd).st_dev
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def _joined(parts: list[U64], kind: type[np.uint64]) -> U64:
    return np.concatenate(parts) if parts else np.zeros(0, kind)
