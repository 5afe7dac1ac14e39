"""Which blocks differ between two thin volumes of one pool, and where in the pool's data device the older ones lie.

What changed comes from ``thin_delta``, where the base lies from ``thin_dump`` (thin-provisioning-tools), both reading the same
metadata snapshot, which the kernel keeps unchanged while the pool goes on. A pool has room for one such snapshot, so it is
released whatever happens, and one that a crash left is released before the next is made. Both speak of chunks (chunks.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import numpy as np

from agent.contract.dmi import HOLE
from agent.contract.errors import CommandFailed, ProgramMissing
from agent.system.failpoint import failpoint
from agent.system.run import run
from agent.volume import mapper
from agent.volume.chunks import ChunkRuns

_TIME_LIMIT_S: Final = 600.0
_DIFFERS: Final = re.compile(rb'<(different|left_only|right_only) begin="(\d+)" length="(\d+)"')
_SINGLE: Final = re.compile(rb'<single_mapping origin_block="(\d+)" data_block="(\d+)"')
_RANGE: Final = re.compile(rb'<range_mapping origin_begin="(\d+)" data_begin="(\d+)" length="(\d+)"')


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
