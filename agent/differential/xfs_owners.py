"""Whose the changed blocks of an XFS volume are.

The kernel's space map (GETFSMAP) tells it all where the filesystem keeps reverse mappings (rmapbt=1). Where it does not, the map tells
free space, and the rest comes, in this order, from: fixed structures (headers, log, free lists), the forks of the changed inodes,
metadata blocks that say themselves what they are and where they belong, and at last a walk over all inodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.contract.dmi import FileKind, Owner
from agent.differential.reader import U8, U64, InodeChanges, Ownership
from agent.differential.xfs_disk import (
    I64,
    SECTORS_PER_BLOCK,
    Layout,
    fork_extents,
    is_internal,
    read_blocks,
    read_inodes,
)
from agent.system import xfs
from agent.volume.substrate import ChangedRuns

_BATCH: Final = 32768
_NEAR_BLOCKS: Final = 64
"""Changed runs this near to each other are asked for in one call: a record is cheaper than a call."""

_RANK: Final = {Owner.FREE: 1, Owner.JOURNAL: 2, Owner.METADATA: 3, Owner.FILE: 4}
"""Where claims contradict each other the class that is needed more wins; 0 is unclaimed."""
_OWNER_OF_RANK: Final = np.array([Owner.METADATA, Owner.FREE, Owner.JOURNAL, Owner.METADATA, Owner.FILE], np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """Who says that ``first`` up to ``end`` is theirs. In any order, overlapping where shared.

    ``inode`` is that of a file for its data; of any inode that is not among the changes for its directory blocks, symlink blocks
    and attribute fork, which changed without it; otherwise 0.
    """

    first: U64
    end: U64
    rank: U8
    inode: U64


@dataclass(frozen=True, slots=True, eq=False)
class Ranges:
    """Ascending, disjoint ranges of blocks."""

    first: U64
    end: U64


def owners_of(device: Device, mount_fd: int, layout: Layout, changed: ChangedRuns, changes: InodeChanges) -> Ownership:
    """Return the changed runs split by owner; ``device`` is the target's, ``mount_fd`` its mount.

    Every changed block gets exactly one class. FREE is only what the kernel's map calls free and no fork claims. Metadata of an inode
    that is not among the changes is claimed by that inode: names or attributes may have changed within one tick of the clock.
    """
    runs = Ranges(changed.first, changed.first + changed.blocks)
    claims = [_mapped(device, mount_fd, layout, runs, changes)]
    if len(_unclaimed(runs, claims).first):
        claims.append(_fixed(device, layout))
        claims.append(_of_inodes(device, layout, _with_internal(layout, changes.inode[changes.in_target]), runs, named=False))
    left = _unclaimed(runs, claims)
    if len(left.first):
        claims.append(_self_described(device, layout, left, changes))
        left = _unclaimed(runs, claims)
    if len(left.first):
        claims.append(_of_inodes(device, layout, _all_inodes(mount_fd), left, named=True))
    return _split(runs, _clipped(runs, _joined(claims)))


def _mapped(device: Device, mount_fd: int, layout: Layout, runs: Ranges, changes: InodeChanges) -> Claims:
    """Return what the kernel's space map says of the changed runs; nothing for blocks whose owner it does not know."""
    told = xfs.space_map(mount_fd, _near_together(runs))
    special = (told.flags & xfs.MAP_SPECIAL_OWNER) != 0
    rank = np.full(len(told.first), _RANK[Owner.METADATA], np.uint8)
    rank[special & (told.owner == xfs.OWNER_FREE)] = _RANK[Owner.FREE]
    rank[special & (told.owner == xfs.OWNER_LOG)] = _RANK[Owner.JOURNAL]
    of_inode = ~special & ((told.flags & xfs.MAP_EXTENT_MAP) == 0)
    content = of_inode & ((told.flags & xfs.MAP_ATTR_FORK) == 0)
    claims = Claims(told.first, told.first + told.blocks, rank, np.where(of_inode, told.owner, np.uint64(0)))
    regular, unchanged = _kinds(device, layout, claims.inode, changes)
    claims.rank[regular & content] = _RANK[Owner.FILE]
    claims.inode[~(regular & content) & ~unchanged] = 0
    return _clipped(runs, _taken(claims, ~(special & (told.owner == xfs.OWNER_UNKNOWN))))


def _near_together(runs: Ranges) -> list[tuple[int, int]]:
    if not len(runs.first):
        return []
    gap = np.flatnonzero(runs.first[1:] - runs.end[:-1] > np.uint64(_NEAR_BLOCKS)) + 1
    first = runs.first[np.concatenate([np.zeros(1, np.int64), gap])]
    end = runs.end[np.concatenate([gap - 1, np.array([len(runs.end) - 1])])]
    return list(zip(first.tolist(), end.tolist(), strict=True))


def _kinds(device: Device, layout: Layout, inode: U64, changes: InodeChanges) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Say which inode numbers (0 is none) are regular files of the target, and which are not among the changes: those are read."""
    distinct, where = np.unique(inode, return_inverse=True)
    regular = _among(distinct, changes.inode[changes.in_target & (changes.kind == FileKind.REGULAR)])
    unchanged = ~_among(distinct, changes.inode[changes.in_target]) & (distinct != 0)
    strange = np.flatnonzero(unchanged)
    raw = read_inodes(device, layout, distinct[strange])
    internal = is_internal(layout, distinct[strange], raw)
    regular[strange] = (raw["mode"] >> 12 == FileKind.REGULAR) & ~internal
    unchanged[strange] = ~internal
    return regular[where], unchanged[where]


def _among(inode: U64, these: U64) -> NDArray[np.bool_]:
    ordered = np.sort(these)
    if not len(ordered):
        return np.zeros(len(inode), np.bool_)
    found: NDArray[np.bool_] = ordered[np.minimum(np.searchsorted(ordered, inode), len(ordered) - 1)] == inode
    return found


def _fixed(device: Device, layout: Layout) -> Claims:
    """Return what has its place by the geometry: headers of the groups, their free lists, the log, what lies beyond the end.

    A free list's blocks are neither free nor in use; what stands in them is left from earlier.
    """
    start = np.arange(layout.groups, dtype=np.uint64) * np.uint64(layout.group_blocks)
    header_blocks = -(-4 * layout.sector_bytes // (SECTORS_PER_BLOCK * 512))
    heads = np.concatenate([read_blocks(device, start + np.uint64(block)) for block in range(header_blocks)], axis=1)
    agf = heads[:, layout.sector_bytes : layout.sector_bytes + 52]
    first, count = (np.ascontiguousarray(agf[:, at : at + 4]).view(">u4")[:, 0].astype(np.int64) for at in (40, 48))
    agfl = np.ascontiguousarray(heads[:, 3 * layout.sector_bytes + 36 : 4 * layout.sector_bytes])
    slots = agfl[:, : agfl.shape[1] // 4 * 4].view(">u4").astype(np.uint64)
    position = np.arange(slots.shape[1])
    listed = (position[None, :] - first[:, None]) % slots.shape[1] < count[:, None]
    group, slot = np.nonzero(listed)
    lists = start[group] + slots[group, slot]
    log, beyond = np.array([layout.log_first], np.uint64), np.array([layout.blocks], np.uint64)
    return _joined(
        [
            _claims(start, start + np.uint64(header_blocks), Owner.METADATA),
            _claims(lists, lists + np.uint64(1), Owner.METADATA),
            _claims(log, log + np.uint64(layout.log_blocks), Owner.JOURNAL),
            _claims(beyond, beyond + np.uint64(2**52), Owner.METADATA),  # a device may end after its filesystem
        ]
    )


def _with_internal(layout: Layout, inode: U64) -> U64:
    """Return the inodes and those of the filesystem itself: quota blocks change with any file."""
    return np.concatenate([inode, np.array(layout.internal_inodes, np.uint64)])


def _of_inodes(device: Device, layout: Layout, inode: U64, wanted: Ranges, *, named: bool) -> Claims:
    """Return what the forks of these inodes of the target hold of ``wanted``, with the blocks of the forks' trees.

    ``named``: the inodes claim their metadata by number.
    """
    found: list[Claims] = []
    for at in range(0, len(inode), _BATCH):
        batch = inode[at : at + _BATCH]
        raw = read_inodes(device, layout, batch)
        internal = is_internal(layout, batch, raw)
        file = (raw["mode"] >> 12 == FileKind.REGULAR) & ~internal
        data = fork_extents(device, layout, raw, attribute=False)
        attributes = fork_extents(device, layout, raw, attribute=True)
        metadata = np.where(internal | (not named), np.uint64(0), batch)
        rank = np.where(file, _RANK[Owner.FILE], _RANK[Owner.METADATA]).astype(np.uint8)[data.fork]
        trees = np.concatenate([data.tree_block, attributes.tree_block])
        for claims in (
            Claims(data.physical, data.physical + data.blocks, rank, np.where(file, batch, metadata)[data.fork]),
            _claims(attributes.physical, attributes.physical + attributes.blocks, Owner.METADATA, metadata[attributes.fork]),
            _claims(trees, trees + np.uint64(1), Owner.METADATA),
        ):
            found.append(_clipped(wanted, claims))
    return _joined(found)


def _all_inodes(mount_fd: int) -> U64:
    chunks = xfs.inode_chunks(mount_fd)
    octets = chunks.allocated.astype("<u8").view(np.uint8).reshape(-1, 8)
    row, bit = np.nonzero(np.unpackbits(octets, axis=1, bitorder="little"))
    return chunks.first[row] + bit.astype(np.uint64)


_SHORT_TREES: Final = (0x41423342, 0x41423343, 0x49414233, 0x46494233, 0x524D4233, 0x52334643)
_LONG_TREES: Final = (0x424D4133,)
_DIRECTORIES: Final = (0x58444233, 0x58444433, 0x58444633)
_HASHED: Final = (0x3EBE, 0x3BEE, 0x3DF1, 0x3DFF)
_REMOTE: Final = (0x58534C4D, 0x5841524D)
_KINDS: Final = (
    # (magics, their width, their offset, offsets of the own address in sectors, the UUID, the inode; 0: not told, or a tree's)
    (_SHORT_TREES, 4, 0, 16, 32, 0),  # AB3B, AB3C, IAB3, FIB3, RMB3, R3FC: xfs_btree_block_shdr
    (_LONG_TREES, 4, 0, 24, 40, 0),  # BMA3: xfs_btree_block_lhdr
    (_DIRECTORIES, 4, 0, 8, 24, 40),  # XDB3, XDD3, XDF3: xfs_dir3_blk_hdr
    (_HASHED, 2, 8, 16, 32, 48),  # nodes and leaves of directories and attributes: xfs_da3_blkinfo
    (_REMOTE, 4, 0, 40, 16, 32),  # XSLM, XARM: xfs_dsymlink_hdr, xfs_attr3_rmt_hdr
)
"""Metadata that says what it is and where it belongs, so that a copy of it in a file is not taken for it."""


def _self_described(device: Device, layout: Layout, left: Ranges, changes: InodeChanges) -> Claims:
    """Return the blocks of ``left`` that are metadata by their own word: magic, UUID and own address."""
    sizes = (left.end - left.first).astype(np.int64)
    before = np.cumsum(sizes) - sizes
    block = np.repeat(left.first, sizes) + (np.arange(int(sizes.sum())) - np.repeat(before, sizes)).astype(np.uint64)
    found: list[Claims] = []
    for at in range(0, len(block), 4096):
        batch = block[at : at + 4096]
        sound, inode = _describes_itself(layout, batch, read_blocks(device, batch))
        inode[_among(inode, changes.inode[changes.in_target])] = 0
        found.append(_claims(batch[sound], batch[sound] + np.uint64(1), Owner.METADATA, inode[sound]))
    return _joined(found)


def _describes_itself(layout: Layout, block: U64, content: U8) -> tuple[NDArray[np.bool_], U64]:
    """Say which blocks are metadata, and of which inode where they tell one."""

    def number(at: int, width: int) -> U64:
        return np.ascontiguousarray(content[:, at : at + width]).view(f">u{width}")[:, 0].astype(np.uint64)

    def is_uuid(at: int) -> NDArray[np.bool_]:
        same: NDArray[np.bool_] = np.all(content[:, at : at + 16] == np.frombuffer(layout.uuid, np.uint8), axis=1)
        return same

    sector = block * np.uint64(SECTORS_PER_BLOCK)
    sound = np.zeros(len(block), np.bool_)
    inode = np.zeros(len(block), np.uint64)
    for magics, width, at, address, uuid, owner in _KINDS:
        here = np.isin(number(at, width), np.array(magics, np.uint64)) & (number(address, 8) == sector) & is_uuid(uuid)
        sound |= here
        if owner:
            inode[here] = number(owner, 8)[here]
    group, rest = np.divmod(block, np.uint64(layout.group_blocks))
    first = ((group << np.uint64(layout.group_shift)) | rest) << np.uint64(layout.inode_shift)
    sound |= (number(0, 2) == 0x494E) & (number(152, 8) == first) & is_uuid(160)  # xfs_dinode
    return sound, inode  # a quota block (xfs_dqblk) does not know its address; the quota inodes' forks claim it


def _claims(first: U64, end: U64, owner: Owner, inode: U64 | None = None) -> Claims:
    rank = np.full(len(first), _RANK[owner], np.uint8)
    return Claims(first, end, rank, np.zeros(len(first), np.uint64) if inode is None else inode)


def _joined(parts: list[Claims]) -> Claims:
    return Claims(
        np.concatenate([np.zeros(0, np.uint64), *(part.first for part in parts)]),
        np.concatenate([np.zeros(0, np.uint64), *(part.end for part in parts)]),
        np.concatenate([np.zeros(0, np.uint8), *(part.rank for part in parts)]),
        np.concatenate([np.zeros(0, np.uint64), *(part.inode for part in parts)]),
    )


def _taken(claims: Claims, rows: NDArray[np.bool_]) -> Claims:
    return Claims(claims.first[rows], claims.end[rows], claims.rank[rows], claims.inode[rows])


def _clipped(ranges: Ranges, claims: Claims) -> Claims:
    """Return the parts of claims that lie in ``ranges``; a claim across several ranges becomes several."""
    low = np.searchsorted(ranges.end, claims.first, "right").astype(np.int64)
    high = np.searchsorted(ranges.first, claims.end, "left").astype(np.int64)
    counts = np.maximum(high - low, 0)
    claim, step = _expanded(np.arange(len(claims.first)), counts)
    within = low[claim] + step
    return Claims(
        np.maximum(claims.first[claim], ranges.first[within]),
        np.minimum(claims.end[claim], ranges.end[within]),
        claims.rank[claim],
        claims.inode[claim],
    )


def _expanded(items: I64, counts: I64) -> tuple[I64, I64]:
    before = np.repeat(np.cumsum(counts) - counts, counts)
    repeated = np.repeat(items, counts)
    return repeated, np.arange(len(repeated)) - before


def _unclaimed(runs: Ranges, claims: list[Claims]) -> Ranges:
    """Return the parts of ``runs`` that nobody claims."""
    clipped = _clipped(runs, _joined(claims))
    bounds, run, rank, _, _ = _segments(runs, clipped)
    empty = (run >= 0) & (rank == 0)
    return Ranges(bounds[:-1][empty], bounds[1:][empty])


def _segments(runs: Ranges, claims: Claims) -> tuple[U64, I64, U8, I64, I64]:
    """Cut at every bound of a run or claim (clipped to the runs): return the bounds, and per segment its run (-1: in none) and
    rank; then the pairs of (segment, claim)."""
    # Without np.unique: it hashes since numpy 2.3, which takes several times as long here as sorting.
    bounds = np.sort(np.concatenate([runs.first, runs.end, claims.first, claims.end]))
    bounds = bounds[np.concatenate([np.ones(min(len(bounds), 1), np.bool_), bounds[1:] != bounds[:-1]])]
    if not len(bounds):
        none = np.zeros(0, np.int64)
        return bounds, none, np.zeros(0, np.uint8), none, none
    run = np.searchsorted(runs.first, bounds[:-1], "right").astype(np.int64) - 1
    run[bounds[:-1] >= runs.end[run]] = -1
    low = np.searchsorted(bounds, claims.first)
    claim, step = _expanded(np.arange(len(claims.first)), np.searchsorted(bounds, claims.end) - low)
    segment = low[claim] + step
    rank = np.zeros(len(bounds) - 1, np.uint8)
    np.maximum.at(rank, segment, claims.rank[claim])
    return bounds, run, rank, segment, claim


def _split(runs: Ranges, claims: Claims) -> Ownership:
    """Return the runs cut where the owner changes; what nobody claims is METADATA. Neighbours of one owner set of one file are joined."""
    bounds, run, rank, segment, claim = _segments(runs, claims)
    of_file = claims.inode[claim] != 0
    pair_segment, pair_inode = _distinct(segment[of_file], claims.inode[claim[of_file]])
    owners = np.bincount(pair_segment, minlength=len(rank))
    only = np.zeros(len(rank), np.uint64)
    only[pair_segment] = pair_inode

    inside = np.flatnonzero(run >= 0)
    klass = _OWNER_OF_RANK[rank[inside]]
    begins = np.ones(len(inside), np.bool_)
    begins[1:] = (
        (run[inside][1:] != run[inside][:-1])
        | (klass[1:] != klass[:-1])
        | (only[inside][1:] != only[inside][:-1])
        | (owners[inside][1:] > 1)
        | (owners[inside][:-1] > 1)
    )
    starts = np.flatnonzero(begins)
    ends = np.concatenate([starts[1:], np.array([len(inside)])])[: len(starts)]
    first = bounds[:-1][inside[starts]]
    # Claims belong to segments; a joined piece has those of its first one.
    piece_of_segment = np.full(len(rank), -1, np.int64)
    piece_of_segment[inside[starts]] = np.arange(len(starts))
    piece = piece_of_segment[pair_segment]
    kept = piece >= 0
    return Ownership(
        first,
        bounds[1:][inside[ends - 1]] - first,
        klass[starts],
        piece[kept].astype(np.uint32),
        pair_inode[kept],
    )


def _distinct(segment: I64, inode: U64) -> tuple[I64, U64]:
    """Return the pairs in order, each once: a file may hold a block at several places."""
    order = np.lexsort((inode, segment))
    segment, inode = segment[order], inode[order]
    new = np.ones(len(segment), np.bool_)
    new[1:] = (segment[1:] != segment[:-1]) | (inode[1:] != inode[:-1])
    return segment[new], inode[new]
