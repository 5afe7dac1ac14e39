"""What was stored is read back from a fresh read-only mount and held against its source: contents, promised attributes, names.

Promised: type, mode, uid, gid, size, mtime in ns, device number, symlink target, hard-link groups, xattrs, project id, chattr flags.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from agent.contract.dmi import Change, Dmi, ExtentFlag, FileKind, Side
from agent.contract.errors import SalvageFailed, VerifyFailed
from agent.contract.identity import BLOCK_BYTES
from agent.recovery import inode
from agent.recovery.apply import Applied, Tick
from agent.recovery.back import NOTHING, Proved
from agent.recovery.check import name_of
from agent.recovery.content import ContentDigest, hole_ranges
from agent.recovery.inode import State
from agent.recovery.plan import UNLISTED, Plan, Slot
from agent.recovery.source import Told, Version
from agent.recovery.tree import FLAGGED, Tree
from agent.system import block

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
_PATH: Final = os.O_PATH | os.O_NOFOLLOW
_READ_BYTES: Final = 1 << 20
_AHEAD: Final = 16
"""So many threads wait for inodes, and ask for so many at a time."""


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read back and is as it must be."""

    files: int
    bytes: int


def verify(plan: Plan, dmi: Dmi, source: Version, applied: Applied, mount_fd: int, tick: Tick, proved: Proved = NOTHING) -> Verified:
    """Return how much of the target was read back; VerifyFailed names the first file that is not what it must be.

    What a plan keeps was ``proved`` before: it is where it was then, or is read again.
    """
    tree = Tree(dmi, mount_fd, applied.made, applied.unlisted, read_only=True, side=plan.side)
    try:
        return _Verification(plan, dmi, applied, tree, tick, proved).run(source)
    except SalvageFailed as error:
        raise VerifyFailed("an inode that was stored is not there", cause=str(error)) from error
    finally:
        tree.close()


class _Verification:
    def __init__(self, plan: Plan, dmi: Dmi, applied: Applied, tree: Tree, tick: Tick, proved: Proved) -> None:
        self.plan, self.dmi, self.applied, self.tree, self.tick, self.proved = plan, dmi, applied, tree, tick, proved
        self.aside = {placement.row: len(placement.aside) for placement in plan.move if placement.aside}
        self.bytes = 0

    def run(self, source: Version) -> Verified:
        plan = self.plan
        self._look_ahead()
        stored = [*plan.create, *plan.update, *([plan.root_row] if plan.root_row != UNLISTED else [])]
        for number, row in enumerate(stored, 1):
            self._verify(row, source)
            self.tick(number)
        if plan.keep:
            self.bytes = 0
            told = Told(self.dmi)
            for number, row in enumerate(plan.keep, len(stored) + 1):
                self._verify(row, told)
                self.tick(number)
        removed = {placement.row for placement in plan.remove}
        for placement in plan.move:
            found = {self._inode_at(placement.row, slot) for slot in placement.take}
            self._require(len(found) <= 1, placement.row, "its names are not one file")
            for slot in placement.leave:
                state = None if slot.folder.row in removed else self.tree.stat(slot)
                self._require(state is None or state.st_ino not in found, placement.row, "an old name of it is still there")
        return Verified(len(plan.keep or stored), self.bytes)

    def _look_ahead(self) -> None:
        """Let the kernel read the inodes that are looked at, many at once: one after another most of the time would be spent waiting."""
        made = self.applied.made
        rows = sorted((row for row in (*self.plan.update, *self.plan.keep) if row not in made), key=lambda row: int(self.dmi.inode[row]))
        with ThreadPoolExecutor(_AHEAD, thread_name_prefix="verify") as ahead:
            for begun in [ahead.submit(self._read_ahead, rows[at : at + _AHEAD]) for at in range(0, len(rows), _AHEAD)]:
                begun.result()

    def _read_ahead(self, rows: list[int]) -> None:
        for row in rows:
            with suppress(SalvageFailed):  # said when it is looked at
                os.close(self.tree.open(self.tree.handle(row), _PATH))

    def _verify(self, row: int, source: Version) -> None:
        wanted = source.state(row)
        with self.tree.row(row, _READ if wanted.kind in FLAGGED else _PATH) as fd:
            found = inode.state_of(fd)
            self._same(found, wanted, row)
            about = os.fstat(fd)
            if wanted.kind is not FileKind.DIRECTORY:
                links = self._links(row)
                self._require(about.st_nlink == links, row, f"number of names: {about.st_nlink}, not {links}")
            if wanted.kind is FileKind.REGULAR:
                self._same_content(fd, row, source, wanted.size)
        for slot in self.plan.names.get(row, ()):
            self._require(self._inode_at(row, slot) == about.st_ino, row, f"the name {slot.name!r}")

    def _links(self, row: int) -> int:
        """Return how many names a row has: what is placed at the target's names has as many."""
        if row in self.aside or self.dmi.change[row] & Change.DELETED:
            return len(self.plan.names[row]) + self.aside.get(row, 0)
        return len(self.dmi.names(row, Side.TARGET))

    def _inode_at(self, row: int, slot: Slot) -> int:
        state = self.tree.stat(slot)
        if state is None:
            raise VerifyFailed(f"{name_of(self.dmi, row)} was stored and is not at its name {slot.name!r}")
        return state.st_ino

    def _same(self, found: State, wanted: State, row: int) -> None:
        if found != wanted:
            for what in (field.name for field in fields(State)):
                one, other = getattr(found, what), getattr(wanted, what)
                self._require(one == other, row, f"{what}: {one!r}, not {other!r}")

    def _same_content(self, fd: int, row: int, source: Version, size: int) -> None:
        kept = self.proved.contents.get(row)
        if kept is not None and self._lies_where_it_was_proved(fd, row):
            self.bytes += kept[1]
            return
        digest = ContentDigest()
        ranges = source.ranges(row)
        for offset, length in ranges:
            at = offset
            while at < offset + length:
                part = os.pread(fd, min(_READ_BYTES, offset + length - at), at)
                self._require(bool(part), row, "it is shorter")
                digest.update(part)
                at += len(part)
        for offset, length in hole_ranges(ranges, size):
            self._require(inode.reads_as_zeros(fd, offset, length), row, f"there is data at {offset} where it has a hole")
        self._require(digest.end(size) == (self.applied.contents.get(row) if kept is None else kept[0]), row, "its content")
        self.bytes += digest.length_bytes

    def _lies_where_it_was_proved(self, fd: int, row: int) -> bool:
        """Whether the filesystem has a file's data at the DMI's extents and nowhere else."""
        if self.dmi.payload_of(row):
            return False
        mapped = block.extent_map(fd)
        at = slice(int(self.dmi.extent_start[row]), int(self.dmi.extent_start[row + 1]))
        told = (mapped.logical // BLOCK_BYTES, mapped.physical // BLOCK_BYTES, mapped.length // BLOCK_BYTES)
        columns = (self.dmi.extent_logical, self.dmi.extent_physical, self.dmi.extent_blocks)
        plain = block.ExtentFlag.LAST | block.ExtentFlag.UNWRITTEN | block.ExtentFlag.SHARED | block.ExtentFlag.MERGED
        unwritten = ((mapped.flags & block.ExtentFlag.UNWRITTEN) != 0, (self.dmi.extent_flags[at] & ExtentFlag.UNWRITTEN) != 0)
        same = all(np.array_equal(one, column[at]) for one, column in zip(told, columns, strict=True))
        return same and np.array_equal(*unwritten) and not bool(np.any(mapped.flags & ~np.uint32(plain)))

    def _require(self, holds: bool, row: int, what: str) -> None:
        if not holds:
            raise VerifyFailed(f"{name_of(self.dmi, row)} does not read back as it was stored", cause=what)
