"""Single files into the operational volume while clients use it: to the side, or in place.

Nothing here can leave the volume: every path is resolved by openat2(2) beneath its root and follows no link, and what is made is made
relative to an open directory. A file comes into being without a name (open(2), O_TMPFILE) and takes its place in one step, so a reader sees
the old or the new one, whole. Hard links among the files are not kept: each is a file of its own then.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from agent.contract.errors import ProtocolViolated
from agent.recovery.gather import FOLDER, Attributes, Content, Directory, Inode, Item, Refused, Spot, Whole, gather, refuse_unplain
from agent.recovery.inode import write
from agent.recovery.tree import LOCKS
from agent.system import attributes
from agent.system.failpoint import failpoint
from agent.system.handles import open_beneath

_LOOK: Final = os.O_PATH | os.O_NOFOLLOW
_PREFIX: Final = b".landfall-restore-"

Guard = Callable[[Directory | Inode, os.stat_result], str]
"""Told what is to come and what is in its place; returns why that must stay, or nothing."""


@dataclass(slots=True)
class Restored:
    """What was restored: numbers of files and of the bytes of their content, and the spots that were not, each with the reason."""

    files: int = 0
    length_bytes: int = 0
    refused: list[Refused] = field(default_factory=list)


def replace_anything(coming: Directory | Inode, there: os.stat_result) -> str:
    """Let nothing stay."""
    return ""


def restore(source_fd: int, target_fd: int, spots: Iterable[Spot], *, with_below: bool, guard: Guard = replace_anything) -> Restored:
    """Return what came of bringing ``spots`` from one root to another, directories ``with_below`` with all that is in them.

    RequestRefused for a path that could lead elsewhere, before anything is done. What the filesystem refuses is told for each spot.
    If we die here, each file is old or new; one with a name of ours may lie beside it, if we die just before a rename.
    """
    wanted = tuple(spots)
    refuse_unplain(path for spot in wanted for path in (spot.path, spot.at))
    with Restorer(target_fd, guard) as restorer:
        for item in gather(source_fd, wanted, with_below=with_below):
            restorer.take(item)
    return restorer.done


@dataclass(frozen=True, slots=True)
class _Making:
    """An inode that is being made: a file without a name, anything else under a ``temporary`` one."""

    inode: Inode
    parent_fd: int
    temporary: bytes
    made_fd: int

    @property
    def name(self) -> bytes:
        return self.inode.spot.at.rpartition(b"/")[2]

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.inode.attributes.mode)


class Restorer:
    """Makes what it is given, in the order of ``gather``. At its end directories get the times that they are to have."""

    def __init__(self, target_fd: int, guard: Guard = replace_anything) -> None:
        self.done = Restored()
        self._target_fd = target_fd
        self._guard = guard
        self._making: _Making | None = None
        self._directories: dict[bytes, int] = {}  # those that were made or replaced, and their times

    def __enter__(self) -> Restorer:
        return self

    def __exit__(self, *_: object) -> None:
        self._abandon()
        for at in sorted(self._directories, key=lambda path: path.count(b"/"), reverse=True):
            with suppress(OSError):
                folder_fd = open_beneath(self._target_fd, at, FOLDER)
                try:
                    _set_mtime(folder_fd, self._directories[at])
                finally:
                    os.close(folder_fd)

    def take(self, item: Item) -> None:
        """Do the next thing; ProtocolViolated for a part of a file that is not within it."""
        match item:
            case Directory():
                self._directory(item)
            case Inode():
                self._begin(item)
            case Content():
                self._write(item)
            case Whole():
                self._finish()
            case Refused():
                self._refuse(item.spot, item.reason)

    def _directory(self, item: Directory) -> None:
        """Have a directory: what else is in one that is there stays there."""
        self._abandon()
        try:
            parent_fd, name = self._parent(item.spot.at)
            try:
                is_new = True
                try:
                    os.mkdir(name, 0o700, dir_fd=parent_fd)
                except FileExistsError:
                    is_new = False
                folder_fd = open_beneath(parent_fd, name, FOLDER)
                try:
                    if is_new or (item.wanted and not self._guard(item, os.fstat(folder_fd))):
                        _set_attributes(folder_fd, item.attributes)
                        self._directories[item.spot.at] = item.attributes.mtime_ns
                finally:
                    os.close(folder_fd)
            finally:
                os.close(parent_fd)
        except OSError as error:
            if item.wanted:  # of the others, what is below them says it
                self._refuse(item.spot, error.strerror or str(error))

    def _begin(self, inode: Inode) -> None:
        self._abandon()
        parent_fd = -1
        try:
            parent_fd, name = self._parent(inode.spot.at)
            if reason := self._kept(inode, parent_fd, name):
                self._refuse(inode.spot, reason)
            else:
                temporary = _PREFIX + secrets.token_hex(8).encode()
                self._making = _Making(inode, parent_fd, temporary, _made(inode, parent_fd, temporary))
                parent_fd = -1
        except OSError as error:
            self._refuse(inode.spot, error.strerror or str(error))
        finally:
            if parent_fd >= 0:
                os.close(parent_fd)

    def _write(self, part: Content) -> None:
        making = self._making
        if making is None:
            return  # it was refused before
        if not making.is_file or part.offset + len(part.data) > making.inode.size_bytes:
            raise ProtocolViolated("a part of a file is outside of it")
        try:
            write(making.made_fd, part.offset, memoryview(part.data))
            self.done.length_bytes += len(part.data)
        except OSError as error:
            self._refuse(making.inode.spot, error.strerror or str(error))

    def _finish(self) -> None:
        """Let what was made take its place. If we die before the rename the old file is there, after it the new one."""
        making = self._making
        if making is None:
            return
        try:
            _set_attributes(making.made_fd, making.inode.attributes)
            _set_mtime(making.made_fd, making.inode.attributes.mtime_ns)
            if making.is_file:
                os.fsync(making.made_fd)
            failpoint("restore.before_rename")
            if reason := self._placed(making):
                self._refuse(making.inode.spot, reason)
                return
            failpoint("restore.after_rename")
            os.fsync(making.parent_fd)
        except OSError as error:
            self._refuse(making.inode.spot, error.strerror or str(error))
            return
        self._making = None
        os.close(making.made_fd)
        os.close(making.parent_fd)
        self.done.files += 1

    def _placed(self, making: _Making) -> str:
        """Let an inode have its name; return why it must not. Where there is nothing, nobody else's file can come in between."""
        if making.is_file:
            unnamed = f"/proc/self/fd/{making.made_fd}"
            try:
                os.link(unnamed, making.name, dst_dir_fd=making.parent_fd, follow_symlinks=True)
            except FileExistsError:
                if reason := self._kept(making.inode, making.parent_fd, making.name):
                    return reason
                os.link(unnamed, making.temporary, dst_dir_fd=making.parent_fd, follow_symlinks=True)
            else:
                return ""
        elif reason := self._kept(making.inode, making.parent_fd, making.name):
            return reason
        os.rename(making.temporary, making.name, src_dir_fd=making.parent_fd, dst_dir_fd=making.parent_fd)
        return ""

    def _kept(self, inode: Inode, parent_fd: int, name: bytes) -> str:
        """Return why what is in the place of an inode has to stay, if there is something and it has to."""
        try:
            there = os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
        except FileNotFoundError:
            return ""
        return self._guard(inode, there)

    def _refuse(self, spot: Spot, reason: str) -> None:
        self._abandon()
        self.done.refused.append(Refused(spot, reason))

    def _abandon(self) -> None:
        """Take away what is half made."""
        making, self._making = self._making, None
        if making is None:
            return
        with suppress(OSError):
            os.unlink(making.temporary, dir_fd=making.parent_fd)
        os.close(making.made_fd)
        os.close(making.parent_fd)

    def _parent(self, at: bytes) -> tuple[int, bytes]:
        """Return a descriptor of the directory that ``at`` is to lie in, and its name there; what is missing of it is made."""
        *above, name = at.split(b"/")
        at_fd = os.open(".", FOLDER | os.O_CLOEXEC, dir_fd=self._target_fd)
        for part in above:
            try:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=at_fd)
                below_fd = open_beneath(at_fd, part, FOLDER)
            finally:
                os.close(at_fd)
            at_fd = below_fd
        return at_fd, name


def _made(inode: Inode, parent_fd: int, name: bytes) -> int:
    """Make an inode that is no directory, a file without a name; return a descriptor of it, for writing if it is a file."""
    mode = inode.attributes.mode
    if stat.S_ISREG(mode):
        made_fd = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=parent_fd)
        try:
            os.ftruncate(made_fd, inode.size_bytes)
        except BaseException:
            os.close(made_fd)
            raise
        return made_fd
    if stat.S_ISLNK(mode):
        os.symlink(inode.link, name, dir_fd=parent_fd)
    else:
        os.mknod(name, stat.S_IFMT(mode) | 0o600, inode.device, dir_fd=parent_fd)
    return open_beneath(parent_fd, name, _LOOK)


def _set_attributes(fd: int, wanted: Attributes) -> None:
    """Give an inode the attributes that salvages promise, but for the flags that would lock it: its name is to change yet."""
    path = f"/proc/self/fd/{fd}"
    os.chown(path, wanted.uid, wanted.gid)
    attributes.set_xattrs(fd, dict(wanted.xattrs))
    if not stat.S_ISLNK(wanted.mode):
        os.chmod(path, stat.S_IMODE(wanted.mode))
    if stat.S_ISREG(wanted.mode) or stat.S_ISDIR(wanted.mode):
        attributes.set_project(fd, wanted.project)
        attributes.set_flags(fd, wanted.flags & ~LOCKS)


def _set_mtime(fd: int, mtime_ns: int) -> None:
    os.utime(f"/proc/self/fd/{fd}", ns=(os.fstat(fd).st_atime_ns, mtime_ns))
