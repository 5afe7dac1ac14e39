"""The fixed parts of an ext4 filesystem on a frozen device: superblock, group descriptors, allocation maps, where metadata lies.

Sources: Documentation/filesystems/ext4 of the kernel (super, group_descr, blockgroup, bitmaps), fs/ext4/ext4.h. Everything is read from
the raw device, which must be frozen and read-only; nothing is cached but the descriptors.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.errors import DeviceFailed, LayoutUnsupported
from agent.contract.identity import BLOCK_BYTES
from agent.differential.intervals import U64, Flags, Runs, intersected, runs_of, runs_of_blocks, spans, united

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

ROOT_INODE: Final = 2
RESIZE_INODE: Final = 7
JOURNAL_INODE: Final = 8

_COMPAT_JOURNAL: Final = 0x4
_COMPAT_SPARSE_SUPER2: Final = 0x200
_COMPAT_ORPHAN_FILE: Final = 0x1000
_INCOMPAT_RECOVER: Final = 0x4
_INCOMPAT_JOURNAL_DEV: Final = 0x8
_INCOMPAT_META_BG: Final = 0x10
_INCOMPAT_64BIT: Final = 0x80
_INCOMPAT_MMP: Final = 0x100
_INCOMPAT_EA_INODE: Final = 0x400
_INCOMPAT_ENCRYPT: Final = 0x10000
_RO_SPARSE_SUPER: Final = 0x1
_RO_GDT_CSUM: Final = 0x10
_RO_BIGALLOC: Final = 0x200
_RO_METADATA_CSUM: Final = 0x400
_INODE_UNINIT: Final = 0x1
_BLOCK_UNINIT: Final = 0x2

_READ_BYTES: Final = 8 << 20  # at most this much in one read
_BITS: Final = BLOCK_BYTES * 8


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where an ext4 filesystem keeps what; columns have a row per block group."""

    device: Path
    blocks: int
    inodes: int
    first_block_of_groups: U64
    inodes_per_group: int
    inode_bytes: int
    system_inodes: frozenset[int]  # inodes that are no files: reserved ones but the root, quota files, the orphan file
    journal: bool  # an internal one, in inode 8
    ea_inodes: bool  # values of xattrs may live in inodes of their own
    block_bitmap: U64
    inode_bitmap: U64
    inode_table: U64
    inode_uninit: Flags
    block_uninit: Flags
    fixed: Runs  # superblock and descriptor copies, bitmaps, inode tables, MMP: metadata for as long as the filesystem lives

    @property
    def groups(self) -> int:
        """Number of block groups."""
        return len(self.inode_table)

    @property
    def table_blocks(self) -> int:
        """Blocks of one group's inode table."""
        return -(-self.inodes_per_group * self.inode_bytes // BLOCK_BYTES)

    def tables(self) -> Runs:
        """Return the inode tables, a row per group."""
        return runs_of(self.inode_table, np.full(self.groups, self.table_blocks))


def read_layout(device: Path) -> Layout:
    """Return the layout of the ext4 filesystem on ``device``; LayoutUnsupported names what Landfall does not replicate."""
    with _opened(device) as descriptor:
        raw = _read(device, descriptor, 1024, 1024)
    (magic,) = struct.unpack_from("<H", raw, 0x38)
    if magic != 0xEF53:
        raise LayoutUnsupported(f"{device} holds no ext4 filesystem")
    inodes, blocks_low = struct.unpack_from("<II", raw, 0)
    first_data_block, log_block = struct.unpack_from("<II", raw, 0x14)
    per_group, _, inodes_per_group = struct.unpack_from("<III", raw, 0x20)
    first_inode, inode_bytes = struct.unpack_from("<IH", raw, 0x54)
    compat, incompat, ro_compat = struct.unpack_from("<III", raw, 0x5C)
    for amiss, what in (
        (log_block != 2, f"blocks of {1024 << log_block} bytes"),
        (incompat & _INCOMPAT_JOURNAL_DEV, "an external journal device"),
        (incompat & _INCOMPAT_RECOVER, "a journal that was not flushed (it was not frozen when this generation was taken)"),
        (incompat & _INCOMPAT_ENCRYPT, "encryption"),
        (ro_compat & _RO_BIGALLOC, "clusters of several blocks (bigalloc)"),
        (struct.unpack_from("<I", raw, 0xE4)[0], "an external journal"),
        (per_group == 0 or per_group > _BITS or inodes_per_group == 0 or inode_bytes < 128, "a superblock out of bounds"),
    ):
        if amiss:
            raise LayoutUnsupported(f"the ext4 filesystem on {device} has {what}")
    has_64bit = bool(incompat & _INCOMPAT_64BIT)
    blocks = blocks_low | (struct.unpack_from("<I", raw, 0x150)[0] << 32 if has_64bit else 0)
    groups = -(-(blocks - first_data_block) // per_group)
    firsts = first_data_block + np.arange(groups, dtype=np.uint64) * np.uint64(per_group)
    has_super = _groups_with_super(groups, compat, ro_compat, struct.unpack_from("<II", raw, 0x24C))
    descriptor_bytes = max(32, struct.unpack_from("<H", raw, 0xFE)[0]) if has_64bit else 32
    first_meta = struct.unpack_from("<I", raw, 0x104)[0] if incompat & _INCOMPAT_META_BG else 1 << 62
    own, copies = _descriptor_blocks(firsts, has_super, BLOCK_BYTES // descriptor_bytes, first_meta)
    table = read_blocks(device, own).reshape(-1)[: groups * descriptor_bytes].reshape(groups, descriptor_bytes)

    block_bitmap, inode_bitmap, inode_table = (_wide(table, low, low + 0x20, has_64bit) for low in (0x0, 0x4, 0x8))
    flags = np.ascontiguousarray(table[:, 0x12:0x14]).view("<u2")[:, 0]
    checked = bool(ro_compat & (_RO_GDT_CSUM | _RO_METADATA_CSUM))
    reserved = min(struct.unpack_from("<H", raw, 0xCE)[0], per_group)
    supers = firsts[has_super]
    # Without meta_bg each superblock is followed by all descriptors and the room reserved for more.
    old_style = min(len(own), first_meta)
    mmp = struct.unpack_from("<Q", raw, 0x168)[0] if incompat & _INCOMPAT_MMP else 0
    fixed = united(
        runs_of(supers, np.full(len(supers), 1 + old_style + reserved)),
        runs_of_blocks(np.concatenate([np.zeros(1, np.uint64), own, copies, block_bitmap, inode_bitmap])),
        runs_of(inode_table, np.full(groups, -(-inodes_per_group * inode_bytes // BLOCK_BYTES))),
        runs_of(np.array([mmp]), np.array([1 if mmp else 0])),
    )
    numbers = struct.unpack_from("<II", raw, 0x240) + struct.unpack_from("<I", raw, 0x26C)
    if compat & _COMPAT_ORPHAN_FILE:
        numbers += struct.unpack_from("<I", raw, 0x280)
    system = frozenset(range(1, first_inode)) | {number for number in numbers if number}
    return Layout(
        device=device,
        blocks=blocks,
        inodes=inodes,
        first_block_of_groups=firsts,
        inodes_per_group=inodes_per_group,
        inode_bytes=inode_bytes,
        system_inodes=system - {ROOT_INODE},
        journal=bool(compat & _COMPAT_JOURNAL),
        ea_inodes=bool(incompat & _INCOMPAT_EA_INODE),
        block_bitmap=block_bitmap,
        inode_bitmap=inode_bitmap,
        inode_table=inode_table,
        inode_uninit=checked & ((flags & _INODE_UNINIT) != 0),
        block_uninit=checked & ((flags & _BLOCK_UNINIT) != 0),
        fixed=fixed,
    )


def read_blocks(device: Path, blocks: U64) -> U8:
    """Return the content of ``blocks``, in the order asked, as rows of 4096 bytes. Neighbours are read together."""
    distinct, where = np.unique(blocks, return_inverse=True)
    content = np.empty((len(distinct), BLOCK_BYTES), dtype=np.uint8)
    at, runs = 0, runs_of_blocks(distinct)
    with _opened(device) as descriptor:
        _read_ahead(descriptor, runs)
        for first, end in zip(runs.first.tolist(), runs.end.tolist(), strict=True):
            while first < end:
                count = min(end - first, _READ_BYTES // BLOCK_BYTES)
                part = _read(device, descriptor, first * BLOCK_BYTES, count * BLOCK_BYTES)
                content[at : at + count] = np.frombuffer(part, dtype=np.uint8).reshape(count, BLOCK_BYTES)
                first, at = first + count, at + count
    return content if len(distinct) == len(blocks) and bool(np.all(where == np.arange(len(blocks)))) else content[where.reshape(-1)]


def anticipate(device: Path, runs: Runs) -> None:
    """Let the kernel begin to read ``runs`` into the device's page cache, all of them at once, and return."""
    with _opened(device) as descriptor:
        _read_ahead(descriptor, runs)


def read_inodes(layout: Layout, inodes: U64) -> U8:
    """Return the raw inodes, a row of ``inode_bytes`` each, in the order asked."""
    group, index = np.divmod(inodes.astype(np.int64) - 1, layout.inodes_per_group)
    offset = index * layout.inode_bytes
    block = layout.inode_table[group] + (offset // BLOCK_BYTES).astype(np.uint64)
    distinct, where = np.unique(block, return_inverse=True)
    per_block = BLOCK_BYTES // layout.inode_bytes
    content = read_blocks(layout.device, distinct).reshape(len(distinct), per_block, layout.inode_bytes)
    return np.ascontiguousarray(content[where.reshape(-1), (offset % BLOCK_BYTES) // layout.inode_bytes])


def inodes_used(layout: Layout, inodes: U64) -> Flags:
    """Return which inodes the inode bitmaps say are allocated; numbers past the last group are not."""
    group, index = np.divmod(inodes.astype(np.int64) - 1, layout.inodes_per_group)
    used = np.zeros(len(inodes), dtype=bool)
    known = np.flatnonzero((group >= 0) & (group < layout.groups))
    known = known[~layout.inode_uninit[group[known]]]
    touched, row = np.unique(group[known], return_inverse=True)
    maps = read_blocks(layout.device, layout.inode_bitmap[touched])
    bit = index[known]
    used[known] = (maps[row.reshape(-1), bit >> 3] >> (bit & 7).astype(np.uint8)) & 1 != 0
    return used


def all_used_inodes(layout: Layout, groups: I64) -> U64:
    """Return the numbers of all allocated inodes of ``groups``."""
    groups = groups[~layout.inode_uninit[groups]]
    maps = read_blocks(layout.device, layout.inode_bitmap[groups])
    bits = np.unpackbits(maps, axis=1, count=layout.inodes_per_group, bitorder="little")
    row, bit = np.nonzero(bits)
    return (groups[row] * layout.inodes_per_group + bit + 1).astype(np.uint64)


def free_runs(layout: Layout, within: Runs) -> Runs:
    """Return what of ``within`` (disjoint) is free by the block bitmaps, or lies past the filesystem's end."""
    end = np.append(layout.first_block_of_groups[1:], np.uint64(layout.blocks))
    groups = Runs(layout.first_block_of_groups, end)
    touched = np.unique(np.searchsorted(groups.first, intersected(within, groups).first, side="right") - 1).astype(np.int64)
    past = Runs(np.array([layout.blocks], np.uint64), np.array([2**62], np.uint64))
    parts = [past]
    for at in range(0, len(touched), 256):
        some = touched[at : at + 256]
        whole = some[layout.block_uninit[some]]
        parts.append(Runs(groups.first[whole], groups.end[whole]))
        mapped = some[~layout.block_uninit[some]]
        size = (groups.end - groups.first)[mapped].astype(np.int64)
        bits = np.ones((len(mapped), _BITS + 2), dtype=np.int8)
        bits[:, 1:-1] = np.unpackbits(read_blocks(layout.device, layout.block_bitmap[mapped]), axis=1, bitorder="little")
        bits[np.arange(_BITS + 2)[None, :] > size[:, None]] = 1
        edge = np.diff(bits, axis=1)
        down_row, down = np.nonzero(edge == -1)
        _, up = np.nonzero(edge == 1)
        base = groups.first[mapped][down_row]
        parts.append(Runs(base + down.astype(np.uint64), base + up.astype(np.uint64)))
    return intersected(within, united(*parts))


def inodes_of_tables(layout: Layout, changed: Runs) -> U64:
    """Return the numbers of all inodes whose place is in a ``changed`` block of an inode table."""
    tables = layout.tables()
    order = np.argsort(tables.first, kind="stable")
    ordered = Runs(tables.first[order], tables.end[order])
    hit = intersected(changed, ordered)
    group = order[np.searchsorted(ordered.first, hit.first, side="right") - 1].astype(np.int64)
    per_block = BLOCK_BYTES // layout.inode_bytes
    start = (hit.first - layout.inode_table[group]).astype(np.int64) * per_block
    count = np.minimum(hit.blocks.astype(np.int64) * per_block, layout.inodes_per_group - start)
    return np.sort(spans(group * layout.inodes_per_group + start + 1, count)).astype(np.uint64)


def _groups_with_super(groups: int, compat: int, ro_compat: int, backups: tuple[int, ...]) -> I64:
    if compat & _COMPAT_SPARSE_SUPER2:
        return np.array(sorted({0} | {group for group in backups if 0 < group < groups}), dtype=np.int64)
    if not ro_compat & _RO_SPARSE_SUPER:
        return np.arange(groups, dtype=np.int64)
    found = {0, 1}
    for base in (3, 5, 7):
        power = base
        while power < groups:
            found.add(power)
            power *= base
    return np.array(sorted(group for group in found if group < groups), dtype=np.int64)


def _descriptor_blocks(firsts: U64, has_super: I64, per_block: int, first_meta: int) -> tuple[U64, U64]:
    """Return the blocks of the descriptor table in use, and of meta_bg's copies of it (the last two groups of each meta group)."""
    groups = len(firsts)
    supers = set(has_super.tolist())
    own: list[int] = []
    copies: list[int] = []
    for number in range(-(-groups // per_block)):
        if number < first_meta:
            own.append(int(firsts[0]) + 1 + number)
            continue
        meta = number * per_block
        for group in (meta, meta + 1, meta + per_block - 1):
            if group < groups:
                place = int(firsts[group]) + (group in supers)
                (own if group == meta else copies).append(place)
    return np.array(own, dtype=np.uint64), np.array(copies, dtype=np.uint64)


def _wide(table: U8, low: int, high: int, has_64bit: bool) -> U64:
    value = np.ascontiguousarray(table[:, low : low + 4]).view("<u4")[:, 0].astype(np.uint64)
    if has_64bit and table.shape[1] >= 64:
        value |= np.ascontiguousarray(table[:, high : high + 4]).view("<u4")[:, 0].astype(np.uint64) << np.uint64(32)
    return value


@contextmanager
def _opened(device: Path) -> Iterator[int]:
    try:
        descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceFailed(f"cannot open {device}", cause=f"{error.strerror} (errno {error.errno})") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_ahead(descriptor: int, runs: Runs) -> None:
    if len(runs) > 1:
        for first, end in zip(runs.first.tolist(), runs.end.tolist(), strict=True):
            os.posix_fadvise(descriptor, first * BLOCK_BYTES, (end - first) * BLOCK_BYTES, os.POSIX_FADV_WILLNEED)


def _read(device: Path, descriptor: int, offset: int, length: int) -> bytes:
    try:
        content = os.pread(descriptor, length, offset)
    except OSError as error:
        raise DeviceFailed(
            f"cannot read {device}", cause=f"{error.strerror} (errno {error.errno}), offset {offset}, length {length}"
        ) from error
    if len(content) != length:
        raise DeviceFailed(f"cannot read {device}", cause=f"{len(content)} of {length} bytes at offset {offset}")
    return content
