"""Frames: what was written is read, and nothing else is."""

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from uuid import UUID

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from agent.contract import file_frames, frames
from agent.contract.errors import BaseMismatch, LandfallError, ProtocolViolated, VersionUnknown
from agent.contract.file_frames import FileItem
from agent.contract.frames import Frame, FrameType, Hello, Welcome
from agent.contract.messages import Differential

HELLO = Hello(1, UUID(int=7), "token", 0, 2, Differential.SEND, 1000, "ab" * 16)
GREETING = bytes(frames.encode_hello(HELLO)[1])
ROWS = np.array([3, 1, 70000], dtype=np.uint32)
PARTS = np.array([1, 3, 2], dtype=np.uint8)
DATA = bytes(range(256)) * 16


def small_stream() -> list[list[frames.Buffer]]:
    return [
        frames.encode_hello(HELLO),
        frames.encode_welcome(Welcome(dmi_wanted=True, committed=False)),
        frames.encode(FrameType.DMI, [b"not really a dmi"]),
        frames.encode(FrameType.DMI_STORED, [bytes(range(16))]),
        frames.encode(FrameType.STATE, [b"\0\1\3"]),
        frames.encode_batch(ROWS, PARTS, 300, DATA[:300], compressed=False),
        frames.encode_batch(ROWS, PARTS, 4096, zstandard.ZstdCompressor(level=1).compress(DATA), compressed=True),
        frames.encode(FrameType.HEARTBEAT),
        frames.encode_progress(2**40),
        *frames.encode_need(ROWS),
        frames.encode(FrameType.FINISH),
        frames.encode(FrameType.COMMITTED),
        frames.encode_error(BaseMismatch("not the base", cause="counter")),
        file_frames.encode_item(FileItem(0, 0, True, 0o100644, 0, 0, -1, 0, 0, 5, 0, "", (("dXNlci5h", "YQ=="),))),
        file_frames.encode_content(2**40, b"part of a file"),
        frames.encode(FrameType.WHOLE),
        file_frames.encode_refusal(3, "there is no room"),
        file_frames.encode_restored(2, 2**40),
    ]


def reader(raw: bytes) -> Callable[[int], memoryview]:
    at = 0

    def read(length: int) -> memoryview:
        nonlocal at
        if at + length > len(raw):
            raise EOFError
        at += length
        return memoryview(raw)[at - length : at]

    return read


def read_all(raw: bytes) -> tuple[list[tuple[FrameType, int, bytes]], BaseException]:
    read = reader(raw)
    found: list[tuple[FrameType, int, bytes]] = []
    while True:
        try:
            frame = frames.read_frame(read)
        except (EOFError, LandfallError) as error:
            return found, error
        found.append((frame.type, frame.flags, bytes(frame.payload)))


def joined(stream: list[list[frames.Buffer]]) -> bytes:
    return b"".join(bytes(part) for frame in stream for part in frame)


def frame_of(buffers: list[frames.Buffer]) -> Frame:
    return frames.read_frame(reader(b"".join(map(bytes, buffers))))


def test_what_is_written_is_read() -> None:
    found, end = read_all(joined(small_stream()))
    assert isinstance(end, EOFError)
    kinds = list(FrameType)
    assert [kind for kind, _, _ in found] == [*kinds[:6], *kinds[5:]]
    payloads = [payload for _, _, payload in found]
    assert frames.decode_hello(payloads[0]) == HELLO
    assert frames.decode_welcome(payloads[1]) == Welcome(dmi_wanted=True, committed=False)
    assert frames.decode_progress(payloads[8]) == 2**40
    assert frames.decode_need(payloads[9]).tolist() == ROWS.tolist()
    error = frames.decode_error(payloads[12])
    assert (type(error), error.message, error.cause) == (BaseMismatch, "not the base", "counter")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_batch_is_its_rows_parts_and_data(compressed: bool) -> None:
    data = zstandard.ZstdCompressor(level=1).compress(DATA) if compressed else DATA
    batch = frames.decode_batch(frame_of(frames.encode_batch(ROWS, PARTS, len(DATA), data, compressed=compressed)))
    assert (batch.rows.tolist(), batch.parts.tolist()) == (ROWS.tolist(), PARTS.tolist())
    assert bytes(batch.unpack(memoryview(bytearray(8192)))) == DATA


def test_G14_a_stream_cut_at_any_byte_gives_the_whole_frames_before_the_cut_and_no_other() -> None:
    raw = joined(small_stream())
    whole, _ = read_all(raw)
    ends = np.cumsum([sum(map(len, frame)) for frame in small_stream()])
    for cut in range(len(raw)):
        found, end = read_all(raw[:cut])
        assert found == whole[: int(np.count_nonzero(ends <= cut))]
        assert isinstance(end, EOFError)


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_G15_no_flipped_byte_is_taken_for_a_frame(flip: int) -> None:
    raw = joined(small_stream())
    whole, _ = read_all(raw)
    ends = np.cumsum([sum(map(len, frame)) for frame in small_stream()])
    for at in range(len(raw)):
        damaged = bytearray(raw)
        damaged[at] ^= flip
        found, end = read_all(bytes(damaged))
        assert found == whole[: int(np.count_nonzero(ends <= at))], at
        assert isinstance(end, ProtocolViolated | VersionUnknown | EOFError)


@pytest.mark.parametrize("length", [2**31, 2**32 - 1, 1 << 24])
@pytest.mark.parametrize("kind", list(FrameType))
def test_G8_a_length_out_of_bounds_is_refused_before_anything_is_allocated(kind: FrameType, length: int) -> None:
    head = struct.pack("<4sBBHIQ", frames.MAGIC, kind, 0, 0, length, 0)
    with pytest.raises(ProtocolViolated, match="out of bounds"):
        frames.decode_head(head)


def test_F12_another_version_is_refused_as_such() -> None:
    with pytest.raises(VersionUnknown):
        frames.decode_head(struct.pack("<4sBBHIQ", b"LFD2", 1, 0, 0, 2, 0))
    document = frames.encode_hello(HELLO)[1]
    with pytest.raises(VersionUnknown):
        frames.decode_hello(bytes(document).replace(b'"protocol":1', b'"protocol":2'))


@pytest.mark.parametrize(
    "document",
    [
        b"{}",
        b"[]",
        b"nonsense",
        b'{"protocol":1}',
        b'{"a":' * 30000,
        GREETING.replace(b'"stream":0', b'"stream":2'),
        GREETING.replace(b'"stream":0', b'"stream":true'),
        GREETING.replace(b'"stream":0', b'"stream":NaN'),
        GREETING.replace(b'"stream":0', b'"more":1,"stream":0'),
        GREETING.replace(b'"dmi_bytes":1000', b'"dmi_bytes":-1'),
        GREETING.replace(b'"dmi_bytes":1000', b'"dmi_bytes":9223372036854775808'),
    ],
)
def test_G16_a_greeting_that_is_not_one_is_refused(document: bytes) -> None:
    with pytest.raises((ProtocolViolated, VersionUnknown)):
        frames.decode_hello(document)


@pytest.mark.parametrize(("rows", "parts"), [([1, 1], [1, 1]), ([1, 2], [0, 1]), ([1, 2], [4, 1]), ([1, 2], [255, 1])])
def test_a_batch_with_a_piece_twice_or_without_a_known_part_is_refused(rows: list[int], parts: list[int]) -> None:
    buffers = frames.encode_batch(np.array(rows, dtype=np.uint32), np.array(parts, dtype=np.uint8), 0, b"", compressed=False)
    with pytest.raises(ProtocolViolated):
        frames.decode_batch(frame_of(buffers))


@pytest.mark.parametrize("count", [0, 2**14 + 1, 2**31, 2**32 - 1])
def test_G8_a_count_of_rows_that_is_not_there_is_refused(count: int) -> None:
    payload = struct.pack("<II", count, 0) + bytes(5 * 10)
    with pytest.raises(ProtocolViolated):
        frames.decode_batch(Frame(FrameType.BATCH, 0, memoryview(payload)))


def bomb(kind: str) -> tuple[int, bytes]:
    zeros = bytes(1 << 20)
    match kind:
        case "declares more than the batch":
            return 4096, zstandard.ZstdCompressor().compress(zeros)
        case "declares nothing":
            return 1 << 20, zstandard.ZstdCompressor(write_content_size=False).compress(zeros)
        case "holds more than it declares":
            packed = bytearray(zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20)))
            at = packed.index((256 << 20).to_bytes(4, "little"))
            packed[at : at + 4] = (1 << 20).to_bytes(4, "little")
            return 1 << 20, bytes(packed)
        case "holds less than it declares":
            packed = bytearray(zstandard.ZstdCompressor().compress(zeros))
            at = packed.index((1 << 20).to_bytes(4, "little"))
            packed[at : at + 4] = (2 << 20).to_bytes(4, "little")
            return 2 << 20, bytes(packed)
        case "a huge window":
            parameters = zstandard.ZstdCompressionParameters(window_log=27, enable_ldm=True, write_content_size=False)
            streamed = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
            return 1 << 20, streamed.compress(zeros) + streamed.flush()
        case "something after it":
            return 1 << 20, zstandard.ZstdCompressor().compress(zeros) + b"more"
        case _:
            return 1 << 20, b"\x28\xb5\x2f\xfd" + b"nonsense" * 4


@pytest.mark.parametrize(
    "kind",
    [
        "declares more than the batch",
        "declares nothing",
        "holds more than it declares",
        "holds less than it declares",
        "a huge window",
        "something after it",
        "nonsense",
    ],
)
def test_G12_a_decompression_bomb_is_refused_and_costs_no_memory(kind: str) -> None:
    raw_bytes, packed = bomb(kind)
    batch = frames.decode_batch(frame_of(frames.encode_batch(ROWS, PARTS, raw_bytes, packed, compressed=True)))
    into = memoryview(bytearray(frames.MAX_RAW_BYTES))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolViolated):
            batch.unpack(into)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_an_error_with_texts_too_long_for_a_frame_is_shortened() -> None:
    error = frames.decode_error(frames.encode_error(BaseMismatch("ü" * 100000, cause="c" * 100000))[1])
    assert error.message == "ü" * 4000


@given(st.binary(max_size=200))
def test_G21_any_bytes_are_refused_or_end(raw: bytes) -> None:
    found, _ = read_all(raw)
    assert found == []


GOOD_ITEM = FileItem(1, 0, True, 0o100644, 0, 0, -1, 0, 0, 5, 0, "", ())


def test_items_of_an_order_are_read_as_they_were_written() -> None:
    item = replace(GOOD_ITEM, link=file_frames.to_text(b"\xff/x"), xattrs=((file_frames.to_text(b"user.a"), file_frames.to_text(b"\0")),))
    assert file_frames.decode_item(frame_of(file_frames.encode_item(item)).payload, (0, 2)) == item
    assert file_frames.from_text(item.link) == b"\xff/x"
    above = replace(GOOD_ITEM, up=2, mode=0o40755)
    assert file_frames.decode_item(frame_of(file_frames.encode_item(above)).payload, (0, 2)) == above
    offset, data = file_frames.decode_content(frame_of(file_frames.encode_content(7, b"data")).payload)
    assert (offset, bytes(data)) == (7, b"data")


@pytest.mark.parametrize(
    "changes",
    [
        {"number": 2},
        {"number": -1},
        {"up": 3, "mode": 0o40755},
        {"up": -1, "mode": 0o40755},
        {"up": 1},  # what leads to a file is a directory
        {"mode": 0o644},
        {"mode": 0o1100644},
        {"uid": -1},
        {"gid": 2**32},
        {"flags": 2**32},
        {"size_bytes": -1},
        {"size_bytes": 2**63},
        {"device": -1},
    ],
)
def test_G8_a_hostile_item_is_refused(changes: dict[str, int]) -> None:
    payload = frame_of(file_frames.encode_item(replace(GOOD_ITEM, **changes))).payload  # type: ignore[arg-type]
    with pytest.raises(ProtocolViolated):
        file_frames.decode_item(payload, (0, 2))


def test_G8_a_refusal_of_no_file_and_bytes_that_are_none_are_refused() -> None:
    with pytest.raises(ProtocolViolated):
        file_frames.decode_refusal(frame_of(file_frames.encode_refusal(2, "no")).payload, 2)
    with pytest.raises(ProtocolViolated):
        file_frames.from_text("not base 64!")
