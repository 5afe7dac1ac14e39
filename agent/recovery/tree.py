"""A mounted clone: its inodes reached by handle, its names as (directory, component), nothing by path.

What is opened to be changed is made changeable first: immutable and append-only flags are lifted and remembered, and so are the times of a
directory, so that ``settle`` can give both back.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from agent.contract.dmi import Dmi, FileKind, Side
from agent.contract.errors import SalvageFailed
from agent.recovery.plan import UNLISTED, Folder, Slot
from agent.system import attributes
from agent.system.handles import open_beneath, open_inode

_OPEN_FOLDERS: Final = 256
LOCKS: Final = attributes.IMMUTABLE | attributes.APPEND | attributes.PROJECT_INHERIT
"""Flags that forbid to change an inode or its names, or to move a file of another project into a directory: they are set last of all."""
FLAGGED: Final = (FileKind.REGULAR, FileKind.DIRECTORY)
"""Kinds of inode that can be opened, and so have chattr flags and a project id that can be set."""


class Handle(NamedTuple):
    """An inode for ever: its number and generation."""

    inode: int
    generation: int


@dataclass(frozen=True, slots=True)
class Times:
    """Access and modification time of a directory before it was touched, in ns."""

    atime_ns: int
    mtime_ns: int


class Tree:
    """One mount of the clone. ``made`` are the handles of inodes that the salvage made, ``unlisted`` those that ``find`` found."""

    def __init__(
        self, dmi: Dmi, mount_fd: int, made: dict[int, Handle], unlisted: dict[Folder, Handle], *, read_only: bool = False, side: Side
    ) -> None:
        """``side``: the generation whose names are there."""
        self.dmi = dmi
        self.read_only = read_only
        self.mount_fd = mount_fd
        self.made = made
        self.lifted: dict[Handle, int] = {}
        self.touched: dict[Handle, Times] = {}
        self._unlisted = unlisted
        self._folders: OrderedDict[Folder, int] = OrderedDict()
        self._root = Folder(dmi.head.root_inode)
        if any("inline_data" in word for word in dmi.head.mkfs_arguments):
            self._look_up_folders(side)

    def handle(self, row: int) -> Handle:
        """Return the handle of a row's inode, made here or there before."""
        return self.made.get(row) or Handle(int(self.dmi.inode[row]), int(self.dmi.inode_generation[row]))

    def find(self, folders: dict[Folder, bytes]) -> None:
        """Learn the handles of directories that the DMI does not list, by their path; to be called before names change."""
        for folder, path in folders.items():
            if folder.inode == self._root.inode:
                continue
            try:
                fd = open_beneath(self.mount_fd, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError as error:
                raise SalvageFailed(f"there is no directory {path!r} in the clone", cause=str(error)) from error
            try:
                _require(os.fstat(fd).st_ino == folder.inode, f"the directory {path!r} of the clone is not inode {folder.inode}")
                self._unlisted[folder] = Handle(folder.inode, attributes.generation(fd))
            finally:
                os.close(fd)

    @contextmanager
    def row(self, row: int, flags: int) -> Iterator[int]:
        """Open a row's inode, proved to be of the kind that the DMI says. The root's row is the root."""
        if int(self.dmi.inode[row]) == self._root.inode:
            fd = os.open(".", flags | os.O_CLOEXEC, dir_fd=self.mount_fd)
        else:
            fd = self.open(self.handle(row), flags)
        try:
            kind = stat.S_IFMT(os.fstat(fd).st_mode) >> 12
            _require(kind == int(self.dmi.kind[row]), f"inode {self.dmi.inode[row]} is of another kind than the DMI says")
            yield fd
        finally:
            os.close(fd)

    def unlocked(self, row: int) -> None:
        """Lift what forbids to change a row's inode, if it can have such flags."""
        if int(self.dmi.kind[row]) in FLAGGED:
            with self.row(row, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW) as fd:
                self._lift(fd)

    def folder(self, folder: Folder) -> int:
        """Return a descriptor of a directory that is about to be changed. It stays this object's, and is good until the next call."""
        if folder == self._root:
            self.touch(self.mount_fd)
            return self.mount_fd
        if folder in self._folders:
            self._folders.move_to_end(folder)
            return self._folders[folder]
        fd = self._open_folder(folder)
        self._folders[folder] = fd
        if len(self._folders) > _OPEN_FOLDERS:
            os.close(self._folders.popitem(last=False)[1])
        self.touch(fd)
        return fd

    def touch(self, fd: int) -> None:
        """Remember a directory's times and flags as they were before the first change, and make it changeable."""
        if self.read_only:
            return
        state = os.fstat(fd)
        self.touched.setdefault(Handle(state.st_ino, attributes.generation(fd)), Times(state.st_atime_ns, state.st_mtime_ns))
        self._lift(fd)

    def stat(self, slot: Slot) -> os.stat_result | None:
        """Return what a name stands for, None if nothing."""
        try:
            return os.stat(slot.name, dir_fd=self.folder(slot.folder), follow_symlinks=False)
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Close the directories that are held open; the mount itself is the caller's."""
        while self._folders:
            os.close(self._folders.popitem()[1])

    def _look_up_folders(self, side: Side) -> None:
        """Let the kernel learn the way to every directory that names lie in, before names change.

        ext4 does not find the parent of a directory that lives in its inode, so it opens none by handle that nobody has looked up
        (ESTALE, seen on Linux 6.18).
        """
        rows = np.flatnonzero(self.dmi.name_side == side).tolist()
        paths = {path for row in rows for path in (self.dmi.path(row), self.dmi.path(row).rpartition(b"/")[0])}
        for path in paths - {b""}:
            try:
                os.close(open_beneath(self.mount_fd, path, os.O_PATH | os.O_NOFOLLOW))
            except OSError:
                continue  # a name that is not there; whoever needs it says so

    def _open_folder(self, folder: Folder) -> int:
        if folder.row != UNLISTED:
            handle = self.handle(folder.row)
        elif folder in self._unlisted:
            handle = self._unlisted[folder]
        else:
            raise SalvageFailed(f"directory {folder.inode} is not known in the clone")
        fd = self.open(handle, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            os.close(fd)
            raise SalvageFailed(f"inode {folder.inode}, in which names lie, is no directory")
        return fd

    def open(self, handle: Handle, flags: int) -> int:
        """Return a descriptor of an inode, the caller's to close. SalvageFailed if the filesystem has no such inode."""
        try:
            return open_inode(self.mount_fd, self.dmi.head.filesystem, handle.inode, handle.generation, flags)
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.EINVAL, errno.ENOENT):
                raise
            raise SalvageFailed(f"there is no inode {handle.inode} of generation {handle.generation}", cause=str(error)) from error

    def _lift(self, fd: int) -> None:
        now = attributes.flags(fd)
        if now & LOCKS:
            self.lifted.setdefault(Handle(os.fstat(fd).st_ino, attributes.generation(fd)), now)
            attributes.set_flags(fd, now & ~LOCKS)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise SalvageFailed(sentence)
