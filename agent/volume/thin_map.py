"""Which blocks differ between two thin volumes of one pool, and where in the pool's data device the older ones lie.

What changed comes from ``thin_delta``, where the base lies from ``thin_dump`` (thin-provisioning-tools), both reading the same
metadata snapshot, which the kernel keeps unchanged while the pool goes on. A pool has room for one such snapshot, so it is
released whatever happens, and one that a crash left is released before the next is made. Both speak of chunks; ``refined`` reads
both volumes and keeps the blocks that differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.blockio.device import Device
from agent.contract.dmi import HOLE
from agent.contract.errors import CommandFailed, ProgramMissing
from agent.contract.identity import BLOCK_BYTES
from agent.system.failpoint import failpoint
from agent.system.run import run
from agent.volume import extents, mapper
from agent.volume.substrate import ChangedRuns

U64 = NDArray[np.uint64]

_READ_BLOCKS: Final = 1024
_TIME_LIMIT_S: Final = 600.0
_DIFFERS: Final = re.compile(rb'<(different|left_only|right_only) begin="(\d+)" length="(\d+)"')
_SINGLE: Final = re.compile(rb'<single_mapping origin_block="(\d+)" data_block="(\d+)"')
_RANGE: Final = re.compile(rb'<range_mapping origin_begin="(\d+)" data_begin="(\d+)" length="(\d+)"')


@dataclass(frozen=True, slots=True, eq=False)
class ChunkRuns:
    """Runs of chunks that may differ, ascending, disjoint; ``address``: the base's place in the data device, in chunks, or HOLE."""

    first: U64
    chunks: U64
    address: U64
    in_target: NDArray[np.bool_]


def differing_chunks(pool: Path, metadata: Path, base_id: int, target_id: int) -> ChunkRuns:
    """Return the runs of chunks whose mappings differ. CommandFailed; ProgramMissing without thin-provisioning-tools.

    If we die here the metadata snapshot stays reserved, until the next call or ``release_metadata``.
    """
    with _metadata_snapshot(pool):
        failpoint("thin_map.reserved")
        delta = _tool(["thin_delta", "--metadata-snap", "--thin1", str(base_id), "--thin2", str(target_id), str(metadata)])
        dump = _tool(["thin_dump", "--metadata-snap", "--dev-id", str(base_id), str(metadata)])
    found = sorted((int(begin), int(length), kind) for kind, begin, length in _DIFFERS.findall(delta))
    mapped = sorted(
        [(int(a), int(b), 1) for a, b in _SINGLE.findall(dump)] + [(int(a), int(b), int(n)) for a, b, n in _RANGE.findall(dump)]
    )
    return _placed(found, mapped)


def release_metadata(pool: Path) -> None:
    """Release a metadata snapshot that a crash left reserved, if there is one."""
    if mapper.pool_status(pool).held:
        mapper.message(pool, "release_metadata_snap")


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


def _placed(found: list[tuple[int, int, bytes]], mapped: list[tuple[int, int, int]]) -> ChunkRuns:
    """Cut the runs that differ where the base's mappings begin and end, and give each its place."""
    rows: list[tuple[int, int, int, bool]] = []
    row = 0
    for begin, length, kind in found:
        at, end, in_target = begin, begin + length, kind != b"left_only"
        while at < end:
            while row < len(mapped) and mapped[row][0] + mapped[row][2] <= at:
                row += 1
            origin, data, count = mapped[row] if row < len(mapped) else (end, 0, 0)
            if origin > at:
                stop = min(end, origin)
                rows.append((at, stop - at, int(HOLE), in_target))
            else:
                stop = min(end, origin + count)
                rows.append((at, stop - at, data + at - origin, in_target))
            at = stop
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    first, chunks, address = (np.array(column, np.uint64) for column in columns[:3])
    return ChunkRuns(first, chunks, address, np.array(columns[3], np.bool_))


@contextmanager
def _metadata_snapshot(pool: Path) -> Iterator[None]:
    release_metadata(pool)
    mapper.message(pool, "reserve_metadata_snap")
    try:
        yield
    finally:
        with suppress(CommandFailed):  # released before the next one is made, if not now
            mapper.message(pool, "release_metadata_snap")


def _tool(argv: list[str]) -> bytes:
    try:
        return run(argv, timeout_s=_TIME_LIMIT_S).stdout
    except ProgramMissing as error:
        raise ProgramMissing(f"{argv[0]} is not installed", fix="Install thin-provisioning-tools.") from error
