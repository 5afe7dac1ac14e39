"""Which blocks differ between two images that share their unchanged blocks: a difference of their extent maps.

On a reflink filesystem a shared block has one physical address, and a block that was written since the clone has another one.
So blocks with equal addresses (or holes in both) are equal, and all others may differ. Arithmetic on columns, no loop over extents.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import HOLE
from agent.contract.errors import LayoutUnsupported
from agent.contract.identity import BLOCK_BYTES
from agent.system.block import BtrfsChunk, ExtentFlag, ExtentMap
from agent.volume.substrate import ChangedRuns

U64 = NDArray[np.uint64]

_ADDRESS_UNKNOWN: Final = (
    ExtentFlag.UNKNOWN
    | ExtentFlag.DELALLOC
    | ExtentFlag.ENCODED
    | ExtentFlag.DATA_ENCRYPTED
    | ExtentFlag.NOT_ALIGNED
    | ExtentFlag.DATA_INLINE
    | ExtentFlag.DATA_TAIL
)
_BTRFS_SPREAD: Final = 0x8 | 0x40 | 0x80 | 0x100  # RAID0, RAID10, RAID5, RAID6: a chunk is not one linear range of a device


def changed_runs(base: ExtentMap, target: ExtentMap) -> ChangedRuns:
    """Return the runs in which the two maps have different addresses, in blocks of 4096 bytes.

    Unwritten extents read as zeros and count as holes. Inside a run the base's addresses ascend with the blocks, and the target has data
    throughout or nowhere. LayoutUnsupported where an extent has no plain address (compressed, inline, unaligned).
    """
    first, end, before, after = _differing(base, target)
    return merged(first, end, before, after == np.uint64(HOLE))


def changed_ranges(one: ExtentMap, other: ExtentMap) -> tuple[U64, U64]:
    """Return (first, blocks) of the ranges in which two maps have different addresses, neighbours joined."""
    first, end, _, _ = _differing(one, other)
    heads = np.concatenate((np.ones(min(1, len(first)), np.bool_), first[1:] != end[:-1]))
    tails = np.concatenate((heads[1:], np.ones(min(1, len(first)), np.bool_)))
    return first[heads], end[tails] - first[heads]


def on_device(runs: ChangedRuns, chunks: tuple[BtrfsChunk, ...]) -> ChangedRuns:
    """Return the runs with ``diff_block`` turned from btrfs's address space into blocks of its only device.

    A run whose pre-image crosses the border of two chunks is split there. LayoutUnsupported for a pool of several devices or striped data.
    """
    if any(chunk.type & _BTRFS_SPREAD or len({device for device, _ in chunk.stripes}) != 1 for chunk in chunks):
        raise LayoutUnsupported("the pool's btrfs has several devices or striped data", fix="Use a pool on one device.")
    if len({chunk.stripes[0][0] for chunk in chunks}) > 1:
        raise LayoutUnsupported("the pool's btrfs has several devices", fix="Use a pool on one device.")
    hole = runs.diff_block == np.uint64(HOLE)
    starts = np.array([chunk.logical for chunk in chunks], np.uint64) // np.uint64(BLOCK_BYTES)
    lengths = np.array([chunk.length for chunk in chunks], np.uint64) // np.uint64(BLOCK_BYTES)
    places = np.array([chunk.stripes[0][1] for chunk in chunks], np.uint64) // np.uint64(BLOCK_BYTES)

    last = np.where(hole, runs.diff_block, runs.diff_block + runs.blocks - np.uint64(1))
    low = np.searchsorted(starts, runs.diff_block, "right") - 1
    high = np.searchsorted(starts, last, "right") - 1
    parts = np.where(hole, 1, high - low + 1)
    row = np.repeat(np.arange(len(parts)), parts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(parts) - parts, parts)
    chunk = low[row] + nth
    at, stop = runs.diff_block[row], last[row] + np.uint64(1)
    chunk_start, is_hole = starts[np.maximum(chunk, 0)], hole[row]
    begin: U64 = np.where(is_hole, at, np.maximum(at, chunk_start))
    end: U64 = np.where(is_hole, at + runs.blocks[row], np.minimum(stop, chunk_start + lengths[np.maximum(chunk, 0)]))
    covered = np.zeros(len(parts), np.uint64)
    np.add.at(covered, row, end - begin)
    if bool(np.any((low < 0) & ~hole)) or bool(np.any(covered != runs.blocks)):
        raise LayoutUnsupported("an extent lies outside btrfs's chunks", cause="the pool is being balanced", fix="Wait for the balance.")
    physical: U64 = np.where(is_hole, np.uint64(HOLE), begin - chunk_start + places[np.maximum(chunk, 0)])
    return ChangedRuns(runs.first[row] + (begin - at), end - begin, physical, runs.target_hole[row])


def _differing(base: ExtentMap, target: ExtentMap) -> tuple[U64, U64, U64, U64]:
    """Return (first, end, address in the base, address in the target) of the stretches whose addresses differ."""
    base_first, base_end, base_at = _written(base)
    target_first, target_end, target_at = _written(target)
    cuts = np.unique(np.concatenate((base_first, base_end, target_first, target_end)))
    first, end = cuts[:-1], cuts[1:]
    before = _addresses(first, base_first, base_end, base_at)
    after = _addresses(first, target_first, target_end, target_at)
    differs = before != after
    return first[differs], end[differs], before[differs], after[differs]


def _written(extents: ExtentMap) -> tuple[U64, U64, U64]:
    """Return (first, end, address) in blocks of what was written."""
    written = (extents.flags & np.uint32(ExtentFlag.UNWRITTEN)) == 0
    odd = (extents.logical | extents.physical | extents.length) % np.uint64(BLOCK_BYTES) != 0
    if bool(np.any(written & (odd | ((extents.flags & np.uint32(_ADDRESS_UNKNOWN)) != 0)))):
        raise LayoutUnsupported("an image has extents without a plain address", fix="Use a pool without compression, blocks of 4096 bytes.")
    first = extents.logical[written] // np.uint64(BLOCK_BYTES)
    return first, first + extents.length[written] // np.uint64(BLOCK_BYTES), extents.physical[written] // np.uint64(BLOCK_BYTES)


def _addresses(at: U64, first: U64, end: U64, address: U64) -> U64:
    """Return the address of each block of ``at``, HOLE where no extent has it."""
    if len(first) == 0:
        return np.full(len(at), HOLE, np.uint64)
    row = np.searchsorted(first, at, "right") - 1
    inside = (row >= 0) & (at < end[row])
    return np.where(inside, address[row] + (at - first[row]), np.uint64(HOLE))


def merged(first: U64, end: U64, address: U64, target_hole: NDArray[np.bool_]) -> ChangedRuns:
    """Return the runs with neighbours joined where blocks, addresses and the target's holes go on."""
    blocks = end - first
    follows = first[1:] == end[:-1]
    both_holes = (address[1:] == np.uint64(HOLE)) & (address[:-1] == np.uint64(HOLE))
    goes_on = (address[:-1] != np.uint64(HOLE)) & (address[1:] == address[:-1] + blocks[:-1])
    joined = follows & (both_holes | goes_on) & (target_hole[1:] == target_hole[:-1])
    heads = np.flatnonzero(np.concatenate((np.ones(min(1, len(first)), np.bool_), ~joined)))
    total = np.add.reduceat(blocks, heads) if len(heads) else blocks
    return ChangedRuns(first[heads], total.astype(np.uint64), address[heads], target_hole[heads])
