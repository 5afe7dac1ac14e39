"""What the superblocks of ext4 and XFS say about a filesystem's layout, read from the device itself.

Sources: Documentation/filesystems/ext4/super.rst (little-endian, at byte 1024) and the XFS Algorithms & Data Structures book, "Superblocks"
(big-endian, at byte 0; fs/xfs/libxfs/xfs_format.h, struct xfs_dsb).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract.errors import LayoutUnsupported
from agent.contract.identity import FilesystemKind

_EXT4_MAGIC: Final = 0xEF53
_XFS_MAGIC: Final = b"XFSB"


class Compat(IntFlag):
    """ext4, s_feature_compat; the names are mke2fs's."""

    DIR_PREALLOC = 0x1
    HAS_JOURNAL = 0x4
    EXT_ATTR = 0x8
    RESIZE_INODE = 0x10
    DIR_INDEX = 0x20
    SPARSE_SUPER2 = 0x200
    FAST_COMMIT = 0x400
    STABLE_INODES = 0x800
    ORPHAN_FILE = 0x1000


class Incompat(IntFlag):
    """ext4, s_feature_incompat."""

    FILETYPE = 0x2
    NEEDS_RECOVERY = 0x4
    JOURNAL_DEV = 0x8
    META_BG = 0x10
    EXTENT = 0x40
    BITS64 = 0x80
    MMP = 0x100
    FLEX_BG = 0x200
    EA_INODE = 0x400
    METADATA_CSUM_SEED = 0x2000
    LARGE_DIR = 0x4000
    INLINE_DATA = 0x8000
    ENCRYPT = 0x10000
    CASEFOLD = 0x20000


class RoCompat(IntFlag):
    """ext4, s_feature_ro_compat."""

    SPARSE_SUPER = 0x1
    LARGE_FILE = 0x2
    HUGE_FILE = 0x8
    UNINIT_BG = 0x10
    DIR_NLINK = 0x20
    EXTRA_ISIZE = 0x40
    QUOTA = 0x100
    BIGALLOC = 0x200
    METADATA_CSUM = 0x400
    READ_ONLY = 0x1000
    PROJECT = 0x2000
    SHARED_BLOCKS = 0x4000
    VERITY = 0x8000
    ORPHAN_PRESENT = 0x10000


class Ext4State(IntFlag):
    """ext4, s_state."""

    CLEAN = 0x1
    ERRORS = 0x2
    ORPHANS = 0x4


class XfsIncompat(IntFlag):
    """XFS, sb_features_incompat."""

    FTYPE = 0x1
    SPARSE_INODES = 0x2
    META_UUID = 0x4
    BIGTIME = 0x8
    NEEDS_REPAIR = 0x10
    NREXT64 = 0x20
    EXCHANGE_RANGE = 0x40
    PARENT = 0x80


class XfsRoCompat(IntFlag):
    """XFS, sb_features_ro_compat."""

    FINOBT = 0x1
    RMAPBT = 0x2
    REFLINK = 0x4
    INOBTCOUNT = 0x8


@dataclass(frozen=True, slots=True)
class Ext4Superblock:
    """An ext4 filesystem's layout. ``unknown`` are feature bits that this release has no name for."""

    uuid: UUID
    label: str
    block_bytes: int
    inode_bytes: int
    inodes: int
    blocks: int
    reserved_blocks: int
    flex_groups: int
    journal_bytes: int
    external_journal: bool
    state: Ext4State
    compat: Compat
    incompat: Incompat
    ro_compat: RoCompat
    unknown: int


@dataclass(frozen=True, slots=True)
class XfsSuperblock:
    """An XFS filesystem's layout; ``stripe_unit`` and ``stripe_width`` in blocks, ``log_stripe_bytes`` 0 or 1: none."""

    uuid: UUID
    label: str
    version: int
    block_bytes: int
    sector_bytes: int
    log_sector_bytes: int
    inode_bytes: int
    allocation_groups: int
    group_blocks: int
    blocks: int
    log_start: int
    log_blocks: int
    log_stripe_bytes: int
    directory_block_bytes: int
    inode_percent: int
    stripe_unit: int
    stripe_width: int
    realtime_blocks: int
    ascii_case_folding: bool
    incompat: XfsIncompat
    ro_compat: XfsRoCompat
    unknown: int


def read_ext4(device: Path) -> Ext4Superblock:
    """Return the layout of the ext4 on ``device``; LayoutUnsupported if there is none."""
    raw = _read(device, 1024, 1024)

    def u16(at: int) -> int:
        return int(struct.unpack_from("<H", raw, at)[0])

    def u32(at: int) -> int:
        return int(struct.unpack_from("<I", raw, at)[0])

    if u16(56) != _EXT4_MAGIC:
        raise LayoutUnsupported(f"{device} holds no ext4")
    wide = bool(u32(96) & Incompat.BITS64)
    known = (sum(Compat), sum(Incompat), sum(RoCompat))
    features = (u32(92), u32(96), u32(100))
    return Ext4Superblock(
        uuid=UUID(bytes=raw[104:120]),
        label=raw[120:136].split(b"\0")[0].decode("utf-8", "surrogateescape"),
        block_bytes=1024 << u32(24),
        inode_bytes=u16(88),
        inodes=u32(0),
        blocks=u32(4) | (u32(0x150) << 32 if wide else 0),
        reserved_blocks=u32(8) | (u32(0x154) << 32 if wide else 0),
        flex_groups=1 << raw[0x174],
        # The journal inode's size, from the copy that mke2fs keeps in s_jnl_blocks when s_jnl_backup_type is 1.
        journal_bytes=u32(268 + 64) | u32(268 + 60) << 32 if raw[253] == 1 else 0,
        external_journal=u32(228) != 0 or bool(features[1] & Incompat.JOURNAL_DEV),
        state=Ext4State(u16(58) & sum(Ext4State)),
        compat=Compat(features[0] & known[0]),
        incompat=Incompat(features[1] & known[1]),
        ro_compat=RoCompat(features[2] & known[2]),
        unknown=sum(there & ~named for there, named in zip(features, known, strict=True)),
    )


def read_xfs(device: Path) -> XfsSuperblock:
    """Return the layout of the XFS on ``device``; LayoutUnsupported if there is none."""
    raw = _read(device, 0, 512)
    if raw[:4] != _XFS_MAGIC:
        raise LayoutUnsupported(f"{device} holds no XFS")

    def be(at: int, width: int) -> int:
        return int.from_bytes(raw[at : at + width], "big")

    version = be(100, 2)
    features = (be(212, 4), be(216, 4)) if version & 0xF == 5 else (0, 0)
    known = (sum(XfsRoCompat), sum(XfsIncompat))
    return XfsSuperblock(
        uuid=UUID(bytes=raw[32:48]),
        label=raw[108:120].split(b"\0")[0].decode("utf-8", "surrogateescape"),
        version=version & 0xF,
        block_bytes=be(4, 4),
        sector_bytes=be(102, 2),
        log_sector_bytes=be(194, 2),
        inode_bytes=be(104, 2),
        allocation_groups=be(88, 4),
        group_blocks=be(84, 4),
        blocks=be(8, 8),
        log_start=be(48, 8),
        log_blocks=be(96, 4),
        log_stripe_bytes=be(196, 4),
        directory_block_bytes=be(4, 4) << raw[192],
        inode_percent=raw[127],
        stripe_unit=be(184, 4),
        stripe_width=be(188, 4),
        realtime_blocks=be(16, 8),
        ascii_case_folding=bool(version & 0x4000),
        incompat=XfsIncompat(features[1] & known[1]),
        ro_compat=XfsRoCompat(features[0] & known[0]),
        unknown=sum(there & ~named for there, named in zip(features, known, strict=True)),
    )


def kind_of(device: Path) -> FilesystemKind | None:
    """Return which of the two filesystems ``device`` holds, None for neither."""
    raw = _read(device, 0, 4096)
    if raw[:4] == _XFS_MAGIC:
        return FilesystemKind.XFS
    return FilesystemKind.EXT4 if raw[1024 + 56 :][:2] == _EXT4_MAGIC.to_bytes(2, "little") else None


def _read(device: Path, offset: int, length: int) -> bytes:
    device_fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = os.pread(device_fd, length, offset)
    finally:
        os.close(device_fd)
    if len(raw) < length:
        raise LayoutUnsupported(f"{device} is too small for a filesystem")
    return raw
