"""A file of fixed-width columns: what the DMI is stored and sent in. FORMAT.md, section 1, gives the bytes.

The writer streams; the reader trusts nothing: every length is checked against the bytes that are there before anything is
allocated, every section against its digest, every gap for zeros. A container cut at any byte or with any byte changed is
refused with DmiMalformed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from agent.contract.errors import DmiMalformed, VersionUnknown

Column = NDArray[Any]

MAGIC: Final = b"LANDFALL"
END_MAGIC: Final = b"LANDFEND"
VERSION: Final = 1
ALIGN: Final = 8
MAX_SECTIONS: Final = 64
MAX_HEADER_BYTES: Final = 4096

_FIXED: Final = struct.Struct("<8sHHIQ")  # magic, version, zero, number of sections, length of the whole file
_SECTION: Final = struct.Struct("<24sQQQ16s")  # name, offset, rows, bytes of a row, digest
_END: Final = struct.Struct("<8sQ")  # magic, length of the whole file
_DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class ColumnSpec:
    """One section: its name and the type of a row (``<u8``, ``<u4``, ``u1``, ``V16`` ...)."""

    name: str
    dtype: np.dtype[Any]

    @staticmethod
    def of(name: str, dtype: str) -> ColumnSpec:
        return ColumnSpec(name, np.dtype(dtype))


def encode(columns: Mapping[str, Column], specs: tuple[ColumnSpec, ...]) -> Iterator[bytes]:
    """Yield the bytes of a container with ``columns`` in the order of ``specs``; the columns are not copied as a whole."""
    arrays = [np.ascontiguousarray(columns[spec.name], dtype=spec.dtype) for spec in specs]
    offset = _FIXED.size + _SECTION.size * len(specs) + _DIGEST_BYTES
    table = []
    for spec, array in zip(specs, arrays, strict=True):
        offset = _aligned(offset)
        table.append(_SECTION.pack(spec.name.encode(), offset, len(array), spec.dtype.itemsize, xxhash.xxh3_128_digest(_bytes_of(array))))
        offset += array.nbytes
    total = _aligned(offset) + _END.size
    head = _FIXED.pack(MAGIC, VERSION, 0, len(specs), total) + b"".join(table)
    yield head + xxhash.xxh3_128_digest(head)
    at = len(head) + _DIGEST_BYTES
    for array in arrays:
        yield bytes(_aligned(at) - at)
        yield bytes(_bytes_of(array)) if array.nbytes < (1 << 20) else _bytes_of(array)  # type: ignore[misc]
        at = _aligned(at) + array.nbytes
    yield bytes(_aligned(at) - at) + _END.pack(END_MAGIC, total)


def decode(buffer: bytes | memoryview, specs: tuple[ColumnSpec, ...]) -> dict[str, Column]:
    """Return the columns of the container in ``buffer`` (which they share, read-only); DmiMalformed for anything amiss."""
    view = memoryview(buffer).cast("B").toreadonly()
    if len(view) < _FIXED.size + _DIGEST_BYTES + _END.size:
        raise DmiMalformed(f"{len(view)} bytes are too few for a container")
    magic, version, zero, count, total = _FIXED.unpack_from(view)
    if magic != MAGIC:
        raise DmiMalformed("it does not begin with the magic word")
    if version != VERSION:
        raise VersionUnknown(f"the container has format version {version}, this release reads {VERSION}")
    if zero or count != len(specs) or count > MAX_SECTIONS:
        raise DmiMalformed(f"it has {count} sections where {len(specs)} belong")
    if total != len(view):
        raise DmiMalformed(f"it says it has {total} bytes, there are {len(view)}")
    head_bytes = _FIXED.size + _SECTION.size * count
    if head_bytes + _DIGEST_BYTES + _END.size > total:
        raise DmiMalformed("the section table does not fit")
    if xxhash.xxh3_128_digest(view[:head_bytes]) != bytes(view[head_bytes : head_bytes + _DIGEST_BYTES]):
        raise DmiMalformed("the digest of the head is wrong")
    if _END.unpack_from(view, total - _END.size) != (END_MAGIC, total):
        raise DmiMalformed("it does not end as it must")

    columns: dict[str, Column] = {}
    at = head_bytes + _DIGEST_BYTES
    for number, spec in enumerate(specs):
        name, offset, rows, row_bytes, digest = _SECTION.unpack_from(view, _FIXED.size + _SECTION.size * number)
        if name.rstrip(b"\0") != spec.name.encode():
            raise DmiMalformed(f"section {number} is not {spec.name}")
        if row_bytes != spec.dtype.itemsize:
            raise DmiMalformed(f"a row of {spec.name} has {row_bytes} bytes, not {spec.dtype.itemsize}")
        if offset != _aligned(at) or rows > total or offset + rows * row_bytes > total - _END.size:
            raise DmiMalformed(f"section {spec.name} is out of bounds")
        end = offset + rows * row_bytes
        if any(view[at:offset]) or xxhash.xxh3_128_digest(view[offset:end]) != digest:
            raise DmiMalformed(f"the digest of section {spec.name} is wrong")
        columns[spec.name] = np.frombuffer(view[offset:end], dtype=spec.dtype)
        at = end
    if _aligned(at) + _END.size != total or any(view[at : total - _END.size]):
        raise DmiMalformed("there are bytes that belong to no section")
    return columns


def identity(buffer: bytes | memoryview) -> bytes:
    """Return the 16 bytes that a container calls its identity; DmiMalformed if it is too short to have one. Checks nothing else."""
    view = memoryview(buffer).cast("B")
    sections = _FIXED.unpack_from(view)[3] if len(view) >= _FIXED.size else MAX_SECTIONS + 1
    at = _FIXED.size + _SECTION.size * sections
    if sections > MAX_SECTIONS or at + _DIGEST_BYTES > len(view):
        raise DmiMalformed("it is too short to have an identity")
    return bytes(view[at : at + _DIGEST_BYTES])


def _aligned(offset: int) -> int:
    return (offset + ALIGN - 1) // ALIGN * ALIGN


def _bytes_of(array: Column) -> memoryview:
    return array.view(np.uint8).reshape(-1).data if array.nbytes else memoryview(b"")
