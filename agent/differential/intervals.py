"""Runs of blocks as sorted numpy columns: cutting, covering, intersecting. Pure; nothing here knows a filesystem.

A run is ``first`` and ``end`` (one past its last block), both uint64. "Disjoint" columns ascend and do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Runs in order of address; ``first`` and ``end`` have the same length."""

    first: U64
    end: U64

    @property
    def blocks(self) -> U64:
        """Length of each run."""
        return self.end - self.first

    def __len__(self) -> int:
        return len(self.first)


def runs_of(first: NDArray[np.generic], blocks: NDArray[np.generic]) -> Runs:
    """Return runs given by first block and length, in the order given."""
    starts = np.asarray(first).astype(np.uint64)
    return Runs(starts, starts + np.asarray(blocks).astype(np.uint64))


def united(*parts: Runs) -> Runs:
    """Return the disjoint union of runs in any order; touching ones are joined."""
    first = np.concatenate([np.zeros(0, np.uint64), *(part.first for part in parts)])
    end = np.concatenate([np.zeros(0, np.uint64), *(part.end for part in parts)])
    some = end > first
    first, end = first[some], end[some]
    if not len(first):
        return Runs(first, end)
    order = np.argsort(first, kind="stable")
    first, end = first[order], end[order]
    furthest = np.maximum.accumulate(end)
    new = np.ones(len(first), dtype=bool)
    new[1:] = first[1:] > furthest[:-1]
    last = np.append(np.flatnonzero(new)[1:] - 1, len(first) - 1)
    return Runs(first[new], furthest[last])


def runs_of_blocks(blocks: U64) -> Runs:
    """Return the disjoint runs that single blocks, in any order, make."""
    distinct = np.unique(blocks.astype(np.uint64))
    if not len(distinct):
        return Runs(distinct, distinct)
    breaks = np.flatnonzero(np.diff(distinct) != 1)
    one = np.uint64(1)
    return Runs(distinct[np.append(0, breaks + 1)], distinct[np.append(breaks, len(distinct) - 1)] + one)


def cut(runs: Runs, *points: U64) -> Runs:
    """Return disjoint ``runs`` cut at every point that lies inside one."""
    if not len(runs):
        return runs
    at = np.unique(np.concatenate([np.zeros(0, np.uint64), *points]))
    row = np.searchsorted(runs.first, at, side="right") - 1
    inside = (row >= 0) & (at > runs.first[row]) & (at < runs.end[row])
    first = np.sort(np.concatenate([runs.first, at[inside]]))
    limit = runs.end[np.searchsorted(runs.first, first, side="right") - 1]
    return Runs(first, np.minimum(np.append(first[1:], limit[-1]), limit))


def row_at(runs: Runs, blocks: U64) -> Rows:
    """Return for each block the row of the disjoint run that holds it, -1 for none."""
    if not len(runs):
        return np.full(len(blocks), -1, dtype=np.int64)
    row = np.searchsorted(runs.first, blocks, side="right").astype(np.int64) - 1
    held = (row >= 0) & (blocks < runs.end[row])
    return np.where(held, row, -1)


def intersected(left: Runs, right: Runs) -> Runs:
    """Return what two disjoint columns of runs have in common, cut at the borders of both."""
    pieces = cut(left, right.first, right.end)
    common = row_at(right, pieces.first) >= 0
    return Runs(pieces.first[common], pieces.end[common])


def expanded(runs: Runs) -> U64:
    """Return every block of the runs, in their order."""
    blocks = runs.blocks.astype(np.int64)
    total = int(blocks.sum())
    offset = np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return np.repeat(runs.first, blocks) + offset.astype(np.uint64)


def spans(starts: Rows, counts: Rows) -> Rows:
    """Return ``starts[i], starts[i] + 1, ...`` for ``counts[i]`` rows of each i, one after the other."""
    total = int(counts.sum())
    return np.repeat(starts, counts) + np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
