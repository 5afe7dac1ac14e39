"""Where the files that are stored come from: the target's as DMI and landing volume have them, or the base's from a mount of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

from agent.blockio.device import Device
from agent.contract.dmi import Dmi, FileKind, Side
from agent.recovery import inode
from agent.recovery.content import Chunk, ContentDigest, Ending, data_ranges, read_files
from agent.recovery.inode import State
from agent.recovery.tree import FLAGGED, Tree
from agent.system.block import ExtentFlag, extent_map

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
_PATH: Final = os.O_PATH | os.O_NOFOLLOW
_READ_BYTES: Final = 1 << 20


class Version(Protocol):
    """What the files of a DMI are like in one generation, their content apart."""

    def state(self, row: int) -> State:
        """Return what is promised of a row's inode."""

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """Return (offset, length) in bytes of what a regular file has that is no hole, cut at its size."""


class Source(Version, Protocol):
    """A version with the content."""

    def contents(self, rows: Sequence[int]) -> Iterator[Chunk | Ending]:
        """Yield the chunks of each regular file in ascending order of offset, then its Ending; file after file."""


class Told:
    """The target's version, as the DMI tells it."""

    def __init__(self, dmi: Dmi) -> None:
        self._dmi = dmi

    def state(self, row: int) -> State:
        """Return the state in the target."""
        return inode.state_in(self._dmi, row)

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """Return where it has data in the target."""
        return data_ranges(self._dmi, row)


class Arrived(Told):
    """The target's version with the content at the DMI's extents of a device, proved by the DMI's digests."""

    def __init__(self, dmi: Dmi, device: Device) -> None:
        super().__init__(dmi)
        self._device = device

    def contents(self, rows: Sequence[int]) -> Iterator[Chunk | Ending]:
        """Yield the content in the target."""
        return read_files(self._device, self._dmi, rows)


class Earlier:
    """The base's version, read by handle from a read-only mount of the base. SalvageFailed where it is not what the DMI says."""

    def __init__(self, dmi: Dmi, mount_fd: int) -> None:
        self._tree = Tree(dmi, mount_fd, {}, {}, read_only=True, side=Side.BASE)
        self._dmi = dmi

    def state(self, row: int) -> State:
        """Return the state in the base."""
        with self._opened(row) as fd:
            return inode.state_of(fd)

    def ranges(self, row: int) -> list[tuple[int, int]]:
        """Return where it has data in the base."""
        with self._opened(row) as fd:
            return _ranges(fd)

    def contents(self, rows: Sequence[int]) -> Iterator[Chunk | Ending]:
        """Yield the content in the base."""
        for row in rows:
            digest = ContentDigest()
            with self._opened(row) as fd:
                for offset, length in _ranges(fd):
                    at = offset
                    while at < offset + length:
                        data = os.pread(fd, min(_READ_BYTES, offset + length - at), at)
                        digest.update(data)
                        yield Chunk(row, at, memoryview(data))
                        at += len(data)
                size = os.fstat(fd).st_size
            yield Ending(row, digest.end(size), digest.length_bytes)

    @contextmanager
    def _opened(self, row: int) -> Iterator[int]:
        with self._tree.row(row, _READ if FileKind(int(self._dmi.kind[row])) in FLAGGED else _PATH) as fd:
            yield fd


def _ranges(fd: int) -> list[tuple[int, int]]:
    """Return (offset, length) of a file's written extents, up to its size. SEEK_DATA would tell unwritten ones that were read as data."""
    size, mapped = os.fstat(fd).st_size, extent_map(fd)
    ranges: list[tuple[int, int]] = []
    for logical, length, flags in zip(mapped.logical.tolist(), mapped.length.tolist(), mapped.flags.tolist(), strict=True):
        if flags & ExtentFlag.DATA_INLINE:
            return [(0, size)]
        begin, end = logical, min(logical + length, size)
        if flags & ExtentFlag.UNWRITTEN or begin >= end:
            continue
        if ranges and sum(ranges[-1]) == begin:
            begin = ranges.pop()[0]
        ranges.append((begin, end - begin))
    return ranges
