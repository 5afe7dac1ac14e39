"""The exception table of a classic snapshot: which chunks of the origin have their earlier content in the COW device, and where.

The COW device is the differential volume; its layout is the kernel's persistent exception store, version 1, all little-endian
(drivers/md/dm-snap-persistent.c, "on-disk structures"; Documentation/admin-guide/device-mapper/snapshot.rst):

    chunk 0             u32 magic 0x70416e53 ("SnAp"), u32 valid, u32 version, u32 chunk size in sectors of 512 bytes
    chunk 1             metadata area 0: a chunk full of (u64 old chunk, u64 new chunk), new chunk 0 ending the table
    then                as many chunks of data as an area has pairs, then the next area, and so on

The kernel writes past the page cache, the pair before the origin's write goes on, and zeroes an area before its first pair: so read with
O_DIRECT the table is whole up to the last write to the origin that has ended, while both go on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from agent.blockio.device import Device
from agent.contract.errors import DeviceFailed, GenerationInvalid, LayoutUnsupported, VersionUnknown
from agent.contract.identity import BLOCK_BYTES
from agent.volume.chunks import U64, ChunkRuns

_MAGIC: Final = 0x70416E53
_VERSION: Final = 1
_SECTOR_BYTES: Final = 512
_PAIR_BYTES: Final = 16
_MAX_CHUNK_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class CowTable:
    """Pairs of chunks by ``old``, ascending: the content of ``old`` as it was lies at ``new`` of the COW device."""

    chunk_blocks: int
    old: U64
    new: U64


def cow_bytes(changed_bytes: int, chunk_bytes: int) -> int:
    """Return the size of a COW device that has room for so many changed bytes in whole chunks: header, tables, data.

    For all bytes of an origin it is the most that LVM gives one (lib/metadata/snapshot_manip.c of lvm2).
    """
    pairs = -(-changed_bytes // chunk_bytes)
    areas = pairs // (chunk_bytes // _PAIR_BYTES) + 1  # when the last is full the kernel zeroes the next
    return (1 + areas + pairs) * chunk_bytes


def read_table(cow: Path, origin_bytes: int) -> CowTable:
    """Return the table of a COW device; every chunk in it lies inside its device, and none is named twice.

    GenerationInvalid for one that the kernel has given up, VersionUnknown, DeviceFailed for what is no table or a damaged one.
    """
    with Device.open_reading(cow) as device:
        header = np.frombuffer(device.read(0, 1), "<u4")
        magic, valid, version, sectors = (int(word) for word in header[:4])
        if magic != _MAGIC:
            raise _damaged(cow, f"it begins with {magic:#x}")
        if version != _VERSION:
            raise VersionUnknown(f"{cow} has an exception table of version {version}, this release knows {_VERSION}")
        if valid != 1:
            raise GenerationInvalid(f"the kernel has given up the snapshot on {cow}", cause=f"valid is {valid} in its header")
        chunk_bytes = sectors * _SECTOR_BYTES
        if chunk_bytes & (chunk_bytes - 1) or not BLOCK_BYTES <= chunk_bytes <= _MAX_CHUNK_BYTES:
            raise LayoutUnsupported(f"{cow} has chunks of {chunk_bytes} bytes", fix="Make snapshots with --chunksize 4k.")
        pairs = _pairs(device, chunk_bytes // BLOCK_BYTES)
        chunks = device.size_bytes // chunk_bytes
    order = np.argsort(pairs[:, 0], kind="stable")
    old, new = pairs[order, 0], pairs[order, 1]
    per_area = chunk_bytes // _PAIR_BYTES
    in_place = (new >= 2) & (new < chunks) & ((new - np.uint64(1)) % np.uint64(per_area + 1) != 0)
    if not in_place.all() or bool((old >= -(-origin_bytes // chunk_bytes)).any()):
        raise _damaged(cow, "a chunk of it is out of range")
    if len(np.unique(new)) != len(new) or bool((old[1:] == old[:-1]).any()):
        raise _damaged(cow, "a chunk is named twice")
    return CowTable(chunk_bytes // BLOCK_BYTES, old, new)


def runs_of(table: CowTable) -> ChunkRuns:
    """Return the table as runs in which both chunks ascend together."""
    one = np.uint64(1)
    goes_on = (table.old[1:] == table.old[:-1] + one) & (table.new[1:] == table.new[:-1] + one)
    heads = np.flatnonzero(np.concatenate((np.ones(min(1, len(table.old)), np.bool_), ~goes_on)))
    lengths = np.diff(np.append(heads, len(table.old))).astype(np.uint64)
    return ChunkRuns(table.old[heads], lengths, table.new[heads], np.ones(len(heads), np.bool_))


def _pairs(device: Device, chunk_blocks: int) -> U64:
    """Return (old, new) of every pair, area after area until one ends."""
    per_area = chunk_blocks * BLOCK_BYTES // _PAIR_BYTES
    found: list[U64] = []
    at = chunk_blocks
    while True:
        if at + chunk_blocks > device.size_blocks:
            raise _damaged(device.path, f"it ends before its table does, at block {at}")
        area = np.frombuffer(device.read(at, chunk_blocks), "<u8").astype(np.uint64).reshape(per_area, 2)
        ended = np.flatnonzero(area[:, 1] == 0)
        found.append(area[: ended[0]] if len(ended) else area)
        if len(ended):
            return np.concatenate(found)
        at += (per_area + 1) * chunk_blocks


def _damaged(cow: Path, why: str) -> DeviceFailed:
    return DeviceFailed(f"the exception table on {cow} cannot be believed", cause=why, fix="Check the disk below; drop this generation.")
