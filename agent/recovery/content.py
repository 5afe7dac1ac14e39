"""The content of whole files, read from the landing volume at the DMI's extents and proved by the DMI's digests.

The landing volume is a clone of the base in which pieces landed, so a changed file's unchanged blocks are read, and proved, there too.
Nothing mounts it: a kernel mount of a partial landing volume succeeds and silently returns wrong data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import xxhash

from agent.blockio.device import Device
from agent.blockio.scatter import read_runs
from agent.contract.digest import BlockDigests, block_digests, file_digest, payload_digest
from agent.contract.dmi import Dmi, ExtentFlag
from agent.contract.errors import DeviceFailed, DmiMalformed
from agent.contract.identity import BLOCK_BYTES

READ_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes of a file, not past its size. ``data`` is valid until the next item is asked for."""

    row: int
    offset: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Ending:
    """All chunks of a file have been given out. Empty ``damage``: they are what the source had.

    ``digest`` is taken over the bytes of the chunks and the size, for reading back what was stored.
    """

    row: int
    digest: bytes
    length_bytes: int
    damage: str = ""


def read_files(device: Device, dmi: Dmi, rows: Sequence[int]) -> Iterator[Chunk | Ending]:
    """Yield the chunks of each regular file in ``rows`` in ascending order of offset, then its Ending; file after file.

    Where a block cannot be read the files that need it end as damaged, after their chunks have perhaps begun once more.
    """
    done = 0
    try:
        for item in _stream(device, dmi, rows):
            yield item
            done += isinstance(item, Ending)
        return
    except DeviceFailed:
        pass
    for row in rows[done:]:
        try:
            yield from _stream(device, dmi, [row])
        except DeviceFailed as error:
            yield Ending(row, b"", 0, f"its data cannot be read: {error.cause}")


def data_ranges(dmi: Dmi, row: int) -> list[tuple[int, int]]:
    """Return (offset, length) in bytes of what a regular file has that is neither hole nor unwritten, cut at its size."""
    size = int(dmi.size[row])
    if payload := dmi.payload_of(row):
        _refuse(len(payload) > size, "a file's inline content is longer than the file")
        return [(0, len(payload))]
    ranges: list[tuple[int, int]] = []
    for logical, _, blocks, flags in dmi.extents(row):
        begin, end = logical * BLOCK_BYTES, min((logical + blocks) * BLOCK_BYTES, size)
        if flags & ExtentFlag.UNWRITTEN or begin >= end:
            continue
        if ranges and sum(ranges[-1]) == begin:
            ranges[-1] = (ranges[-1][0], end - ranges[-1][0])
        else:
            ranges.append((begin, end - begin))
    return ranges


def hole_ranges(ranges: list[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return (offset, length) in bytes of what lies between ``ranges`` of data, up to the file's size."""
    holes, at = [], 0
    for offset, length in ranges:
        if offset > at:
            holes.append((at, offset - at))
        at = offset + length
    if at < size:
        holes.append((at, size - at))
    return holes


class ContentDigest:
    """Digest of a file as its reader sees it: the bytes of its data ranges in order, then its size."""

    def __init__(self) -> None:
        self._fold = xxhash.xxh3_128()
        self.length_bytes = 0

    def update(self, data: memoryview | bytes) -> None:
        """Add the next bytes."""
        self._fold.update(data)
        self.length_bytes += len(data)

    def end(self, size_bytes: int) -> bytes:
        """Return the digest."""
        self._fold.update(size_bytes.to_bytes(8, "little"))
        return self._fold.digest()


@dataclass(slots=True)
class _Run:
    """An extent that is being read: ``left`` blocks are still to come."""

    row: int
    logical: int
    left: int
    last: bool  # of its file


def _stream(device: Device, dmi: Dmi, rows: Sequence[int]) -> Iterator[Chunk | Ending]:
    runs = _runs(dmi, rows)
    reading = (_slices(device, dmi, runs)) if runs else iter(())
    for row in rows:
        if dmi.payload_of(row) or not any(not flags & ExtentFlag.UNWRITTEN for *_, flags in dmi.extents(row)):
            yield from _from_payload(dmi, row)
        else:
            yield from _from_extents(dmi, row, reading)


def _runs(dmi: Dmi, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return (physical block, blocks) of the written extents of files whose content is not in the inode."""
    return [
        (physical, blocks)
        for row in rows
        if not dmi.payload_of(row)
        for _, physical, blocks, flags in dmi.extents(row)
        if not flags & ExtentFlag.UNWRITTEN
    ]


def _slices(device: Device, dmi: Dmi, runs: list[tuple[int, int]]) -> Iterator[tuple[memoryview, BlockDigests]]:
    """Yield the data of ``runs`` in order, in parts that do not pass the end of a run, with the digests of its blocks."""
    table = np.array(runs, dtype=np.uint64)
    left = iter(table[:, 1].tolist())
    blocks = next(left)
    for stretch in read_runs(device, table[:, 0].copy(), table[:, 1].copy(), batch_bytes=READ_BYTES):
        digests = block_digests(stretch.data)
        at = 0
        while at < len(digests):
            part = min(blocks, len(digests) - at)
            yield stretch.data[at * BLOCK_BYTES : (at + part) * BLOCK_BYTES], digests[at : at + part]
            at, blocks = at + part, blocks - part
            if not blocks:
                blocks = next(left, 0)


def _from_payload(dmi: Dmi, row: int) -> Iterator[Chunk | Ending]:
    size, payload, digest = int(dmi.size[row]), dmi.payload_of(row), ContentDigest()
    _refuse(len(payload) > size, "a file's inline content is longer than the file")
    if payload:
        digest.update(payload)
        yield Chunk(row, 0, memoryview(payload))
    proved = payload_digest(size, payload) == dmi.file_digest[row].tobytes()
    yield Ending(row, digest.end(size), digest.length_bytes, "" if proved else "its content is not what its digest says")


def _from_extents(dmi: Dmi, row: int, reading: Iterator[tuple[memoryview, BlockDigests]]) -> Iterator[Chunk | Ending]:
    size, digest = int(dmi.size[row]), ContentDigest()
    folded: list[tuple[int, BlockDigests]] = []
    for logical, _, blocks, flags in dmi.extents(row):
        if flags & ExtentFlag.UNWRITTEN:
            continue
        parts, done = [], 0
        while done < blocks:
            data, digests = next(reading)
            offset = (logical + done) * BLOCK_BYTES
            if offset < size:
                data = data[: size - offset]
                digest.update(data)
                yield Chunk(row, offset, data)
            parts.append(digests)
            done += len(digests)
        folded.append((logical, np.concatenate(parts)))
    proved = file_digest(size, folded) == dmi.file_digest[row].tobytes()
    yield Ending(row, digest.end(size), digest.length_bytes, "" if proved else "its data is not what its digest says")


def _refuse(amiss: bool, sentence: str) -> None:
    if amiss:
        raise DmiMalformed(sentence)
