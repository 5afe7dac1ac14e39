"""The arrival record ends at its last whole batch, whatever happened to the rest (FAULTS.md F10)."""

from __future__ import annotations

from uuid import UUID

import numpy as np
import pytest

from agent.contract.arrival import HEAD_BYTES, ArrivalRecord, Arrived, decode, encode_batch, encode_head
from agent.contract.errors import LandfallError, RecordMalformed, VersionUnknown

TRANSFER = UUID(int=7)
DIGEST = bytes(range(16))
BATCHES = (
    encode_batch(0, np.array([3, 1], np.uint32), np.array([3, 1], np.uint8)),
    encode_batch(1, np.array([1, 2], np.uint32), np.array([3, 3], np.uint8)),
    encode_batch(2, np.array([0], np.uint32), np.array([7], np.uint8)),
)
RAW = encode_head(TRANSFER, DIGEST, 5) + b"".join(BATCHES)


def read(raw: bytes) -> ArrivalRecord:
    return decode(raw, transfer=TRANSFER, dmi_digest=DIGEST, pieces=5)


def test_later_rows_replace_earlier_ones() -> None:
    record = read(RAW)
    assert record.bits.tolist() == [7, 3, 3, 3, 0]
    assert record.complete.tolist() == [False, True, True, True, False]  # a base that differs is not complete
    assert (record.valid_bytes, record.batches) == (len(RAW), 3)


def test_F10_cut_at_every_byte_ends_at_the_last_whole_batch() -> None:
    ends = np.cumsum([HEAD_BYTES, *map(len, BATCHES)]).tolist()
    for length in range(HEAD_BYTES, len(RAW) + 1):
        record = read(RAW[:length])
        assert record.valid_bytes == max(end for end in ends if end <= length)
        assert record.batches == ends.index(record.valid_bytes)
    for length in range(HEAD_BYTES):
        with pytest.raises(RecordMalformed):
            read(RAW[:length])


def test_F10_every_byte_flipped_never_adds_an_arrival() -> None:
    whole = read(RAW)
    for at in range(len(RAW)):
        hurt = bytearray(RAW)
        hurt[at] ^= 0x10
        try:
            record = read(bytes(hurt))
        except LandfallError:
            assert at < HEAD_BYTES
            continue
        assert at >= HEAD_BYTES
        assert record.batches < whole.batches
        assert record.valid_bytes <= at


def test_a_record_of_another_dmi_is_refused() -> None:
    for raw in (encode_head(UUID(int=8), DIGEST, 5), encode_head(TRANSFER, bytes(16), 5), encode_head(TRANSFER, DIGEST, 6)):
        with pytest.raises(RecordMalformed):
            read(raw)


def test_B12_a_newer_version_is_named_as_such() -> None:
    raw = bytearray(RAW)
    raw[8] = 2
    with pytest.raises(VersionUnknown):
        read(bytes(raw))


def test_a_row_beyond_the_pieces_ends_the_record() -> None:
    raw = encode_head(TRANSFER, DIGEST, 5) + encode_batch(0, np.array([5], np.uint32), np.array([int(Arrived.UPDATE)], np.uint8))
    assert read(raw).batches == 0
