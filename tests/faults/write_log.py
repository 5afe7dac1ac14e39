"""What dm-log-writes recorded, replayed: the disk as a power loss at any flush would have left it, with nothing that was not flushed.

Format: Documentation/admin-guide/device-mapper/log-writes.rst and drivers/md/dm-log-writes.c. A write is logged when the flush after it is
done, so what is before a flush in the log is what that flush promised.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

MAGIC = 0x6A736677736872


class Flag(IntFlag):
    """What an entry is."""

    FLUSH = 1
    FUA = 2
    DISCARD = 4
    MARK = 8
    METADATA = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the log; ``data_at`` is where its data lies in the log."""

    at: int
    length: int
    flags: Flag
    data_at: int

    @property
    def settles(self) -> bool:
        """Whether everything before it, and it, is durable once it is done."""
        return bool(self.flags & (Flag.FLUSH | Flag.FUA)) and not self.flags & Flag.MARK


def entries(log: Path) -> list[Entry]:
    """Return the entries in order."""
    found = []
    with log.open("rb") as file:
        magic, version, count, sector = struct.unpack("<QQQI", file.read(28))
        assert (magic, version) == (MAGIC, 1)
        at = sector
        for _ in range(count):
            file.seek(at)
            where, sectors, flags = struct.unpack("<QQQ", file.read(24))
            at += sector
            found.append(Entry(where * sector, sectors * sector, Flag(flags), at))
            if not found[-1].flags & (Flag.DISCARD | Flag.MARK):
                at += sectors * sector
    return found


def replay(log: Path, part: list[Entry], image: Path, begins_at: int = 0) -> None:
    """Write a part of the log onto an image, where what was logged begins at ``begins_at``; what was discarded is zeros."""
    with log.open("rb") as source, image.open("r+b", buffering=0) as target:
        for entry in part:
            if entry.flags & Flag.MARK or not entry.length:
                continue
            source.seek(entry.data_at)
            target.seek(begins_at + entry.at)
            target.write(bytes(entry.length) if entry.flags & Flag.DISCARD else source.read(entry.length))
