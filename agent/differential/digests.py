"""Digest tables: the digest of every block of a generation, 8 bytes each, so that no block is read twice to know its digest.

A table is the base's with the changed blocks' digests put in. The file is the table (little-endian u64 per block) and the xxh3-128 of it
(16 bytes). It is a cache: one that is not there or does not read back is computed anew from the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from agent.blockio.device import Device
from agent.blockio.scatter import digest_runs
from agent.contract.digest import ZERO_BLOCK, BlockDigests
from agent.contract.errors import VerifyFailed
from agent.contract.identity import BLOCK_BYTES
from agent.differential.intervals import Runs, intersected, runs_of
from agent.system.files import write_durably
from agent.volume.substrate import ChangedRuns

_TRAILER_BYTES: Final = 16
_CHUNK_BLOCKS: Final = 1 << 20


def load(path: Path, blocks: int) -> BlockDigests | None:
    """Return the stored table of a volume of ``blocks`` blocks (mapped, not read); None if there is none that is whole."""
    try:
        if path.stat().st_size != blocks * 8 + _TRAILER_BYTES:
            return None
        trailer = np.memmap(path, dtype=np.uint8, mode="r", offset=blocks * 8)
        table: BlockDigests = np.memmap(path, dtype="<u8", mode="r", shape=(blocks,)).view(np.ndarray)
    except (OSError, ValueError):
        return None
    fold = xxhash.xxh3_128()
    for at in range(0, blocks, _CHUNK_BLOCKS):
        fold.update(table[at : at + _CHUNK_BLOCKS].tobytes())
    return table if fold.digest() == trailer.tobytes() else None


def entries(path: Path, first: int, count: int) -> BlockDigests:
    """Return ``count`` entries of a stored table from block ``first`` on; the caller has proved the table whole by ``load``."""
    table: BlockDigests = np.fromfile(path, dtype="<u8", count=count, offset=first * 8)
    return table


def computed(path: Path, device: Path, volume_bytes: int) -> BlockDigests:
    """Return the table of the generation on ``device``, read in full and stored durably at ``path``."""
    blocks = -(-volume_bytes // BLOCK_BYTES)
    whole = ChangedRuns(np.zeros(1, np.uint64), np.array([blocks], np.uint64), np.zeros(1, np.uint64), np.zeros(1, np.bool_))
    return derived(path, None, device, volume_bytes, whole)


def derived(path: Path, base: BlockDigests | None, device: Path, volume_bytes: int, changed: ChangedRuns) -> BlockDigests:
    """Return the table of the generation on ``device`` that differs from ``base`` in the ``changed`` runs, stored durably at ``path``.

    ``base`` None: all blocks that did not change are holes. Holes among the changed runs are not read. If we die here there is no table,
    or all of it. DeviceFailed for a block that cannot be read; VerifyFailed.
    """
    blocks = -(-volume_bytes // BLOCK_BYTES)
    with Device.open_reading(device) as source:
        write_durably(path, _patched(base, source, blocks, changed))
    table = load(path, blocks)
    if table is None:
        raise VerifyFailed(f"the digest table {path} does not read back as it was written")
    return table


def lengthened(path: Path, blocks: int, more: int) -> None:
    """Let a stored table of ``blocks`` blocks be one of a volume that has ``more`` blocks of zeros at its end, in one durable step."""
    table = load(path, blocks)
    if table is None:
        return

    def parts() -> Iterator[bytes]:
        fold = xxhash.xxh3_128()
        for source, length in ((table, blocks), (table_of_zeros(more), more)):
            for at in range(0, length, _CHUNK_BLOCKS):
                part = np.asarray(source[at : at + _CHUNK_BLOCKS], dtype="<u8").tobytes()
                fold.update(part)
                yield part
        yield fold.digest()

    write_durably(path, parts())


def table_of_zeros(blocks: int) -> BlockDigests:
    """Return the table of g0: all holes."""
    return np.broadcast_to(np.uint64(ZERO_BLOCK), (blocks,))


def _patched(base: BlockDigests | None, device: Device, blocks: int, changed: ChangedRuns) -> Iterator[bytes]:
    runs = runs_of(changed.first, changed.blocks)
    fold = xxhash.xxh3_128()
    for at in range(0, blocks, _CHUNK_BLOCKS):
        end = min(at + _CHUNK_BLOCKS, blocks)
        chunk = np.full(end - at, ZERO_BLOCK, dtype="<u8") if base is None else np.array(base[at:end], dtype="<u8")
        here = intersected(runs, Runs(np.array([at], np.uint64), np.array([end], np.uint64)))
        holes = changed.target_hole[np.searchsorted(runs.first, here.first, side="right") - 1]
        fresh = digest_runs(device, here.first, here.blocks, holes=holes)
        position = 0
        for first, count in zip((here.first - np.uint64(at)).tolist(), here.blocks.tolist(), strict=True):
            chunk[first : first + count] = fresh[position : position + count]
            position += count
        part = chunk.tobytes()
        fold.update(part)
        yield part
    yield fold.digest()
