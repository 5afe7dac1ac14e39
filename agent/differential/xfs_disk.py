"""XFS structures read from a frozen image: superblock, inodes, the extents of their forks.

Layouts: "XFS Algorithms & Data Structures" and xfs/xfs_format.h of xfsprogs (version 5, big-endian). After a freeze all metadata is in
its place and the log is superfluous, so what is read here is what the kernel would read. Addresses are blocks of 4096 bytes from
the start of the device, as the DMI has them; on disk XFS splits them into allocation group and block of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.blockio.buffers import aligned
from agent.blockio.device import Device
from agent.blockio.scatter import gather
from agent.contract.errors import DeviceFailed, LayoutUnsupported
from agent.contract.identity import BLOCK_BYTES

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

_SUPERBLOCK: Final = np.dtype(
    {
        "names": ["magic", "blocksize", "dblocks", "rblocks", "uuid", "logstart", "rootino", "rbmino", "rsumino", "agblocks",
                  "agcount", "logblocks", "versionnum", "sectsize", "inodesize", "inopblog", "agblklog", "uquotino", "gquotino",
                  "ro_compat", "incompat", "pquotino", "meta_uuid"],
        "formats": [">u4", ">u4", ">u8", ">u8", "V16", ">u8", ">u8", ">u8", ">u8", ">u4", ">u4", ">u4", ">u2", ">u2", ">u2", "u1",
                    "u1", ">u8", ">u8", ">u4", ">u4", ">u8", "V16"],
        "offsets": [0, 4, 8, 16, 32, 48, 56, 64, 72, 84, 88, 96, 100, 102, 104, 123, 124, 160, 168, 212, 216, 232, 248],
        "itemsize": 512,
    }
)  # fmt: skip
_INCOMPAT_META_UUID: Final = 0x4
_INCOMPAT_KNOWN: Final = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80 | 0x100
"""FTYPE, SPINODES, META_UUID, BIGTIME, NREXT64, EXCHRANGE, PARENT, METADIR. Not among them: NEEDSREPAIR, ZONED."""

_CORE_BYTES: Final = 176
_DINODE_FIELDS: Final = {
    "magic": (">u2", 0),
    "mode": (">u2", 2),
    "version": ("u1", 4),
    "format": ("u1", 5),
    "nlink": (">u4", 16),
    "big_nextents": (">u8", 24),
    "atime": (">u8", 32),
    "nextents": (">u4", 76),
    "anextents": (">u2", 80),
    "forkoff": ("u1", 82),
    "aformat": ("u1", 83),
    "flags": (">u2", 90),
    "generation": (">u4", 92),
    "next_unlinked": (">u4", 96),
    "crc": (">u4", 100),
    "changecount": (">u8", 104),
    "lsn": (">u8", 112),
    "flags2": (">u8", 120),
    "ino": (">u8", 152),
    "uuid": ("V16", 160),
}
DINODE_MAGIC: Final = 0x494E
NEVER_COMPARED: Final = ("atime", "next_unlinked", "crc", "changecount", "lsn")
"""Fields that change without the inode changing: access time, its place in the list of unlinked inodes, bookkeeping."""

FLAG_REALTIME: Final = 0x1
FLAG2_REFLINK: Final = 0x2
_FLAG2_NREXT64: Final = 0x10
_FLAG2_METADATA: Final = 0x20
_FORMAT_EXTENTS: Final = 2
_FORMAT_BTREE: Final = 3

_BMBT_MAGIC: Final = 0x424D4133
_BMBT_HEADER: Final = np.dtype(
    {
        "names": ["magic", "level", "records", "daddr", "uuid"],
        "formats": [">u4", ">u2", ">u2", ">u8", "V16"],
        "offsets": [0, 4, 6, 24, 40],
        "itemsize": 72,
    }
)
_BMBT_ROWS: Final = (BLOCK_BYTES - 72) // 16
SECTORS_PER_BLOCK: Final = BLOCK_BYTES // 512


@dataclass(frozen=True, slots=True)
class Layout:
    """A filesystem's geometry. ``uuid`` is the one in its metadata blocks."""

    blocks: int
    group_blocks: int
    group_shift: int
    groups: int
    inode_bytes: int
    inode_shift: int  # log2 of inodes per block
    sector_bytes: int
    log_first: int
    log_blocks: int
    root_inode: int
    internal_inodes: tuple[int, ...]
    uuid: bytes

    @property
    def inode_dtype(self) -> np.dtype[np.void]:
        """Layout of a raw inode. Its forks are no field: numpy copies only fields, so whole inodes are moved about as bytes."""
        return np.dtype(
            {
                "names": list(_DINODE_FIELDS),
                "formats": [kind for kind, _ in _DINODE_FIELDS.values()],
                "offsets": [at for _, at in _DINODE_FIELDS.values()],
                "itemsize": self.inode_bytes,
            }
        )

    def linear(self, fsblock: U64) -> U64:
        """Return device blocks for filesystem block numbers (group << group_shift | block of the group)."""
        group = fsblock >> np.uint64(self.group_shift)
        return group * np.uint64(self.group_blocks) + (fsblock & np.uint64((1 << self.group_shift) - 1))

    def inode_block(self, inode: U64) -> U64:
        """Return the device block that holds each inode."""
        return self.linear(inode >> np.uint64(self.inode_shift))


@dataclass(frozen=True, slots=True, eq=False)
class ForkExtents:
    """Extents of many forks, sorted by (``fork``, ``logical``); ``fork`` is the row of the inode that was asked for."""

    fork: I64
    logical: U64
    physical: U64
    blocks: U64
    unwritten: NDArray[np.bool_]
    tree_fork: I64  # blocks of the forks' own trees
    tree_block: U64


@dataclass(frozen=True, slots=True, eq=False)
class _Forks:
    """One fork of each of many raw inodes: the inodes as rows of bytes, where in them the fork begins, its bytes."""

    octets: U8
    start: I64
    size: I64


def read_layout(device: Path) -> Layout:
    """Return the geometry of the filesystem on ``device``; LayoutUnsupported for one that is not replicated."""
    with Device.open_reading(device) as opened:
        if opened.size_bytes < BLOCK_BYTES:
            raise LayoutUnsupported(f"{device} is too small for XFS")
        sb = np.frombuffer(opened.read(0, 1)[:512], _SUPERBLOCK)[0]
    incompat = int(sb["incompat"])
    for wrong, words in (
        (int(sb["magic"]) != 0x58465342, "it is no XFS"),
        (int(sb["versionnum"]) & 0xF != 5, "its format is older than version 5"),
        (int(sb["blocksize"]) != BLOCK_BYTES, "its blocks are not of 4096 bytes"),
        (int(sb["logstart"]) == 0, "its log is external"),
        (int(sb["rblocks"]) != 0, "it has a realtime section"),
        (incompat & ~_INCOMPAT_KNOWN != 0, f"it has unknown incompatible features ({incompat:#x})"),
    ):
        if wrong:
            raise LayoutUnsupported(f"{device} cannot be replicated", cause=words)
    group_blocks, shift = int(sb["agblocks"]), int(sb["agblklog"])
    log_start = int(sb["logstart"])
    return Layout(
        blocks=int(sb["dblocks"]),
        group_blocks=group_blocks,
        group_shift=shift,
        groups=int(sb["agcount"]),
        inode_bytes=int(sb["inodesize"]),
        inode_shift=int(sb["inopblog"]),
        sector_bytes=int(sb["sectsize"]),
        log_first=(log_start >> shift) * group_blocks + (log_start & ((1 << shift) - 1)),
        log_blocks=int(sb["logblocks"]),
        root_inode=int(sb["rootino"]),
        internal_inodes=tuple(
            number
            for number in (int(sb[name]) for name in ("rbmino", "rsumino", "uquotino", "gquotino", "pquotino"))
            if number not in (0, 2**64 - 1)
        ),
        uuid=sb["meta_uuid" if incompat & _INCOMPAT_META_UUID else "uuid"].tobytes(),
    )


def read_blocks(device: Device, block: U64) -> U8:
    """Return the content of ``block`` (ascending, distinct) as rows of 4096 bytes; read past the page cache, many at once.

    XFS's own reading would find nothing of it there anyway. DeviceFailed where the device ends or fails.
    """
    buffer = aligned(len(block) * BLOCK_BYTES)
    if len(block):
        gather(device, block, np.ones(len(block), np.uint64), buffer)
    return np.frombuffer(buffer, np.uint8).reshape(len(block), BLOCK_BYTES)


def read_inodes(device: Device, layout: Layout, inode: U64) -> NDArray[np.void]:
    """Return the raw inodes of these numbers, which may stand in any order; the caller knows that they are allocated."""
    blocks, row = np.unique(layout.inode_block(inode), return_inverse=True)
    content = read_blocks(device, blocks).reshape(len(blocks), 1 << layout.inode_shift, layout.inode_bytes)
    slot = (inode & np.uint64((1 << layout.inode_shift) - 1)).astype(np.int64)
    raw = np.ascontiguousarray(content[row, slot])
    return raw.reshape(-1).view(layout.inode_dtype)


def is_internal(layout: Layout, inode: U64, raw: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which inodes belong to the filesystem itself: realtime bitmap and summary, quotas, the metadata directory."""
    listed = np.isin(inode, np.array(layout.internal_inodes, np.uint64))
    marked: NDArray[np.bool_] = (raw["flags2"] & _FLAG2_METADATA) != 0
    return listed | marked


def fork_extents(device: Device, layout: Layout, raw: NDArray[np.void], attribute: bool) -> ForkExtents:
    """Return the extents of the data forks (or attribute forks) of raw inodes; none for forks that live in the inode.

    DeviceFailed if a fork contradicts itself.
    """
    total = len(raw)
    octets = raw.view(np.uint8).reshape(total, layout.inode_bytes)
    literal = layout.inode_bytes - _CORE_BYTES
    offset = raw["forkoff"].astype(np.int64) * 8
    nrext64 = (raw["flags2"] & _FLAG2_NREXT64) != 0
    if attribute:
        form = np.where(offset > 0, raw["aformat"], 0)
        count = np.where(nrext64, raw["nextents"].astype(np.int64), raw["anextents"].astype(np.int64))
        start, size = _CORE_BYTES + offset, literal - offset
    else:
        form = raw["format"]
        count = np.where(nrext64, raw["big_nextents"].astype(np.int64), raw["nextents"].astype(np.int64))
        start, size = np.full(total, _CORE_BYTES), np.where(offset > 0, offset, literal)

    plain = np.flatnonzero((form == _FORMAT_EXTENTS) & (count != 0))
    if bool(np.any((count[plain] < 0) | (count[plain] > size[plain] // 16))) or bool(np.any(size < 0)):
        raise DeviceFailed("an inode has more extents than fit into it")
    fork, row = _expand(plain, count[plain])
    records = _gather(octets, fork, start[fork] + 16 * row, 16)

    trees = np.flatnonzero(form == _FORMAT_BTREE)
    tree_fork, tree_record, node_fork, node_block = _walk_trees(device, layout, _Forks(octets, start, size), trees)
    return _decoded(layout, np.concatenate([fork, tree_fork]), np.concatenate([records, tree_record]), node_fork, node_block)


def _expand(items: I64, counts: I64) -> tuple[I64, I64]:
    """Return each item as often as it counts, and the running number within it."""
    repeated = np.repeat(items, counts)
    before = np.repeat(np.cumsum(counts) - counts, counts)
    return repeated, np.arange(len(repeated), dtype=np.int64) - before


def _gather(octets: U8, row: I64, at: I64, width: int) -> U8:
    gathered: U8 = octets[row[:, None], at[:, None] + np.arange(width)]
    return gathered


def _walk_trees(device: Device, layout: Layout, forks: _Forks, trees: I64) -> tuple[I64, U8, I64, U64]:
    """Return (fork, record) of all leaves and (fork, block) of all nodes below the roots in the inodes, level by level."""
    octets, start, size = forks.octets, forks.start[trees], forks.size[trees]
    root = _gather(octets, trees, start, 4)
    level = (root[:, 0].astype(np.int64) << 8) | root[:, 1]
    count = (root[:, 2].astype(np.int64) << 8) | root[:, 3]
    room = (size - 4) // 16
    if bool(np.any(count > room)) or bool(np.any(level < 1)) or bool(np.any(level > 16)):
        raise DeviceFailed("the root of an extent tree contradicts itself")
    fork, row = _expand(np.arange(len(trees)), count)
    pointers = _gather(octets, trees[fork], start[fork] + 4 + 8 * room[fork] + 8 * row, 8)
    fork, level = trees[fork], level[fork] - 1
    block = layout.linear(pointers.reshape(-1).view(">u8").astype(np.uint64))

    leaf_fork: list[I64] = [np.zeros(0, np.int64)]
    leaf_record: list[U8] = [np.zeros((0, 16), np.uint8)]
    node_fork, node_block = [fork], [block]
    while len(block):
        if bool(np.any(block >= np.uint64(layout.blocks))):
            raise DeviceFailed("an extent tree leads beyond the filesystem")
        distinct, where = np.unique(block, return_inverse=True)
        content = read_blocks(device, distinct)[where]
        header = np.ascontiguousarray(content[:, :72]).reshape(-1).view(_BMBT_HEADER)
        count = header["records"].astype(np.int64)
        sound = (
            (header["magic"] == _BMBT_MAGIC)
            & (header["level"] == level)
            & (header["daddr"] == block * np.uint64(SECTORS_PER_BLOCK))
            & (header["uuid"] == np.void(layout.uuid))
            & (count <= _BMBT_ROWS)
        )
        if not bool(np.all(sound)):
            raise DeviceFailed(f"block {int(block[~sound][0])} is no node of the extent tree that leads to it")
        leaf = np.flatnonzero(level == 0)
        of_leaf, row = _expand(leaf, count[leaf])
        leaf_fork.append(fork[of_leaf])
        leaf_record.append(_gather(content, of_leaf, 72 + 16 * row, 16))
        inner = np.flatnonzero(level > 0)
        of_inner, row = _expand(inner, count[inner])
        pointers = _gather(content, of_inner, 72 + 8 * _BMBT_ROWS + 8 * row, 8)
        fork, level = fork[of_inner], level[of_inner] - 1
        block = layout.linear(pointers.reshape(-1).view(">u8").astype(np.uint64))
        node_fork.append(fork)
        node_block.append(block)
    return np.concatenate(leaf_fork), np.concatenate(leaf_record), np.concatenate(node_fork), np.concatenate(node_block)


def _decoded(layout: Layout, fork: I64, records: U8, tree_fork: I64, tree_block: U64) -> ForkExtents:
    """Unpack extent records: 1 bit unwritten, 54 logical block, 52 filesystem block, 21 blocks (xfs_bmbt_rec)."""
    words = np.ascontiguousarray(records).reshape(-1).view(">u8").reshape(-1, 2).astype(np.uint64)
    high, low = words[:, 0], words[:, 1]
    logical = (high >> np.uint64(9)) & np.uint64((1 << 54) - 1)
    physical = layout.linear((high & np.uint64(0x1FF)) << np.uint64(43) | low >> np.uint64(21))
    blocks = low & np.uint64((1 << 21) - 1)
    if bool(np.any(physical + blocks > np.uint64(layout.blocks))) or bool(np.any(blocks == 0)):
        raise DeviceFailed("an extent lies beyond the filesystem")
    order = np.lexsort((logical, fork))
    return ForkExtents(
        fork[order],
        logical[order],
        physical[order],
        blocks[order],
        (high[order] >> np.uint64(63)) != 0,
        tree_fork,
        tree_block,
    )
