"""Which blocks raw ext4 inodes own: their data, the blocks of their extent trees or block maps, their xattr block.

Sources: Documentation/filesystems/ext4 (ifork, dynamic inodes), fs/ext4/ext4_extents.h. Trees are walked level by level, all inodes of a
question at once, so that only as many reads are made as there are levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import ExtentFlag
from agent.contract.errors import LayoutUnsupported
from agent.contract.identity import BLOCK_BYTES
from agent.differential.ext4_layout import read_blocks
from agent.differential.intervals import U64, Runs

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

REGULAR: Final = 8
DIRECTORY: Final = 4
SYMLINK: Final = 10

EXTENTS_FLAG: Final = 0x80000
EA_INODE_FLAG: Final = 0x200000
INLINE_DATA_FLAG: Final = 0x10000000

_MAGIC: Final = 0xF30A
_MAX_DEPTH: Final = 5
_UNWRITTEN_FROM: Final = 32768
_FAST_SYMLINK_BYTES: Final = 60
_POINTERS: Final = BLOCK_BYTES // 4


@dataclass(frozen=True, slots=True, eq=False)
class Mapping:
    """Data of inodes as extents (columns of the same length, by row of the question, then in logical order), and their tree blocks."""

    row: I64
    logical: U64
    physical: U64
    blocks: U64
    flags: U32  # dmi.ExtentFlag
    tree: U64  # blocks of trees and maps
    tree_row: I64  # whose each is

    @property
    def runs(self) -> Runs:
        """Where the data is."""
        return Runs(self.physical, self.physical + self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Some rows of a Mapping that is being gathered."""

    row: I64
    logical: U64
    physical: U64
    blocks: U64
    flags: U32


@dataclass(frozen=True, slots=True, eq=False)
class _Nodes:
    """Blocks of trees or maps, and whose they are."""

    row: I64
    block: U64


def field(raw: U8, offset: int, dtype: str) -> NDArray[np.uint64]:
    """Return a little-endian field of every raw inode as uint64."""
    width = np.dtype(dtype).itemsize
    return np.ascontiguousarray(raw[:, offset : offset + width]).view(dtype)[:, 0].astype(np.uint64)


def kinds(raw: U8) -> U8:
    """Return st_mode >> 12 of every raw inode."""
    return (field(raw, 0, "<u2") >> np.uint64(12)).astype(np.uint8)


def xattr_blocks(raw: U8) -> U64:
    """Return the xattr block of each raw inode, 0 for none."""
    return field(raw, 0x68, "<u4") | field(raw, 0x76, "<u2") << np.uint64(32)


def mapping(device: Path, inodes: U64, raw: U8) -> Mapping:
    """Return what the raw ``inodes`` own; ``row`` counts the inodes. LayoutUnsupported names an inode whose tree cannot be read."""
    kind, flags = kinds(raw), field(raw, 0x20, "<u4")
    size = field(raw, 0x4, "<u4")
    holds_data = np.isin(kind, (REGULAR, DIRECTORY, SYMLINK)) | ((kind == 0) & (field(raw, 0x1C, "<u4") > 0))
    holds_data &= (flags & np.uint64(INLINE_DATA_FLAG)) == 0
    by_tree = holds_data & ((flags & np.uint64(EXTENTS_FLAG)) != 0)
    by_map = holds_data & ~by_tree & ~((kind == SYMLINK) & (size < _FAST_SYMLINK_BYTES))
    parts: list[_Part] = []
    tree: list[_Nodes] = []
    rows = np.flatnonzero(by_tree).astype(np.int64)
    _walk_trees(device, inodes, rows, np.ascontiguousarray(raw[rows, 0x28 : 0x28 + 60]), parts=parts, tree=tree)
    for row in np.flatnonzero(by_map).tolist():
        _walk_map(device, row, np.ascontiguousarray(raw[row, 0x28 : 0x28 + 60]).view("<u4").astype(np.uint64), parts, tree)
    if not parts:
        none = np.zeros(0, dtype=np.uint64)
        return Mapping(none.astype(np.int64), none, none, none, none.astype(np.uint32), none, none.astype(np.int64))
    row_of = np.concatenate([part.row for part in parts])
    logical = np.concatenate([part.logical for part in parts])
    order = np.lexsort((logical, row_of))
    return Mapping(
        row_of[order],
        logical[order],
        np.concatenate([part.physical for part in parts])[order],
        np.concatenate([part.blocks for part in parts])[order],
        np.concatenate([part.flags for part in parts])[order],
        np.concatenate([np.zeros(0, np.uint64), *(nodes.block for nodes in tree)]),
        np.concatenate([np.zeros(0, np.int64), *(nodes.row for nodes in tree)]),
    )


def _walk_trees(device: Path, inodes: U64, rows: I64, nodes: U8, *, parts: list[_Part], tree: list[_Nodes]) -> None:
    """Gather the extents of trees whose nodes of one level are ``nodes``, each belonging to row ``rows``; then of the level below."""
    expected = np.full(len(rows), -1, dtype=np.int64)
    for _ in range(_MAX_DEPTH + 1):
        if not len(rows):
            return
        head = np.ascontiguousarray(nodes[:, :8]).view("<u2").astype(np.int64)
        capacity = (nodes.shape[1] - 12) // 12
        entries, depth = head[:, 1], head[:, 3]
        bad = (head[:, 0] != _MAGIC) | (entries > capacity) | (depth > _MAX_DEPTH) | ((expected >= 0) & (depth != expected))
        if bool(np.any(bad)):
            _damaged(inodes, rows[np.flatnonzero(bad)[0]])
        words = np.ascontiguousarray(nodes[:, 12 : 12 + capacity * 12]).view("<u4").reshape(len(nodes), capacity, 3).astype(np.uint64)
        there = np.arange(capacity)[None, :] < entries[:, None]
        leaf, index = there & (depth == 0)[:, None], there & (depth > 0)[:, None]
        parts.append(_leaves(words[leaf], rows[np.nonzero(leaf)[0]]))
        low_high, parent = words[index], np.nonzero(index)[0]
        below = low_high[:, 1] | (low_high[:, 2] & np.uint64(0xFFFF)) << np.uint64(32)
        rows, expected = rows[parent], depth[parent] - 1
        tree.append(_Nodes(rows, below))
        nodes = read_blocks(device, below)
    _damaged(inodes, rows[0])


def _leaves(words: U64, rows: I64) -> _Part:
    """Return the extents in leaf entries of three words: logical block; length and high half of the start; low half of it."""
    length = (words[:, 1] & np.uint64(0xFFFF)).astype(np.int64)
    unwritten = length > _UNWRITTEN_FROM
    physical = words[:, 2] | (words[:, 1] >> np.uint64(16)) << np.uint64(32)
    blocks = np.where(unwritten, length - _UNWRITTEN_FROM, length).astype(np.uint64)
    flags = np.where(unwritten, int(ExtentFlag.UNWRITTEN), 0).astype(np.uint32)
    return _Part(rows, words[:, 0], physical, blocks, flags)


def _walk_map(device: Path, row: int, pointers: U64, parts: list[_Part], tree: list[_Nodes]) -> None:
    """Gather the data of an inode with a block map: twelve direct pointers, then one each of one, two and three levels."""
    logical, physical = [np.arange(12, dtype=np.uint64)], [pointers[:12]]
    begin = 12
    for levels in (1, 2, 3):
        nodes = pointers[11 + levels : 12 + levels]
        first = np.array([begin], dtype=np.uint64)
        for level in reversed(range(levels)):
            first, nodes = first[nodes != 0], nodes[nodes != 0]
            tree.append(_Nodes(np.full(len(nodes), row, np.int64), nodes))
            below = read_blocks(device, nodes).view("<u4").reshape(len(nodes), _POINTERS).astype(np.uint64)
            step = np.arange(_POINTERS, dtype=np.uint64) * np.uint64(_POINTERS**level)
            first, nodes = (first[:, None] + step[None, :]).reshape(-1), below.reshape(-1)
        logical.append(first)
        physical.append(nodes)
        begin += _POINTERS**levels
    at, block = np.concatenate(logical), np.concatenate(physical)
    at, block = at[block != 0], block[block != 0]
    if not len(at):
        return
    one = np.uint64(1)
    new = np.flatnonzero(np.append(True, (at[1:] != at[:-1] + one) | (block[1:] != block[:-1] + one)))
    length = np.diff(np.append(new, len(at))).astype(np.uint64)
    parts.append(_Part(np.full(len(new), row, np.int64), at[new], block[new], length, np.zeros(len(new), np.uint32)))


def _damaged(inodes: U64, row: np.int64) -> None:
    raise LayoutUnsupported(f"inode {int(inodes[row])} has an extent tree that cannot be read", fix="Check the filesystem with e2fsck -fn.")
