"""The data plane: frames between two agents. Pure bytes in, pure bytes out; FORMAT.md, section 5.

A frame is a head of 20 bytes and a payload. The head says how long the payload is, and every type has a bound, checked before anything is
allocated. The digest covers both, so a damaged frame is refused where it is read and not where its data is used; against
forgery there is TLS below. What a type's payload must be is checked here too, except for what only the DMI can tell.

Data flows from source to target in this order::

    HELLO         each stream says which transfer it is of and shows the token      ->
    WELCOME       whether the DMI is wanted, or all is committed already            <-
    DMI           chunks of the DMI's bytes, on stream 0                            ->
    DMI_STORED    it is whole, checked and durable                                  <-
    STATE         chunks of the arrival bits, one byte per piece                    <-
    BATCH         pieces                                                            ->
    PROGRESS      how many pieces are complete and durable                          <-
    NEED_DIFFERENTIAL   pieces whose base differs: their pre-image is wanted        <-
    FINISH        everything was sent, commit                                       ->
    COMMITTED     it is                                                             <-

HEARTBEAT goes both ways at any time, ERROR is the last thing a side says.

Single files (section 6) go the same way, on one stream, after a HELLO that names the order instead of a DMI::

    ITEM          a directory or an inode, by its number in the order               ->
    CONTENT       a part of its content                                             ->
    WHOLE         it is complete                                                    ->
    REFUSAL       a file that cannot be had, or was not taken                       both
    FINISH        that was all                                                      ->
    RESTORED      what came of it                                                   <-
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final, TypeVar
from uuid import UUID

import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from agent.contract.errors import LandfallError, ProtocolViolated, RequestRefused, VersionUnknown
from agent.contract.messages import Differential, from_document, to_document

PROTOCOL: Final = 1
MAGIC: Final = b"LFD1"
MAX_RAW_BYTES: Final = 4 << 20
"""Data of one batch before compression; the largest piece with its differential data is 2 MiB."""
MAX_BATCH_ROWS: Final = 1 << 14
MAX_WINDOW_BYTES: Final = 8 << 20
CHUNK_BYTES: Final = 1 << 20
MAX_ITEM_BYTES: Final = 1 << 20
"""Of an inode's attributes, which are mostly its extended ones."""

_HEAD: Final = struct.Struct("<4sBBHIQ")  # magic, type, flags, zero, bytes of the payload, digest of (what is before, payload)
_BATCH: Final = struct.Struct("<II")  # rows, bytes of the data before compression
HEAD_BYTES: Final = _HEAD.size
_DIGESTED_BYTES: Final = HEAD_BYTES - 8

Buffer = bytes | bytearray | memoryview
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
T = TypeVar("T")


class FrameType(IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    DMI = 3
    DMI_STORED = 4
    STATE = 5
    BATCH = 6
    HEARTBEAT = 7
    PROGRESS = 8
    NEED_DIFFERENTIAL = 9
    FINISH = 10
    COMMITTED = 11
    ERROR = 12
    ITEM = 13
    CONTENT = 14
    WHOLE = 15
    REFUSAL = 16
    RESTORED = 17


class Part(IntFlag):
    """What a row of a batch carries."""

    UPDATE = 1
    DIFFERENTIAL = 2


_JSON_BYTES: Final = 64 * 1024
_BOUNDS: Final = {
    FrameType.HELLO: (2, _JSON_BYTES),
    FrameType.WELCOME: (2, _JSON_BYTES),
    FrameType.DMI: (1, CHUNK_BYTES),
    FrameType.DMI_STORED: (16, 16),
    FrameType.STATE: (1, CHUNK_BYTES),
    FrameType.BATCH: (_BATCH.size + 5, _BATCH.size + 5 * MAX_BATCH_ROWS + MAX_RAW_BYTES),
    FrameType.HEARTBEAT: (0, 0),
    FrameType.PROGRESS: (8, 8),
    FrameType.NEED_DIFFERENTIAL: (4, 4 * MAX_BATCH_ROWS),
    FrameType.FINISH: (0, 0),
    FrameType.COMMITTED: (0, 0),
    FrameType.ERROR: (2, _JSON_BYTES),
    FrameType.ITEM: (2, MAX_ITEM_BYTES),
    FrameType.CONTENT: (9, 8 + CHUNK_BYTES),
    FrameType.WHOLE: (0, 0),
    FrameType.REFUSAL: (2, _JSON_BYTES),
    FrameType.RESTORED: (2, _JSON_BYTES),
}
_COMPRESSED: Final = 1


@dataclass(frozen=True, slots=True)
class FrameHead:
    """The head of a frame, its type known and its length within bounds."""

    type: FrameType
    flags: int
    payload_bytes: int
    digest: int
    raw: bytes

    def check(self, payload: Buffer) -> None:
        """Refuse a payload that is not the one the head was made for."""
        if len(payload) != self.payload_bytes or _digest(self.raw[:_DIGESTED_BYTES], (payload,)) != self.digest:
            raise ProtocolViolated(f"a {self.type.name} frame is damaged")


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame as it was received."""

    type: FrameType
    flags: int
    payload: memoryview


@dataclass(frozen=True, slots=True)
class Hello:
    """The source's first word on each stream."""

    protocol: int
    transfer: UUID
    token: str
    stream: int
    streams: int
    differential: Differential
    dmi_bytes: int
    dmi_digest: str  # hex


@dataclass(frozen=True, slots=True)
class Welcome:
    """The target's answer. ``committed``: there is nothing to do, an earlier acknowledgement was lost."""

    dmi_wanted: bool
    committed: bool


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pieces: ``rows`` of the DMI, ``parts`` of each, and the data: first the update data of all rows that carry it, in their order, then
    the differential data. A hole has no data. ``data`` is ``raw_bytes`` long, or compressed (one zstd frame of that content size)."""

    rows: U32
    parts: U8
    raw_bytes: int
    compressed: bool
    data: memoryview

    def unpack(self, into: memoryview) -> memoryview:
        """Return the data, uncompressed, in the beginning of ``into`` (at least ``raw_bytes`` long).

        ProtocolViolated if it is not what it says; no more than it says is ever allocated.
        """
        if not self.compressed:
            into[: self.raw_bytes] = self.data
            return into[: self.raw_bytes]
        try:
            parameters = zstandard.get_frame_parameters(self.data)
            if parameters.content_size != self.raw_bytes or parameters.window_size > MAX_WINDOW_BYTES or parameters.dict_id:
                raise ProtocolViolated("compressed data declares another size, too large a window or a dictionary")
            whole = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompress(
                self.data, max_output_size=self.raw_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise ProtocolViolated("compressed data is damaged", cause=str(error)) from error
        if len(whole) != self.raw_bytes:
            raise ProtocolViolated("compressed data has another size than it declares")
        into[: self.raw_bytes] = whole
        return into[: self.raw_bytes]


def encode(kind: FrameType, parts: Sequence[Buffer] = (), flags: int = 0) -> list[Buffer]:
    """Return a frame as buffers to be sent one after another; the payload's ``parts`` are not copied."""
    length = sum(map(len, parts))
    low, high = _BOUNDS[kind]
    if not low <= length <= high:
        raise ValueError(f"a {kind.name} frame of {length} bytes")
    head = _HEAD.pack(MAGIC, kind, flags, 0, length, 0)[:_DIGESTED_BYTES]
    return [head + struct.pack("<Q", _digest(head, parts)), *parts]


def decode_head(raw: Buffer) -> FrameHead:
    """Return the head in HEAD_BYTES of ``raw``; ProtocolViolated, or VersionUnknown for another magic of ours."""
    magic, kind, flags, zero, length, digest = _HEAD.unpack(raw)
    if magic != MAGIC:
        if magic[:3] == MAGIC[:3]:
            raise VersionUnknown(f"the peer speaks version {magic[3:]!r} of the data plane, this release {MAGIC[3:]!r}")
        raise ProtocolViolated("a frame does not begin with the magic word")
    if kind not in _BOUNDS or zero or flags & ~(_COMPRESSED if kind == FrameType.BATCH else 0):
        raise ProtocolViolated(f"a frame has the unknown type {kind} or flags {flags}")
    low, high = _BOUNDS[FrameType(kind)]
    if not low <= length <= high:
        raise ProtocolViolated(f"a {FrameType(kind).name} frame of {length} bytes is out of bounds")
    return FrameHead(FrameType(kind), flags, length, digest, bytes(raw))


def read_frame(read_exactly: Callable[[int], memoryview]) -> Frame:
    """Return the next frame out of a source of bytes; ``read_exactly`` raises what it likes at its end."""
    head = decode_head(read_exactly(HEAD_BYTES))
    payload = read_exactly(head.payload_bytes) if head.payload_bytes else memoryview(b"")
    head.check(payload)
    return Frame(head.type, head.flags, payload)


def encode_hello(hello: Hello) -> list[Buffer]:
    return encode(FrameType.HELLO, [json_bytes(to_document(hello))])


def decode_hello(payload: Buffer) -> Hello:
    """Return the greeting; VersionUnknown if it is of another protocol, whatever else it says."""
    document = _document(payload)
    if document.get("protocol") != PROTOCOL:
        raise VersionUnknown(f"the peer speaks protocol {document.get('protocol')!r}, this release {PROTOCOL}")
    hello = _structured(document, Hello)
    if not 0 <= hello.stream < hello.streams <= 64 or not 0 < hello.dmi_bytes < 2**63:
        raise ProtocolViolated("a greeting has a stream number or length out of bounds")
    return hello


def encode_welcome(welcome: Welcome) -> list[Buffer]:
    return encode(FrameType.WELCOME, [json_bytes(to_document(welcome))])


def decode_welcome(payload: Buffer) -> Welcome:
    return _structured(_document(payload), Welcome)


def encode_error(error: LandfallError) -> list[Buffer]:
    """Return the frame that carries ``error``, its texts shortened to fit."""
    return encode(FrameType.ERROR, [json_bytes({key: text[:4000] for key, text in error.to_wire().items()})])


def decode_error(payload: Buffer) -> LandfallError:
    document = _document(payload)
    if set(document) != {"code", "message", "cause", "fix"} or not all(isinstance(text, str) for text in document.values()):
        raise ProtocolViolated("the peer ended with an error that cannot be read")
    return LandfallError.from_wire(document)


def encode_progress(complete: int) -> list[Buffer]:
    return encode(FrameType.PROGRESS, [struct.pack("<Q", complete)])


def decode_progress(payload: Buffer) -> int:
    return int(struct.unpack("<Q", payload)[0])


def encode_need(rows: U32) -> list[list[Buffer]]:
    """Return the frames that ask for the differential data of ``rows``."""
    parts = [rows[at : at + MAX_BATCH_ROWS] for at in range(0, len(rows), MAX_BATCH_ROWS)]
    return [encode(FrameType.NEED_DIFFERENTIAL, [part.astype("<u4").tobytes()]) for part in parts]


def decode_need(payload: Buffer) -> U32:
    if len(payload) % 4:
        raise ProtocolViolated("a list of pieces ends inside a row")
    return np.frombuffer(payload, dtype="<u4")


def encode_batch(rows: U32, parts: U8, raw_bytes: int, data: Buffer, *, compressed: bool) -> list[Buffer]:
    """Return the frame of a batch; ``data`` is as Batch says."""
    head = _BATCH.pack(len(rows), raw_bytes) + rows.astype("<u4").tobytes() + parts.astype("u1").tobytes()
    return encode(FrameType.BATCH, [head, data], _COMPRESSED if compressed else 0)


def decode_batch(frame: Frame) -> Batch:
    """Return the batch in ``frame``: rows distinct, parts known, lengths in bounds.

    Whether rows and length fit the DMI is the caller's to check.
    """
    count, raw_bytes = _BATCH.unpack_from(frame.payload)
    body = _BATCH.size + 5 * count
    if not 0 < count <= MAX_BATCH_ROWS or raw_bytes > MAX_RAW_BYTES or body > len(frame.payload):
        raise ProtocolViolated(f"a batch of {count} rows and {raw_bytes} bytes is out of bounds")
    rows = np.frombuffer(frame.payload[_BATCH.size : _BATCH.size + 4 * count], dtype="<u4")
    parts = np.frombuffer(frame.payload[_BATCH.size + 4 * count : body], dtype=np.uint8)
    if len(np.unique(rows)) != count or bool(np.any((parts < 1) | (parts > 3))):
        raise ProtocolViolated("a batch has a piece twice, or one without a part")
    compressed = bool(frame.flags & _COMPRESSED)
    data = frame.payload[body:]
    if not compressed and len(data) != raw_bytes:
        raise ProtocolViolated(f"a batch has {len(data)} bytes of data and says {raw_bytes}")
    return Batch(rows, parts, raw_bytes, compressed, data)


def _digest(head: bytes, parts: Sequence[Buffer]) -> int:
    fold = xxhash.xxh3_64(head)
    for part in parts:
        fold.update(part)
    return fold.intdigest()


def json_bytes(document: Any) -> bytes:
    """Return a document as a payload has it."""
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def read_json(payload: Buffer, kind: type[T]) -> T:
    """Return the ``kind`` that a payload is; ProtocolViolated."""
    return _structured(_document(payload), kind)


def _document(payload: Buffer) -> dict[str, Any]:
    try:
        document = json.loads(bytes(payload))
    except (ValueError, RecursionError) as error:
        raise ProtocolViolated("a frame's payload is not JSON", cause=str(error)) from error
    if not isinstance(document, dict):
        raise ProtocolViolated("a frame's payload is not a JSON object")
    return document


def _structured(document: dict[str, Any], kind: type[T]) -> T:
    try:
        return from_document(document, kind)
    except RequestRefused as error:
        raise ProtocolViolated(error.message, cause=error.cause) from error
