"""Reads two frozen generations of an XFS volume: which inodes changed, where files lie, whose the changed blocks are.

The kernel's inode chunks (XFS_IOC_INUMBERS) say which inodes exist; their raw content on both devices says which differ. The work
follows the number of changed blocks of inodes, not the number of files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.contract.dmi import ExtentFlag
from agent.contract.errors import DeviceFailed
from agent.contract.identity import BLOCK_BYTES, FilesystemKind
from agent.differential.reader import U32, U64, Extents, InodeChanges, Ownership, View
from agent.differential.xfs_disk import (
    DINODE_MAGIC,
    FLAG2_REFLINK,
    NEVER_COMPARED,
    Layout,
    fork_extents,
    is_internal,
    read_inodes,
    read_layout,
)
from agent.differential.xfs_owners import owners_of
from agent.system import block, xfs
from agent.system.handles import open_inode
from agent.volume.substrate import ChangedRuns

_BATCH = 32768
"""Inodes held at a time: 16 to 64 MiB of raw inodes."""

_NO_ADDRESS = block.ExtentFlag.UNKNOWN | block.ExtentFlag.DELALLOC | block.ExtentFlag.ENCODED | block.ExtentFlag.DATA_INLINE
"""No such extent can be in a frozen XFS."""


@dataclass(frozen=True, slots=True, eq=False)
class _Groups:
    """Which inodes are in use, in groups of 64 numbers: bit ``i`` of ``bits`` is inode ``64 * group + i``."""

    group: U64
    bits: U64


class XfsReader:
    """XFS version 5 with 4096-byte blocks and internal log, frozen before it was copied; ``base`` is None when the base is g0."""

    def __init__(self, base: View | None, target: View, changed: ChangedRuns) -> None:
        """LayoutUnsupported if one of the two cannot be read."""
        self._base = base
        self._target = target
        self._changed = changed
        self._layout = read_layout(target.device)
        self._base_layout = read_layout(base.device) if base else self._layout
        self.root_inode = self._layout.root_inode

    def changed_inodes(self) -> InodeChanges:
        """Return every inode that differs between base and target, in order of number and generation.

        Looked at are inodes in changed blocks, and inodes in use in one generation only: a chunk whose last inode was deleted is
        given up as a whole, and its blocks need not be written.
        """
        nothing = _Groups(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        in_base = _grouped(xfs.inode_chunks(self._base.mount_fd)) if self._base else nothing
        in_target = _grouped(xfs.inode_chunks(self._target.mount_fd))
        found: list[InodeChanges] = []
        with Device.open_reading(self._target.device) as target, Device.open_reading((self._base or self._target).device) as base:
            for inode, of_base, of_target in _candidates(self._layout, in_base, in_target, self._changed):
                found.append(
                    _compared(
                        inode,
                        _side(base, self._base_layout, inode, of_base),
                        _side(target, self._layout, inode, of_target),
                    )
                )
        return _joined(found)

    def anticipate(self, directories: U64) -> None:
        """XFS has buffers of its own for metadata, which nothing but its own reading fills."""

    def extents(self, inode: U64, generation: U32) -> Extents:
        """Return the target's extents of regular files (data fork only); DeviceFailed if one is not in the target.

        Extents beyond the end of a file (preallocated) are among them. SHARED stands on the blocks that are shared, as the kernel
        splits them; only inodes that bear the reflink flag are asked for it.
        """
        parts: list[Extents] = []
        with Device.open_reading(self._target.device) as device:
            for at in range(0, len(inode), _BATCH):
                batch = slice(at, at + _BATCH)
                raw = _read(device, self._layout, inode[batch])
                if bool(np.any(raw["generation"] != generation[batch])):
                    raise DeviceFailed("an inode was asked for with a generation that the target does not have")
                parts.append(self._batch_extents(device, inode[batch], generation[batch], raw))
        return _joined_extents(parts)

    def ownership(self, changes: InodeChanges, regular: U64, extents: Extents) -> Ownership:
        """Return who owns the changed runs, see reader.FilesystemReader.

        ``regular`` and ``extents`` are not asked: reverse mapping tells without them, and where there is none the changed inodes
        are read for their attribute forks and trees anyway.
        """
        del regular, extents
        with Device.open_reading(self._target.device) as device:
            return owners_of(device, self._target.mount_fd, self._layout, self._changed, changes)

    def _batch_extents(self, device: Device, inode: U64, generation: U32, raw: NDArray[np.void]) -> Extents:
        forks = fork_extents(device, self._layout, raw, attribute=False)
        flags = np.where(forks.unwritten, ExtentFlag.UNWRITTEN, 0).astype(np.uint32)
        counts = np.bincount(forks.fork, minlength=len(inode))
        start = np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts, dtype=np.uint64)])
        decoded = Extents(start, forks.logical, forks.physical, forks.blocks, flags)
        pieces: list[Extents] = []
        done = 0
        for row in np.flatnonzero(((raw["flags2"] & FLAG2_REFLINK) != 0) & (counts > 0)).tolist():
            asked = _asked(self._target.mount_fd, int(inode[row]), int(generation[row]))
            if asked is None:
                flags[int(start[row]) : int(start[row + 1])] |= ExtentFlag.SHARED
                continue
            pieces += [_files(decoded, done, row), asked]
            done = row + 1
        return _joined_extents([*pieces, _files(decoded, done, len(inode))])


def _grouped(chunks: xfs.InodeChunks) -> _Groups:
    """Return the inodes in use. Chunks need not begin at a multiple of 64 where sparse inodes are off."""
    shift = chunks.first & np.uint64(63)
    group = chunks.first >> np.uint64(6)
    if not bool(np.any(shift)):
        return _Groups(group, chunks.allocated)
    spill = np.where(shift > 0, chunks.allocated >> (np.uint64(63) - shift) >> np.uint64(1), np.uint64(0))
    parts = np.concatenate([group, group + np.uint64(1)])
    bits = np.concatenate([chunks.allocated << shift, spill])
    distinct, where = np.unique(parts, return_inverse=True)
    merged = np.zeros(len(distinct), np.uint64)
    np.bitwise_or.at(merged, where, bits)
    return _Groups(distinct, merged)


def _candidates(
    layout: Layout, base: _Groups, target: _Groups, changed: ChangedRuns
) -> Iterator[tuple[U64, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Yield (inodes, in use in base, in use in target) in batches, ascending."""
    group = np.union1d(base.group, target.group)
    base_bits, target_bits = _aligned(base, group), _aligned(target, group)
    per_block = 1 << layout.inode_shift
    step = np.arange(64 // per_block).astype(np.uint64)
    blocks: U64 = (layout.inode_block(group << np.uint64(6))[:, None] + step).reshape(-1)
    touched = np.repeat(in_runs(blocks, changed), per_block).reshape(len(group), 64)
    of_base, of_target = _unpacked(base_bits), _unpacked(target_bits)
    wanted = (of_base ^ of_target) | (of_base & of_target & touched)
    row, bit = np.nonzero(wanted)
    inode = (group[row] << np.uint64(6)) + bit.astype(np.uint64)
    for at in range(0, len(inode), _BATCH):
        rows, bits = row[at : at + _BATCH], bit[at : at + _BATCH]
        yield inode[at : at + _BATCH], of_base[rows, bits], of_target[rows, bits]


def in_runs(block: U64, changed: ChangedRuns) -> NDArray[np.bool_]:
    """Which blocks lie in the changed runs."""
    if not len(changed.first):
        return np.zeros(len(block), np.bool_)
    run = np.searchsorted(changed.first, block, "right").astype(np.int64) - 1
    inside: NDArray[np.bool_] = (run >= 0) & (block < changed.first[run] + changed.blocks[run])
    return inside


def _aligned(groups: _Groups, group: U64) -> U64:
    bits = np.zeros(len(group), np.uint64)
    bits[np.searchsorted(group, groups.group)] = groups.bits
    return bits


def _unpacked(bits: U64) -> NDArray[np.bool_]:
    octets = bits.astype("<u8").view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").astype(np.bool_)


def _read(device: Device, layout: Layout, inode: U64) -> NDArray[np.void]:
    raw = read_inodes(device, layout, inode)
    wrong = (raw["magic"] != DINODE_MAGIC) | (raw["version"] != 3) | (raw["ino"] != inode)
    if bool(np.any(wrong)):
        raise DeviceFailed(f"what should be inode {int(inode[wrong][0])} is none")
    return raw


def _side(device: Device, layout: Layout, inode: U64, in_use: NDArray[np.bool_]) -> NDArray[np.void]:
    """Return the raw inodes of one generation; zeros where the inode is not in use or belongs to the filesystem itself."""
    octets = np.zeros((len(inode), layout.inode_bytes), np.uint8)
    asked = _read(device, layout, inode[in_use])
    octets[in_use] = asked.view(np.uint8).reshape(len(asked), layout.inode_bytes)
    octets[np.flatnonzero(in_use)[is_internal(layout, inode[in_use], asked)]] = 0
    return octets.reshape(-1).view(layout.inode_dtype)


def _compared(inode: U64, base: NDArray[np.void], target: NDArray[np.void]) -> InodeChanges:
    """Return the rows of the inodes that differ; a reused number gives two, its old generation first."""
    in_base, in_target = base["mode"] != 0, target["mode"] != 0
    same = in_base & in_target & (base["generation"] == target["generation"])
    nlink = target["nlink"].astype(np.uint32)
    parts = (
        (in_base & ~same, base, True, False),
        (in_target & ~same, target, False, True),
        (same & _differ(base, target), target, True, True),
    )
    found = [
        InodeChanges(
            inode[rows],
            raw["generation"][rows].astype(np.uint32),
            (raw["mode"][rows] >> 12).astype(np.uint8),
            np.full(int(rows.sum()), of_base),
            np.full(int(rows.sum()), of_target),
            nlink[rows] if of_target else np.zeros(int(rows.sum()), np.uint32),
        )
        for rows, raw, of_base, of_target in parts
    ]
    joined = _joined(found)
    # Stable: of a reused number the row of the base was put first.
    order = np.argsort(joined.inode, kind="stable")
    return InodeChanges(
        joined.inode[order],
        joined.generation[order],
        joined.kind[order],
        joined.in_base[order],
        joined.in_target[order],
        joined.target_nlink[order],
    )


def _differ(base: NDArray[np.void], target: NDArray[np.void]) -> NDArray[np.bool_]:
    if not len(base):
        return np.zeros(0, np.bool_)
    sides = []
    for raw in (base, target):
        octets = raw.view(np.uint8).copy()
        for name in NEVER_COMPARED:
            octets.view(raw.dtype)[name] = 0
        sides.append(octets.view(np.uint64).reshape(len(raw), -1))
    different: NDArray[np.bool_] = np.any(sides[0] != sides[1], axis=1)
    return different


def _joined(parts: list[InodeChanges]) -> InodeChanges:
    return InodeChanges(
        np.concatenate([np.zeros(0, np.uint64), *(part.inode for part in parts)]),
        np.concatenate([np.zeros(0, np.uint32), *(part.generation for part in parts)]),
        np.concatenate([np.zeros(0, np.uint8), *(part.kind for part in parts)]),
        np.concatenate([np.zeros(0, np.bool_), *(part.in_base for part in parts)]),
        np.concatenate([np.zeros(0, np.bool_), *(part.in_target for part in parts)]),
        np.concatenate([np.zeros(0, np.uint32), *(part.target_nlink for part in parts)]),
    )


def _asked(mount_fd: int, inode: int, generation: int) -> Extents | None:
    """Return one file's extents as the kernel tells them; None where it cannot open the inode (it has no name any more)."""
    try:
        fd = open_inode(mount_fd, FilesystemKind.XFS, inode, generation, os.O_RDONLY | os.O_NONBLOCK | os.O_NOATIME)
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        raise
    try:
        told = block.extent_map(fd)
    finally:
        os.close(fd)
    if bool(np.any(told.flags & _NO_ADDRESS)):
        raise DeviceFailed(f"inode {inode} has an extent without an address, so the generation was not frozen")
    flags = np.where(told.flags & block.ExtentFlag.UNWRITTEN, ExtentFlag.UNWRITTEN, 0)
    flags |= np.where(told.flags & block.ExtentFlag.SHARED, ExtentFlag.SHARED, 0)
    start = np.array([0, len(told.logical)], np.uint64)
    unit = np.uint64(BLOCK_BYTES)
    return Extents(start, told.logical // unit, told.physical // unit, told.length // unit, flags.astype(np.uint32))


def _files(of: Extents, first: int, end: int) -> Extents:
    """Return files ``first`` to ``end`` as an answer of their own."""
    start = of.start[first : end + 1]
    rows = slice(int(start[0]), int(start[-1]))
    return Extents(start - start[0], of.logical[rows], of.physical[rows], of.blocks[rows], of.flags[rows])


def _joined_extents(parts: list[Extents]) -> Extents:
    sizes = np.concatenate([np.zeros(1, np.uint64), *(np.diff(part.start) for part in parts)])
    return Extents(
        np.cumsum(sizes, dtype=np.uint64),
        np.concatenate([np.zeros(0, np.uint64), *(part.logical for part in parts)]),
        np.concatenate([np.zeros(0, np.uint64), *(part.physical for part in parts)]),
        np.concatenate([np.zeros(0, np.uint64), *(part.blocks for part in parts)]),
        np.concatenate([np.zeros(0, np.uint32), *(part.flags for part in parts)]),
    )
