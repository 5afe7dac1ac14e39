"""Owners' runs to pieces: runs of one owner set, of at most 256 blocks, contiguous in the differential volume too. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import HOLE, MAX_PIECE_BLOCKS
from agent.differential.intervals import cut, row_at, runs_of, spans
from agent.differential.reader import Ownership
from agent.volume.substrate import ChangedRuns

U64 = NDArray[np.uint64]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """The pieces' columns as in dmi.Dmi, and which pieces hold blocks of which inode: ``claim_piece`` ascends."""

    op_block: U64
    diff_block: U64
    block_count: U32
    owner: U8
    target_hole: U8
    claim_piece: I64
    claim_inode: U64


def pieces_of(changed: ChangedRuns, ownership: Ownership) -> Pieces:
    """Return the pieces of the changed runs, as few as the rules allow: ascending, disjoint, covering exactly the changed runs."""
    runs = runs_of(changed.first, changed.blocks)
    owned = runs_of(ownership.first, ownership.blocks)
    parts = cut(runs, owned.first, owned.end)
    run, row = row_at(runs, parts.first), row_at(owned, parts.first)
    if bool(np.any(row < 0)):
        raise ValueError(f"block {int(parts.first[row < 0][0])} changed and is owned by nobody, not even as free")
    diff = changed.diff_block[run]
    hole = changed.target_hole[run].astype(np.uint8)
    diff = np.where(diff == np.uint64(HOLE), np.uint64(HOLE), diff + (parts.first - runs.first[run]))
    owner, owners = ownership.owner[row], _owner_sets(ownership)[row]

    same = np.zeros(len(parts), dtype=bool)
    follows = np.where(diff[:-1] == np.uint64(HOLE), np.uint64(HOLE), diff[:-1] + parts.blocks[:-1])
    same[1:] = (
        (parts.first[1:] == parts.end[:-1])
        & (diff[1:] == follows)
        & (hole[1:] == hole[:-1])
        & (owner[1:] == owner[:-1])
        & (owners[1:] == owners[:-1])
    )
    begin = np.flatnonzero(~same)
    first, diff, hole, owner, row = parts.first[begin], diff[begin], hole[begin], owner[begin], row[begin]
    length = (parts.end[np.append(begin[1:] - 1, len(parts) - 1)] - first if len(begin) else first).astype(np.int64)

    count = -(-length // MAX_PIECE_BLOCKS)
    whole = np.repeat(np.arange(len(first), dtype=np.int64), count)
    skip = (spans(np.zeros(len(first), np.int64), count) * MAX_PIECE_BLOCKS).astype(np.uint64)
    start = np.searchsorted(ownership.claim_run, np.arange(len(owned) + 1))
    claims = np.diff(start)[row[whole]]
    return Pieces(
        op_block=first[whole] + skip,
        diff_block=np.where(diff[whole] == np.uint64(HOLE), np.uint64(HOLE), diff[whole] + skip),
        block_count=np.minimum(length[whole] - skip.astype(np.int64), MAX_PIECE_BLOCKS).astype(np.uint32),
        owner=owner[whole],
        target_hole=hole[whole],
        claim_piece=np.repeat(np.arange(len(whole), dtype=np.int64), claims),
        claim_inode=ownership.claim_inode[spans(start[row[whole]].astype(np.int64), claims)],
    )


def needs_of(pieces: Pieces, inode: U64, wanted: NDArray[np.bool_]) -> tuple[U64, U32]:
    """Return ``need_start`` and ``need`` of files with the given inodes; a file that is not ``wanted`` needs nothing.

    Rows of a file ascend. An inode that stands twice (deleted and new) must be wanted at most once.
    """
    rows = np.flatnonzero(wanted)
    order = rows[np.argsort(inode[rows], kind="stable")]
    at = np.searchsorted(inode[order], pieces.claim_inode)
    at_row = np.minimum(at, max(len(order) - 1, 0))
    known = inode[order[at_row]] == pieces.claim_inode if len(order) else np.zeros(len(at), bool)
    file, piece = order[at_row[known]], pieces.claim_piece[known]
    by_file = np.lexsort((piece, file))
    file, piece = file[by_file], piece[by_file]
    once = np.append(True, (file[1:] != file[:-1]) | (piece[1:] != piece[:-1]))[: len(file)]
    file, piece = file[once], piece[once]
    counts = np.bincount(file, minlength=len(inode)) if len(file) else np.zeros(len(inode), np.int64)
    starts = np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts).astype(np.uint64)])
    return starts, piece.astype(np.uint32)


def _owner_sets(ownership: Ownership) -> I64:
    """Return a number for each run such that runs with equal numbers are claimed by the same inodes."""
    start = np.searchsorted(ownership.claim_run, np.arange(len(ownership.first) + 1))
    count = np.diff(start)
    number = np.zeros(len(ownership.first), dtype=np.int64)
    single = np.flatnonzero(count == 1)
    distinct, which = np.unique(ownership.claim_inode[start[single]], return_inverse=True)
    number[single] = which.reshape(-1) + 1
    sets: dict[bytes, int] = {}
    for row in np.flatnonzero(count > 1).tolist():
        key = np.unique(ownership.claim_inode[start[row] : start[row + 1]]).tobytes()
        number[row] = sets.setdefault(key, len(distinct) + 1 + len(sets))
    return number
