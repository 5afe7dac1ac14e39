"""What makes single files out of a generation: each directory and inode with its attributes, then its content, in the order to make them.

Nothing here can leave the generation: every path is resolved by openat2(2) beneath its root and follows no link. What cannot be read is
said and ends nothing else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from agent.contract.errors import RequestRefused
from agent.system import attributes
from agent.system.handles import open_beneath

PORTION_BYTES: Final = 1 << 20
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW
FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a file is in the generation, and where it is to be: relative to the roots. ``at`` has at least as many parts as ``path``."""

    path: bytes
    at: bytes

    def above(self, levels: int) -> Spot:
        """Return the spot of the directory so many levels above, which has to be a part of both paths; itself for none."""
        if not levels:
            return self
        return Spot(b"/".join(self.path.split(b"/")[:-levels]), b"/".join(self.at.split(b"/")[:-levels]))


@dataclass(frozen=True, slots=True)
class Attributes:
    """What salvages promise of an inode, its type and permissions in ``mode``."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    project: int = 0
    flags: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory. One that is not ``wanted`` itself is only to be there for what is below it."""

    spot: Spot
    attributes: Attributes
    wanted: bool


@dataclass(frozen=True, slots=True)
class Inode:
    """Anything else; its content follows until ``Whole``, where it has some. ``link`` is what a symlink says."""

    spot: Spot
    attributes: Attributes
    size_bytes: int
    device: int = 0
    link: bytes = b""


@dataclass(frozen=True, slots=True)
class Content:
    """A part of the content of the last inode; what no part covers is a hole."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Whole:
    """The last inode is complete."""


@dataclass(frozen=True, slots=True)
class Refused:
    """What is at this spot cannot be had, and why; if its inode came before, what came of it is not to be used."""

    spot: Spot
    reason: str


Item = Directory | Inode | Content | Whole | Refused


def refuse_unplain(paths: Iterable[bytes]) -> None:
    """RequestRefused for a path that could lead elsewhere than below the root."""
    for path in paths:
        if not path or any(part in (b"", b".", b"..") or b"\0" in part for part in path.split(b"/")):
            raise RequestRefused(f"{os.fsdecode(path)!r} is no path below the root of the volume", fix="Give it as `landfall losses` does.")


def gather(source_fd: int, spots: Iterable[Spot], *, with_below: bool) -> Iterator[Item]:
    """Yield what makes the spots, parents first, each parent once; of directories, ``with_below``, all that is in them."""
    seen: set[Spot] = set()
    for spot in spots:
        for levels in range(spot.path.count(b"/"), 0, -1):
            parent = spot.above(levels)
            if parent not in seen:
                seen.add(parent)
                yield from _parent(source_fd, parent)
        yield from _gather(source_fd, spot, with_below=with_below)


def _parent(source_fd: int, spot: Spot) -> Iterator[Item]:
    try:
        folder_fd = open_beneath(source_fd, spot.path, FOLDER)
    except OSError:
        return  # what is below it cannot be read either, and says so
    try:
        yield Directory(spot, _attributes(folder_fd), wanted=False)
    finally:
        os.close(folder_fd)


def _gather(source_fd: int, spot: Spot, *, with_below: bool) -> Iterator[Item]:
    try:
        looked_fd = open_beneath(source_fd, spot.path, _LOOK)
    except OSError as error:
        yield Refused(spot, error.strerror or str(error))
        return
    try:
        if stat.S_ISDIR(os.fstat(looked_fd).st_mode):
            yield from _directory(source_fd, spot, with_below=with_below)
        else:
            yield from _inode(looked_fd, spot)
    except OSError as error:
        yield Refused(spot, error.strerror or str(error))
    finally:
        os.close(looked_fd)


def _directory(source_fd: int, spot: Spot, *, with_below: bool) -> Iterator[Item]:
    folder_fd = open_beneath(source_fd, spot.path, FOLDER)
    try:
        yield Directory(spot, _attributes(folder_fd), wanted=True)
        names = sorted(os.fsencode(name) for name in os.listdir(folder_fd)) if with_below else []
    finally:
        os.close(folder_fd)
    for name in names:
        yield from _gather(source_fd, Spot(spot.path + b"/" + name, spot.at + b"/" + name), with_below=True)


def _inode(looked_fd: int, spot: Spot) -> Iterator[Item]:
    about = os.fstat(looked_fd)
    if not stat.S_ISREG(about.st_mode):
        link = os.fsencode(os.readlink(b"", dir_fd=looked_fd)) if stat.S_ISLNK(about.st_mode) else b""
        yield Inode(spot, _attributes(looked_fd), 0, about.st_rdev, link)
        yield Whole()
        return
    read_fd = os.open(f"/proc/self/fd/{looked_fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield Inode(spot, _attributes(read_fd), about.st_size)
        yield from _content(read_fd, about.st_size)
        yield Whole()
    finally:
        os.close(read_fd)


def _content(read_fd: int, size: int) -> Iterator[Content]:
    """Yield what is data."""
    at = 0
    while at < size:
        try:
            at = os.lseek(read_fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        end = min(os.lseek(read_fd, at, os.SEEK_HOLE), size)
        while at < end:
            part = os.pread(read_fd, min(PORTION_BYTES, end - at), at)
            if not part:
                raise OSError(5, "the file ends before its size")
            yield Content(at, part)
            at += len(part)


def _attributes(fd: int) -> Attributes:
    about = os.fstat(fd)
    flagged = stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)
    return Attributes(
        about.st_mode,
        about.st_uid,
        about.st_gid,
        about.st_mtime_ns,
        attributes.project(fd) if flagged else 0,
        attributes.flags(fd) if flagged else 0,
        tuple(sorted(attributes.xattrs(fd).items())),
    )
