"""Single files on the data plane: frames ITEM, CONTENT, REFUSAL, RESTORED. Pure bytes in, pure bytes out; FORMAT.md, section 6."""

from __future__ import annotations

import base64
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import xxhash

from agent.contract.errors import ProtocolViolated
from agent.contract.frames import Buffer, FrameType, encode, json_bytes, read_json
from agent.contract.messages import to_document

_OFFSET: Final = struct.Struct("<Q")
_KINDS: Final = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK})
_LONGEST_REASON: Final = 1000


@dataclass(frozen=True, slots=True)
class FileItem:
    """An inode of the order, or with ``up`` a directory so many levels above one. ``link`` and ``xattrs`` are in base 64."""

    number: int
    up: int
    wanted: bool
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    project: int
    flags: int
    size_bytes: int
    device: int
    link: str
    xattrs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class FileRefusal:
    """A file of the order that cannot be had, or was not taken."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True)
class FilesRestored:
    """How much is in its place now."""

    files: int
    bytes: int


def order_bytes(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return what the order's length and identity are taken of."""
    return b"".join(path + b"\0" + at + b"\0" for path, at in pairs)


def order_identity(order: bytes) -> str:
    """Return the identity of an order, in hex."""
    return xxhash.xxh3_128_hexdigest(order)


def encode_item(item: FileItem) -> list[Buffer]:
    """Return the frame; ValueError if the attributes are larger than one holds."""
    return encode(FrameType.ITEM, [json_bytes(to_document(item))])


def decode_item(payload: Buffer, places: tuple[int, ...]) -> FileItem:
    """Return the item; ``places`` says for each number how many levels there are above it."""
    item = read_json(payload, FileItem)
    is_known = 0 <= item.number < len(places) and 0 <= item.up <= places[item.number]
    is_sound = stat.S_IFMT(item.mode) in _KINDS and 0 <= item.mode < 1 << 16 and (item.up == 0 or stat.S_ISDIR(item.mode))
    in_bounds = all(0 <= value < 1 << 32 for value in (item.uid, item.gid, item.project, item.flags))
    if not (is_known and is_sound and in_bounds and 0 <= item.size_bytes < 1 << 63 and 0 <= item.device < 1 << 63):
        raise ProtocolViolated("an item of the order is out of bounds")
    return item


def encode_content(offset: int, data: Buffer) -> list[Buffer]:
    return encode(FrameType.CONTENT, [_OFFSET.pack(offset), data])


def decode_content(payload: memoryview) -> tuple[int, memoryview]:
    """Return the offset and the data."""
    return int(_OFFSET.unpack_from(payload)[0]), payload[_OFFSET.size :]


def encode_refusal(number: int, reason: str) -> list[Buffer]:
    return encode(FrameType.REFUSAL, [json_bytes(to_document(FileRefusal(number, reason[:_LONGEST_REASON])))])


def decode_refusal(payload: Buffer, total: int) -> FileRefusal:
    refusal = read_json(payload, FileRefusal)
    if not 0 <= refusal.number < total:
        raise ProtocolViolated("a refusal is of no file of the order")
    return refusal


def encode_restored(files: int, length_bytes: int) -> list[Buffer]:
    return encode(FrameType.RESTORED, [json_bytes(to_document(FilesRestored(files, length_bytes)))])


def to_text(raw: bytes) -> str:
    """Return bytes as an item has them."""
    return base64.b64encode(raw).decode()


def from_text(text: str) -> bytes:
    """Return the bytes that an item has; ProtocolViolated."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ProtocolViolated("an item's bytes are not base 64", cause=str(error)) from error
