"""The arrival record: which pieces of a DMI have come. Pure bytes in, pure bytes out; FORMAT.md, section 3.

A record is a head, then batches appended one after another, each with its own digest. A batch is appended only after
the pieces it names are durable in the landing volume, so the record may lag the data and never leads it. A torn or damaged
tail ends the record at the last whole batch: the pieces it would have named are fetched again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from typing import Final
from uuid import UUID

import numpy as np
import xxhash
from numpy.typing import NDArray

from agent.contract.errors import RecordMalformed, VersionUnknown

MAGIC: Final = b"LANDARRV"
VERSION: Final = 1
BATCH_MAGIC: Final = 0x48435442
MAX_BATCH_ROWS: Final = 1 << 20

_HEAD: Final = struct.Struct("<8sHHIQ16s16s8x")  # magic, version, zero, zero, pieces, transfer, digest of the DMI's bytes, zeros
_BATCH: Final = struct.Struct("<IIQ16s")  # magic, rows, sequence number, digest of (rows, sequence, row bytes)
_ROW: Final = np.dtype([("piece", "<u4"), ("bits", "<u4")])
HEAD_BYTES: Final = _HEAD.size


class Arrived(IntFlag):
    """What is known of a piece on NAS 2."""

    UPDATE = 1  # its update data is durable in the landing volume
    DIFFERENTIAL = 2  # its differential data was received, or proved equal to the base here
    BASE_DIFFERS = 4  # the base here is not what the source says, and was not healed
    HEALED = 8  # the base here was not what the source says, and the source's was fetched


COMPLETE: Final = int(Arrived.UPDATE | Arrived.DIFFERENTIAL)
Bits = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class ArrivalRecord:
    """The state of every piece: ``bits`` has one Arrived per row of the DMI's pieces."""

    transfer: UUID
    dmi_digest: bytes
    bits: Bits
    valid_bytes: int  # length of the part that was read; what follows is torn and is to be cut off
    batches: int

    @property
    def complete(self) -> NDArray[np.bool_]:
        """Which pieces have both their update and their differential data."""
        asked = np.uint8(COMPLETE | Arrived.BASE_DIFFERS)
        return np.asarray((self.bits & asked) == COMPLETE, dtype=np.bool_)


def encode_head(transfer: UUID, dmi_digest: bytes, pieces: int) -> bytes:
    """Return the head of a new record."""
    return _HEAD.pack(MAGIC, VERSION, 0, 0, pieces, transfer.bytes, dmi_digest)


def encode_batch(sequence: int, pieces: NDArray[np.uint32], bits: NDArray[np.uint8]) -> bytes:
    """Return a batch: ``bits`` replace what was known of ``pieces``. ``sequence`` counts batches from 0."""
    rows = np.empty(len(pieces), dtype=_ROW)
    rows["piece"], rows["bits"] = pieces, bits
    raw = rows.tobytes()
    return _BATCH.pack(BATCH_MAGIC, len(rows), sequence, _digest(len(rows), sequence, raw)) + raw


def decode(raw: bytes | memoryview, *, transfer: UUID, dmi_digest: bytes, pieces: int) -> ArrivalRecord:
    """Return what the record says, up to its last whole batch; RecordMalformed if it is not the record of this DMI."""
    view = memoryview(raw).cast("B")
    if len(view) < HEAD_BYTES:
        raise RecordMalformed("the arrival record is shorter than its head")
    magic, version, *zeros, count, of_transfer, of_dmi = _HEAD.unpack_from(view)
    if magic != MAGIC or any(zeros) or any(view[HEAD_BYTES - 8 : HEAD_BYTES]):
        raise RecordMalformed("the arrival record does not begin as it must")
    if version != VERSION:
        raise VersionUnknown(f"the arrival record has format version {version}, this release reads {VERSION}")
    if of_transfer != transfer.bytes or of_dmi != dmi_digest or count != pieces:
        raise RecordMalformed("the arrival record belongs to another DMI")
    bits = np.zeros(pieces, dtype=np.uint8)
    at, sequence = HEAD_BYTES, 0
    while at + _BATCH.size <= len(view):
        batch_magic, rows, number, digest = _BATCH.unpack_from(view, at)
        end = at + _BATCH.size + rows * _ROW.itemsize
        if batch_magic != BATCH_MAGIC or number != sequence or not 0 < rows <= MAX_BATCH_ROWS or end > len(view):
            break
        body = view[at + _BATCH.size : end]
        if _digest(rows, number, body) != digest:
            break
        table = np.frombuffer(body, dtype=_ROW)
        if np.any(table["piece"] >= pieces) or np.any(table["bits"] > 15):
            break
        bits[table["piece"]] = table["bits"]
        at, sequence = end, sequence + 1
    return ArrivalRecord(transfer, dmi_digest, bits, at, sequence)


def _digest(rows: int, sequence: int, raw: bytes | memoryview) -> bytes:
    fold = xxhash.xxh3_128(struct.pack("<IQ", rows, sequence))
    fold.update(raw)
    return fold.digest()
