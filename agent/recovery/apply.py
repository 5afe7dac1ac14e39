"""Storing a plan into the mounted clone: content, then names, then what the names disturbed.

Nothing here can leave the mount: inodes are opened by handle, names are single components relative to an open directory, and no link is
followed.
Whatever changes its name goes through a stage (a private directory in the root), so swaps, cycles and replacements need no order.
Everything happens on a clone that is thrown away if we die here.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from agent.contract.dmi import Dmi, FileKind, Side
from agent.contract.errors import SalvageFailed
from agent.contract.messages import FileOutcome, Outcome
from agent.recovery import inode
from agent.recovery.content import Chunk, Ending
from agent.recovery.plan import UNLISTED, Folder, Placement, Plan, Slot
from agent.recovery.source import Source
from agent.recovery.tree import FLAGGED, LOCKS, Handle, Tree
from agent.system import attributes
from agent.system.failpoint import failpoint
from agent.system.handles import identity_at

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_LOST_FOUND = b"lost+found"
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
_WRITE = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW
_PATH = os.O_PATH | os.O_NOFOLLOW

Tick = Callable[[int], None]


@dataclass(slots=True)
class Applied:
    """What was stored: the digest of each regular file's content, handles of new inodes, and what could not be stored."""

    contents: dict[int, bytes] = field(default_factory=dict)
    made: dict[int, Handle] = field(default_factory=dict)
    unlisted: dict[Folder, Handle] = field(default_factory=dict)
    excluded: dict[int, FileOutcome] = field(default_factory=dict)


def apply_plan(plan: Plan, dmi: Dmi, source: Source, mount_fd: int, tick: Tick) -> Applied:
    """Store the plan and return what was stored; ``tick`` is called with the number of files stored so far.

    ``source`` is the version of what is created or updated: not that of the plan's own side. With files in ``excluded`` (of a roll forward
    only) the clone is of no use: salvage begins again without them. SalvageFailed if the clone is not what the DMI says; OSError as the
    filesystem has it.
    """
    done = Applied()
    tree = Tree(dmi, mount_fd, done.made, done.unlisted, side=plan.side)
    try:
        _Application(plan, dmi, tree, done, source, tick).run()
    finally:
        tree.close()
    return done


class _Application:
    def __init__(self, plan: Plan, dmi: Dmi, tree: Tree, done: Applied, source: Source, tick: Tick) -> None:
        self.plan, self.dmi, self.tree, self.done, self.source, self.tick = plan, dmi, tree, done, source, tick
        self.fresh = frozenset(plan.create)
        self.stage_name = b".landfall-stage-" + secrets.token_hex(8).encode()
        self.stage_fd = -1
        self.from_nothing = dmi.head.base.counter == 0
        self.stored = 0

    def run(self) -> None:
        root_fd = self.tree.folder(self.plan.root)
        self.tree.find(self.plan.unlisted())
        os.mkdir(self.stage_name, 0o700, dir_fd=root_fd)
        self.stage_fd = os.open(self.stage_name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root_fd)
        try:
            self._remove_files()
            if self.from_nothing:
                self._take_over_lost_found(root_fd)
            self._store_without_content()
            self._store_regular()
            if self.done.excluded:
                return
            failpoint("recovery.before_namespace")
            self._change_names()
            failpoint("recovery.after_namespace")
            self._finish_folders()
        finally:
            os.close(self.stage_fd)
        os.rmdir(self.stage_name, dir_fd=root_fd)
        self._settle()

    # Content.

    def _remove_files(self) -> None:
        """Remove what was deleted, directories apart, first of all: it makes room."""
        for placement in self.plan.remove:
            if self._kind(placement.row) is not FileKind.DIRECTORY:
                self.tree.unlocked(placement.row)
                for slot in placement.leave:
                    self._expect(slot, placement.row)
                    os.unlink(slot.name, dir_fd=self.tree.folder(slot.folder))

    def _take_over_lost_found(self, root_fd: int) -> None:
        """Let the directory that mkfs makes be the source's, or be gone if the source has none."""
        try:
            if not stat.S_ISDIR(os.stat(_LOST_FOUND, dir_fd=root_fd, follow_symlinks=False).st_mode):
                return
        except FileNotFoundError:
            return
        slot = Slot(self.plan.root, _LOST_FOUND)
        row = next((row for row in self.plan.create if slot in self.plan.names[row]), UNLISTED)
        if row != UNLISTED and self._kind(row) is FileKind.DIRECTORY:
            os.rename(_LOST_FOUND, _staged(row), src_dir_fd=root_fd, dst_dir_fd=self.stage_fd)
            self._learn(row)
        else:
            os.rmdir(_LOST_FOUND, dir_fd=root_fd)

    def _store_without_content(self) -> None:
        """Make new directories (their attributes come after their members) and store symlinks and special files."""
        for row in self.plan.create:
            kind = self._kind(row)
            if kind is FileKind.REGULAR or row in self.done.made:
                continue
            if not self._try(row, partial(self._make, row)):
                continue
            self._learn(row)
            if kind is not FileKind.DIRECTORY:
                self._try(row, partial(self._attribute_staged, row))
            self._count(row)
        for row in self.plan.update:
            if self._kind(row) in FLAGGED:
                continue
            with self.tree.row(row, _PATH) as fd:
                self._try(row, partial(self._attribute, fd, row))
            self._count(row)

    def _store_regular(self) -> None:
        """Store regular files, those of the base first, then the smallest: where room is scarce, most files fit."""
        rows = sorted(
            (row for row in (*self.plan.create, *self.plan.update) if self._kind(row) is FileKind.REGULAR),
            key=lambda row: (row in self.fresh, int(self.dmi.size[row]), row),
        )
        fd, opened = -1, UNLISTED
        try:
            for item in self.source.contents(rows):
                row = item.row
                if row != opened:
                    if fd >= 0:
                        os.close(fd)
                    fd, opened = -1, row
                    failpoint("recovery.file")
                    fd = self._open_regular(row)
                if row in self.done.excluded:
                    continue
                if isinstance(item, Chunk):
                    write = inode.write if self._anew(row) else inode.write_changed
                    self._try(row, partial(write, fd, item.offset, item.data), fd)
                else:
                    self._end_regular(item, fd)
        finally:
            if fd >= 0:
                os.close(fd)

    def _open_regular(self, row: int) -> int:
        """Return a file open for writing, with its size and holes."""
        if row in self.fresh:
            if not self._try(row, partial(self._make, row)):
                return -1
            fd = os.open(_staged(row), _WRITE | os.O_CLOEXEC, dir_fd=self.stage_fd)
            self.done.made[row] = Handle(os.fstat(fd).st_ino, attributes.generation(fd))
        else:
            self.tree.unlocked(row)
            with self.tree.row(row, _WRITE) as opened:
                fd = os.dup(opened)
        self._try(row, partial(inode.prepare, fd, *self._shape(row), anew=self._anew(row)), fd)
        return fd

    def _shape(self, row: int) -> tuple[int, list[tuple[int, int]]]:
        return self.source.state(row).size, self.source.ranges(row)

    def _anew(self, row: int) -> bool:
        """Whether nothing of what a file has may stay: it was made here, or lives in its inode, or is a target's that is not whole."""
        return row in self.fresh or self.plan.side is Side.TARGET or bool(self.dmi.payload_of(row))

    def _end_regular(self, ending: Ending, fd: int) -> None:
        row = ending.row
        if ending.damage:
            self.done.excluded[row] = FileOutcome(row, Outcome.DAMAGED, ending.damage)
            return
        finish, attribute = partial(inode.finish, fd, self.source.state(row).size), partial(self._attribute, fd, row)
        if self._try(row, finish, fd) and self._try(row, attribute, fd):
            self.done.contents[row] = ending.digest
            self._count(row)

    def _make(self, row: int) -> None:
        inode.make(self.source.state(row), self.stage_fd, _staged(row))

    def _learn(self, row: int) -> None:
        self.done.made[row] = Handle(*identity_at(self.stage_fd, _staged(row)))

    def _attribute_staged(self, row: int) -> None:
        fd = os.open(_staged(row), _PATH | os.O_CLOEXEC, dir_fd=self.stage_fd)
        try:
            self._attribute(fd, row)
        finally:
            os.close(fd)

    def _attribute(self, fd: int, row: int) -> None:
        state = self.source.state(row)
        inode.set_attributes(fd, state)
        inode.set_mtime(fd, state)

    def _try(self, row: int, act: Callable[[], None], fd: int = -1) -> bool:
        """Do ``act``; where there is no room for it exclude the row and give back what it has taken."""
        if row in self.done.excluded:
            return False
        try:
            act()
        except OSError as error:
            if error.errno not in NO_ROOM or self._kind(row) is FileKind.DIRECTORY or self.plan.side is Side.TARGET:
                raise
            outcome = Outcome.ABSENT if row in self.fresh else Outcome.KEPT
            self.done.excluded[row] = FileOutcome(row, outcome, "there is no room for it on the second operational volume")
            if fd >= 0 and row in self.fresh:
                os.ftruncate(fd, 0)
            return False
        return True

    # Names.

    def _change_names(self) -> None:
        removed = [placement for placement in self.plan.remove if self._kind(placement.row) is FileKind.DIRECTORY]
        for placement in (*self.plan.move, *removed):
            if placement.row not in self.fresh:
                self._detach(placement)
        for placement in self.plan.move:
            self._attach(placement)
        self._put_aside()
        for placement in removed:
            try:
                os.rmdir(_staged(placement.row), dir_fd=self.stage_fd)
            except OSError as error:
                raise SalvageFailed(f"deleted directory {self.dmi.inode[placement.row]} is not empty", cause=str(error)) from error

    def _detach(self, placement: Placement) -> None:
        """Take away the names an inode gives up; the last one goes into the stage if no other name stays."""
        self.tree.unlocked(placement.row)
        staged = bool(placement.stay)
        for slot in placement.leave:
            self._expect(slot, placement.row)
            folder = self.tree.folder(slot.folder)
            if staged:
                os.unlink(slot.name, dir_fd=folder)
            else:
                os.rename(slot.name, _staged(placement.row), src_dir_fd=folder, dst_dir_fd=self.stage_fd)
                staged = True

    def _attach(self, placement: Placement) -> None:
        """Give an inode its new names: links from a name that stays, or from the stage, and at last out of the stage."""
        keeps = bool(placement.stay or placement.aside)  # it is still needed in the stage, or never was there
        for number, slot in enumerate(placement.take, 1):
            if self.tree.stat(slot) is not None:
                raise SalvageFailed(f"the name {slot.name!r} in directory {slot.folder.inode} is taken")
            if number == len(placement.take) and not keeps:
                os.rename(_staged(placement.row), slot.name, src_dir_fd=self.stage_fd, dst_dir_fd=self.tree.folder(slot.folder))
            else:
                self._link(placement, self.tree.folder(slot.folder), slot.name)

    def _link(self, placement: Placement, folder_fd: int, name: bytes) -> None:
        target_fd = os.dup(folder_fd)  # asking for the source's directory may close the other
        try:
            if placement.stay:
                source = placement.stay[0]
                self._expect(source, placement.row)
                os.link(source.name, name, src_dir_fd=self.tree.folder(source.folder), dst_dir_fd=target_fd, follow_symlinks=False)
            else:
                os.link(_staged(placement.row), name, src_dir_fd=self.stage_fd, dst_dir_fd=target_fd, follow_symlinks=False)
        finally:
            os.close(target_fd)

    def _put_aside(self) -> None:
        """Give held files whose names are taken their base paths below a folder of their own, which only root may enter."""
        aside = [placement for placement in self.plan.move if placement.aside]
        if not aside:
            return
        root_fd = self.tree.folder(self.plan.root)
        os.mkdir(self.plan.held_name, 0o700, dir_fd=root_fd)
        for placement in aside:
            for number, path in enumerate(placement.aside, 1):
                *above, name = path.split(b"/")
                folder = os.open(self.plan.held_name, _READ | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
                try:
                    for component in above:
                        folder = _enter(folder, component)
                    if placement.stay or number < len(placement.aside):
                        self._link(placement, folder, name)
                    else:
                        os.rename(_staged(placement.row), name, src_dir_fd=self.stage_fd, dst_dir_fd=folder)
                finally:
                    os.close(folder)

    def _expect(self, slot: Slot, row: int) -> None:
        found = self.tree.stat(slot)
        if found is None or found.st_ino != int(self.dmi.inode[row]) or stat.S_IFMT(found.st_mode) >> 12 != self._kind(row):
            raise SalvageFailed(f"the name {slot.name!r} in directory {slot.folder.inode} is not inode {self.dmi.inode[row]} in the clone")

    # What remains.

    def _finish_folders(self) -> None:
        """Give stored directories their attributes, now that nothing in them changes any more."""
        for row in (*self.plan.create, *self.plan.update, self.plan.root_row):
            if row != UNLISTED and self._kind(row) is FileKind.DIRECTORY:
                with self.tree.row(row, _READ) as fd:
                    self.tree.touch(fd)
                    inode.set_attributes(fd, self.source.state(row))
                if row not in self.fresh:
                    self._count(row)

    def _settle(self) -> None:
        """Set directories' times, then flags: the source's for what was stored, their own for what was only touched."""
        stored = {row: self._handle(row) for row in (*self.plan.create, *self.plan.update, self.plan.root_row) if row != UNLISTED}
        removed = {self._handle(placement.row) for placement in self.plan.remove}
        by_handle = {handle: row for row, handle in stored.items()}
        for handle, times in self.tree.touched.items():
            if handle not in removed:
                row = by_handle.get(handle, UNLISTED)
                mtime_ns = times.mtime_ns if row == UNLISTED else self.source.state(row).mtime_ns
                with self._reopened(handle) as fd:
                    os.utime(fd, ns=(times.atime_ns, mtime_ns))
        flags = {handle: value for handle, value in self.tree.lifted.items() if handle not in removed and handle not in by_handle}
        for row, handle in stored.items():
            if self._kind(row) in FLAGGED and (wanted := self.source.state(row).flags) & LOCKS:
                flags[handle] = wanted
        for handle, value in flags.items():
            with self._reopened(handle) as fd:
                attributes.set_flags(fd, value)

    def _handle(self, row: int) -> Handle:
        if int(self.dmi.inode[row]) == self.plan.root.inode:
            return Handle(os.fstat(self.tree.mount_fd).st_ino, attributes.generation(self.tree.mount_fd))
        return self.tree.handle(row)

    def _reopened(self, handle: Handle) -> _Opened:
        root = Handle(os.fstat(self.tree.mount_fd).st_ino, attributes.generation(self.tree.mount_fd))
        if handle == root:
            return _Opened(os.open(".", _READ | os.O_CLOEXEC, dir_fd=self.tree.mount_fd))
        return _Opened(self.tree.open(handle, _READ))

    def _kind(self, row: int) -> FileKind:
        return FileKind(int(self.dmi.kind[row]))

    def _count(self, row: int) -> None:
        if row not in self.done.excluded:
            self.stored += 1
            self.tick(self.stored)


class _Opened:
    """A descriptor that is closed at the end of a context."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> int:
        return self._fd

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _staged(row: int) -> bytes:
    """Return the name of a row's inode in the stage."""
    return b"%d" % row


def _enter(folder: int, component: bytes) -> int:
    """Return the directory ``component`` in ``folder``, made if need be; ``folder`` is closed."""
    try:
        with suppress(FileExistsError):
            os.mkdir(component, 0o700, dir_fd=folder)
        return os.open(component, _READ | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
