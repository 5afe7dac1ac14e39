"""Runs of chunks that may differ between two generations, refined to the blocks of 4096 bytes that do differ, by reading both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.contract.dmi import HOLE
from agent.contract.identity import BLOCK_BYTES
from agent.volume import extents
from agent.volume.substrate import ChangedRuns

U64 = NDArray[np.uint64]

_READ_BLOCKS: Final = 1024


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRuns:
    """Runs of chunks that may differ, ascending, disjoint; ``address``: the base's place in the differential volume, in chunks, or HOLE."""

    first: U64
    chunks: U64
    address: U64
    in_target: NDArray[np.bool_]


def refined(runs: ChunkRuns, chunk_blocks: int, base: Path, target: Path) -> ChangedRuns:
    """Return the blocks whose content differs. A block of zeros counts as a hole in base and target, mapped or not. DeviceFailed."""
    parts: list[tuple[U64, U64, NDArray[np.bool_]]] = []
    with Device.open_reading(base) as before, Device.open_reading(target) as after:
        for first, chunks, address, in_target in zip(
            runs.first.tolist(), runs.chunks.tolist(), runs.address.tolist(), runs.in_target.tolist(), strict=True
        ):
            start, end = first * chunk_blocks, min((first + chunks) * chunk_blocks, before.size_blocks)
            for at in range(start, end, _READ_BLOCKS):
                count = min(_READ_BLOCKS, end - at)
                old = None if address == HOLE else _blocks(before, at, count)
                new = _blocks(after, at, count) if in_target else None
                place = HOLE if address == HOLE else address * chunk_blocks + at - start
                parts.append(_compared(at, count, place, old, new))
    if not parts:
        none = np.zeros(0, np.uint64)
        return ChangedRuns(none, none, none, np.zeros(0, np.bool_))
    block, place_of, hole = (np.concatenate(column) for column in zip(*parts, strict=True))
    return extents.merged(block, block + np.uint64(1), place_of, hole)


def _compared(
    at: int, count: int, place: int, old: NDArray[np.uint64] | None, new: NDArray[np.uint64] | None
) -> tuple[U64, U64, NDArray[np.bool_]]:
    """Return (block, address of its pre-image, whether the target has a hole) of the blocks that differ."""
    old_zero, new_zero = _zero(old, count), _zero(new, count)
    differs: NDArray[np.bool_] = old_zero != new_zero
    if old is not None and new is not None:
        differs = np.asarray((old != new).any(axis=1), np.bool_)
    offset = np.flatnonzero(differs).astype(np.uint64)
    places = np.full(len(offset), HOLE, np.uint64) if place == HOLE else np.uint64(place) + offset
    return np.uint64(at) + offset, np.where(old_zero[differs], np.uint64(HOLE), places), new_zero[differs]


def _zero(blocks: NDArray[np.uint64] | None, count: int) -> NDArray[np.bool_]:
    return np.ones(count, np.bool_) if blocks is None else np.asarray(~blocks.any(axis=1), np.bool_)


def _blocks(device: Device, first: int, blocks: int) -> NDArray[np.uint64]:
    return np.frombuffer(device.read(first, blocks), np.uint64).reshape(blocks, BLOCK_BYTES // 8)
