"""Runs of chunks that may differ between two generations, refined to the blocks of 4096 bytes that do differ, by reading both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.blockio.scatter import Stretch, read_runs
from agent.contract.dmi import HOLE
from agent.contract.identity import BLOCK_BYTES
from agent.volume import extents
from agent.volume.substrate import ChangedRuns

U64 = NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRuns:
    """Runs of chunks that may differ, ascending, disjoint; ``address``: the base's place in the differential volume, in chunks, or HOLE."""

    first: U64
    chunks: U64
    address: U64
    in_target: NDArray[np.bool_]


def refined(runs: ChunkRuns, chunk_blocks: int, base: Path, target: Path) -> ChangedRuns:
    """Return the blocks whose content differs. A block of zeros counts as a hole in base and target, mapped or not. DeviceFailed."""
    with Device.open_reading(base) as before, Device.open_reading(target) as after:
        first = runs.first * np.uint64(chunk_blocks)
        blocks = np.minimum(runs.chunks * np.uint64(chunk_blocks), np.uint64(before.size_blocks) - first)
        mapped = runs.address != np.uint64(HOLE)
        place = np.where(mapped, runs.address * np.uint64(chunk_blocks), np.uint64(HOLE))
        parts: list[tuple[U64, U64, NDArray[np.bool_]]] = []
        for old, new in ((before, after), (before, None), (None, after)):
            rows = (mapped == (old is not None)) & (runs.in_target == (new is not None))
            parts += _differing(old, new, first[rows], blocks[rows], place[rows])
    if not parts:
        none = np.zeros(0, np.uint64)
        return ChangedRuns(none, none, none, np.zeros(0, np.bool_))
    block, address, hole = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(block)
    return extents.merged(block[order], block[order] + np.uint64(1), address[order], hole[order])


def _differing(
    before: Device | None, after: Device | None, first: U64, blocks: U64, place: U64
) -> Iterator[tuple[U64, U64, NDArray[np.bool_]]]:
    """Yield (block, address of its pre-image, whether the target has a hole) of the blocks that differ. None: it has holes only there."""
    starts = np.cumsum(blocks, dtype=np.uint64) - blocks
    for position, old, new in _stretches(before, after, first, blocks):
        old_zero, new_zero = _zero(old, new), _zero(new, old)
        differs = np.flatnonzero(old_zero != new_zero if old is None or new is None else (old != new).any(axis=1))
        at = np.uint64(position) + differs.astype(np.uint64)
        run = np.searchsorted(starts, at, "right") - 1
        offset = at - starts[run]
        holes = old_zero[differs] | (place[run] == np.uint64(HOLE))
        yield first[run] + offset, np.where(holes, np.uint64(HOLE), place[run] + offset), new_zero[differs]


def _stretches(before: Device | None, after: Device | None, first: U64, blocks: U64) -> Iterator[tuple[int, U64 | None, U64 | None]]:
    """Yield (position in the concatenation of the runs, blocks of the base, of the target)."""
    if before is not None and after is not None:
        for old, new in zip(read_runs(before, first, blocks), read_runs(after, first, blocks), strict=True):
            yield old.position, _words(old), _words(new)
    elif before is not None:
        for old in read_runs(before, first, blocks):
            yield old.position, _words(old), None
    elif after is not None:
        for new in read_runs(after, first, blocks):
            yield new.position, None, _words(new)


def _zero(blocks: U64 | None, other: U64 | None) -> NDArray[np.bool_]:
    """Return which blocks are zeros: all of them, as many as the other has, where there is none."""
    if blocks is not None:
        return np.asarray(~blocks.any(axis=1), np.bool_)
    return np.ones(0 if other is None else len(other), np.bool_)


def _words(stretch: Stretch) -> U64:
    return np.frombuffer(stretch.data, np.uint64).reshape(-1, BLOCK_BYTES // 8)
