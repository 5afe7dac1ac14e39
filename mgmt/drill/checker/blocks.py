"""The blocks in which two frozen images differ, and own readers of the DMI's piece columns and of the arrival record."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mgmt.drill.checker.trees import data_ranges

BLOCK = 4096
_STRIDE = 8 << 20
Blocks = NDArray[np.int64]

_UPDATE, _DIFFERENTIAL, _BASE_DIFFERS = 1, 2, 4


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """The DMI's pieces and what the arrival record says of each."""

    first: Blocks
    count: Blocks
    arrived: NDArray[np.bool_]  # update and differential data are there, and the base was found equal or healed

    def piece_of(self, blocks: Blocks) -> Blocks:
        """Return the row of the piece that holds each block, -1 where none does."""
        if not len(self.first):
            return np.full(len(blocks), -1, dtype=np.int64)
        row = np.searchsorted(self.first, blocks, side="right") - 1
        inside = (row >= 0) & (blocks < self.first[row] + self.count[row])
        return np.where(inside, row, -1)


def differing_blocks(base: Path, target: Path) -> Blocks:
    """Return the 4096-byte blocks in which two images differ, ascending; holes and what lies past the end are zeros."""
    found: list[Blocks] = [np.zeros(0, np.int64)]
    with base.open("rb", buffering=0) as first, target.open("rb", buffering=0) as second:
        sizes = [os.lseek(file.fileno(), 0, os.SEEK_END) for file in (first, second)]
        ranges = sorted([*data_ranges(first.fileno(), sizes[0]), *data_ranges(second.fileno(), sizes[1])])
        done = 0
        for start, end in ranges:
            for at in range(max(start, done), end, _STRIDE):
                length = min(_STRIDE, end - at)
                found.append(_compare(_read(first.fileno(), at, length), _read(second.fileno(), at, length), at // BLOCK))
            done = max(done, end)
    return np.concatenate(found)


def _compare(left: bytes, right: bytes, first_block: int) -> Blocks:
    if left == right:
        return np.zeros(0, np.int64)
    words = [np.frombuffer(side, dtype=np.uint64).reshape(-1, BLOCK // 8) for side in (left, right)]
    return np.flatnonzero((words[0] != words[1]).any(axis=1)).astype(np.int64) + first_block


def _read(fd: int, at: int, length: int) -> bytes:
    data = b""
    while len(data) < length and (part := os.pread(fd, length - len(data), at + len(data))):
        data += part
    padded = -(-length // BLOCK) * BLOCK
    return data if len(data) == padded else data.ljust(padded, b"\0")


def read_arrival(dmi: Path, record: Path) -> Arrival:
    """Return pieces and their arrival; ValueError if either file is not what FORMAT.md says, or they are not of one transfer."""
    raw = dmi.read_bytes()
    columns = _sections(raw)
    first, count = columns["op_block"].view("<u8").astype(np.int64), columns["block_count"].view("<u4").astype(np.int64)
    if len(first) != len(count) or np.any(first[1:] < first[:-1] + count[:-1]):
        raise ValueError("the DMI's pieces overlap or are out of order")
    bits = _arrival_bits(record.read_bytes(), len(first), _identity(raw))
    asked = _UPDATE | _DIFFERENTIAL | _BASE_DIFFERS
    return Arrival(first, count, (bits & asked) == (_UPDATE | _DIFFERENTIAL))


def _sections(raw: bytes) -> dict[str, NDArray[np.uint8]]:
    magic, version, _, total, length = struct.unpack_from("<8sHHIQ", raw)
    if magic != b"LANDFALL" or version != 1 or length != len(raw) or raw[-16:] != b"LANDFEND" + struct.pack("<Q", length):
        raise ValueError("not a whole DMI of version 1")
    columns: dict[str, NDArray[np.uint8]] = {}
    for row in range(total):
        name, offset, rows, width, _ = struct.unpack_from("<24sQQQ16s", raw, 24 + 64 * row)
        columns[name.rstrip(b"\0").decode("ascii")] = np.frombuffer(raw, np.uint8, rows * width, offset)
    return columns


def _identity(raw: bytes) -> bytes:
    sections: int = struct.unpack_from("<I", raw, 12)[0]
    at = 24 + 64 * sections
    return raw[at : at + 16]


def _arrival_bits(raw: bytes, pieces: int, identity: bytes) -> NDArray[Any]:
    """Return the last bits of each piece. A batch's digest needs a library; its sequence, length and rows are checked instead."""
    magic, version, zero, zeros, count, _, of_dmi = struct.unpack_from("<8sHHIQ16s16s", raw)
    if magic != b"LANDARRV" or version != 1 or zero or zeros:
        raise ValueError("not an arrival record of version 1")
    if count != pieces or of_dmi != identity:
        raise ValueError("the arrival record belongs to another DMI")
    bits, at, sequence = np.zeros(pieces, np.uint8), 64, 0
    while at + 32 <= len(raw):
        mark, rows, number, _ = struct.unpack_from("<4sIQ16s", raw, at)
        if mark != b"BTCH" or number != sequence or at + 32 + 8 * rows > len(raw):
            break
        table = np.frombuffer(raw, "<u4", 2 * rows, at + 32).reshape(-1, 2)
        if np.any(table[:, 0] >= pieces) or np.any(table[:, 1] == 0) or np.any(table[:, 1] > 15):
            break
        # numpy keeps the last of repeated indices, as the record wants it.
        bits[table[:, 0]] = table[:, 1]
        at, sequence = at + 32 + 8 * rows, sequence + 1
    return bits
