"""What was stored is read back from a fresh read-only mount and held against the DMI: contents, promised attributes, names.

Promised: type, mode, uid, gid, size, mtime in ns, device number, symlink target, hard-link groups, xattrs, project id, chattr flags.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import Final

from agent.contract.dmi import Dmi, FileKind
from agent.contract.errors import SalvageFailed, VerifyFailed
from agent.recovery import inode
from agent.recovery.apply import Applied, Tick
from agent.recovery.check import name_of
from agent.recovery.content import ContentDigest, data_ranges, hole_ranges
from agent.recovery.plan import UNLISTED, Plan, Slot
from agent.recovery.tree import FLAGGED, Tree
from agent.system import attributes

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read back and is as it must be."""

    files: int
    bytes: int


def verify(plan: Plan, dmi: Dmi, applied: Applied, mount_fd: int, tick: Tick) -> Verified:
    """Return how much was read back; VerifyFailed names the first file that is not what was sent."""
    tree = Tree(dmi, mount_fd, applied.made, applied.unlisted, read_only=True)
    try:
        return _Verification(plan, dmi, applied, tree, tick).run()
    except SalvageFailed as error:
        raise VerifyFailed("an inode that was stored is not there", cause=str(error)) from error
    finally:
        tree.close()


class _Verification:
    def __init__(self, plan: Plan, dmi: Dmi, applied: Applied, tree: Tree, tick: Tick) -> None:
        self.plan, self.dmi, self.applied, self.tree, self.tick = plan, dmi, applied, tree, tick
        self.bytes = 0

    def run(self) -> Verified:
        rows = [*self.plan.create, *self.plan.update, *([self.plan.root_row] if self.plan.root_row != UNLISTED else [])]
        for number, row in enumerate(rows, 1):
            self._verify(row)
            self.tick(number)
        removed = {placement.row for placement in self.plan.remove}
        for placement in self.plan.move:
            found = {self._inode_at(placement.row, slot) for slot in placement.take}
            self._require(len(found) <= 1, placement.row, "its names are not one file")
            for slot in placement.leave:
                state = None if slot.folder.row in removed else self.tree.stat(slot)
                self._require(state is None or state.st_ino not in found, placement.row, "an old name of it is still there")
        return Verified(len(rows), self.bytes)

    def _verify(self, row: int) -> None:
        dmi, kind = self.dmi, FileKind(int(self.dmi.kind[row]))
        names = self.plan.names.get(row, ())
        if kind in FLAGGED:
            with self.tree.row(row, _READ) as fd:
                self._same_attributes(fd, row)
                number = os.fstat(fd).st_ino
                if kind is FileKind.REGULAR:
                    self._same_content(fd, row)
        else:
            folder = self.tree.folder(names[0].folder)
            fd = os.open(names[0].name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            try:
                self._same_attributes(fd, row)
                number = os.fstat(fd).st_ino
            finally:
                os.close(fd)
            if kind is FileKind.SYMLINK:
                target = os.readlink(names[0].name, dir_fd=self.tree.folder(names[0].folder))
                self._require(os.fsencode(target) == dmi.payload_of(row), row, "the target of the symlink")
        for slot in names:
            self._require(self._inode_at(row, slot) == number, row, f"the name {slot.name!r}")

    def _inode_at(self, row: int, slot: Slot) -> int:
        state = self.tree.stat(slot)
        if state is None:
            raise VerifyFailed(f"{name_of(self.dmi, row)} was stored and is not at its name {slot.name!r}")
        return state.st_ino

    def _same_attributes(self, fd: int, row: int) -> None:
        dmi, state, kind = self.dmi, os.fstat(fd), FileKind(int(self.dmi.kind[row]))
        device = (os.major(state.st_rdev) << 32) | os.minor(state.st_rdev)
        facts = [
            ("type", stat.S_IFMT(state.st_mode) >> 12, int(kind)),
            ("owner", (state.st_uid, state.st_gid), (int(dmi.uid[row]), int(dmi.gid[row]))),
            ("modification time", state.st_mtime_ns, inode.mtime_ns(dmi, row)),
            ("xattrs", attributes.xattrs(fd), dict(dmi.xattrs(row))),
        ]
        if kind is not FileKind.SYMLINK:
            facts.append(("mode", stat.S_IMODE(state.st_mode), int(dmi.mode[row])))
        if kind in (FileKind.BLOCK, FileKind.CHARACTER):
            facts.append(("device number", device, int(dmi.device[row])))
        if kind is FileKind.REGULAR:
            facts.append(("size", state.st_size, int(dmi.size[row])))
        if kind is not FileKind.DIRECTORY:
            facts.append(("number of names", state.st_nlink, len(self.plan.names[row])))
        if kind in FLAGGED:
            facts.append(("flags", attributes.flags(fd), int(dmi.attr_flags[row])))
            facts.append(("project id", attributes.project(fd), int(dmi.project[row])))
        for what, found, wanted in facts:
            self._require(found == wanted, row, f"{what}: {found!r}, not {wanted!r}")

    def _same_content(self, fd: int, row: int) -> None:
        digest = ContentDigest()
        for offset, length in data_ranges(self.dmi, row):
            at = offset
            while at < offset + length:
                part = os.pread(fd, min(_READ_BYTES, offset + length - at), at)
                self._require(bool(part), row, "it is shorter")
                digest.update(part)
                at += len(part)
        for offset, length in hole_ranges(self.dmi, row):
            self._require(inode.reads_as_zeros(fd, offset, length), row, f"there is data at {offset} where it has a hole")
        self._require(digest.end(int(self.dmi.size[row])) == self.applied.contents.get(row), row, "its content")
        self.bytes += digest.length_bytes

    def _require(self, holds: bool, row: int, what: str) -> None:
        if not holds:
            raise VerifyFailed(f"{name_of(self.dmi, row)} does not read back as it was stored", cause=what)
