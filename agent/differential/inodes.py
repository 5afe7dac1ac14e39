"""Attributes of changed inodes, read through the mount of a frozen generation by inode number: the kernel is the parser.

Regular files and directories are opened for reading (chattr flags and project ids need that), everything else only as O_PATH,
because opening a FIFO or device has effects. No read here can change anything: generations are read-only for the kernel too.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Final

from agent.contract.dmi import FileKind
from agent.contract.errors import DeviceFailed
from agent.contract.identity import FilesystemKind
from agent.differential.reader import View
from agent.system import attributes, handles

MAX_INLINE_BYTES: Final = 64 * 1024
"""More than any inode holds; what is larger and has no extents is a hole."""

_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOATIME
_SECOND_NS: Final = 10**9


@dataclass(frozen=True, slots=True)
class Attributes:
    """What is promised of one inode, and the content that travels with it."""

    kind: int  # dmi.FileKind
    mode: int
    uid: int
    gid: int
    nlink: int
    size: int
    mtime_s: int
    mtime_ns: int
    device: int
    project: int
    flags: int
    payload: bytes
    xattrs: tuple[tuple[bytes, bytes], ...]


def nameless(kind: int) -> Attributes:
    """Return what stands for an inode that is open but unlinked: it cannot be opened by its number, and is nobody's loss."""
    return Attributes(kind, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b"", ())


@dataclass(frozen=True, slots=True)
class Subject:
    """An inode whose attributes are asked: a name of it, and whether it has extents (else its content may live in the inode)."""

    inode: int
    generation: int
    kind: int
    path: bytes
    mapped: bool


def read_attributes(view: View, filesystem: FilesystemKind, subject: Subject) -> Attributes:
    """Return the attributes of an inode that has a name. DeviceFailed if it cannot be read."""
    try:
        fd = _open(view, filesystem, subject)
        try:
            return _attributes(fd, subject)
        finally:
            os.close(fd)
    except OSError as error:
        raise DeviceFailed(
            f"cannot read the attributes of inode {subject.inode} ({os.fsdecode(subject.path)!r})",
            cause=f"{error.strerror} (errno {error.errno})",
        ) from error


def _open(view: View, filesystem: FilesystemKind, subject: Subject) -> int:
    flags = _READ if subject.kind in (FileKind.REGULAR, FileKind.DIRECTORY) else os.O_PATH | os.O_NOFOLLOW
    try:
        return handles.open_inode(view.mount_fd, filesystem, subject.inode, subject.generation, flags)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    # ext4 finds no ".." in a directory that lives in its inode, so a handle does not lead to one that nobody has looked up yet.
    return handles.open_beneath(view.mount_fd, subject.path or b".", flags)


def _attributes(fd: int, subject: Subject) -> Attributes:
    kind, now = subject.kind, os.fstat(fd)
    if now.st_mode >> 12 != kind or now.st_ino != subject.inode:
        raise OSError(errno.EUCLEAN, f"the device says type {kind}, the mount inode {now.st_ino} of type {now.st_mode >> 12}")
    project = flags = 0
    if kind in (FileKind.REGULAR, FileKind.DIRECTORY):
        project, flags = attributes.project(fd), attributes.flags(fd)
    payload = b""
    if kind == FileKind.SYMLINK:
        payload = os.readlink(b"", dir_fd=fd)
    elif kind == FileKind.REGULAR and not subject.mapped and 0 < now.st_size <= MAX_INLINE_BYTES:
        payload = _inline_content(fd, now.st_size)
    seconds, nanoseconds = divmod(now.st_mtime_ns, _SECOND_NS)
    node = kind in (FileKind.CHARACTER, FileKind.BLOCK)
    return Attributes(
        kind=kind,
        mode=now.st_mode & 0o7777,
        uid=now.st_uid,
        gid=now.st_gid,
        nlink=now.st_nlink,
        size=now.st_size,
        mtime_s=seconds,
        mtime_ns=nanoseconds,
        device=os.major(now.st_rdev) << 32 | os.minor(now.st_rdev) if node else 0,
        project=project,
        flags=flags,
        payload=payload,
        xattrs=tuple(sorted(attributes.xattrs(fd).items())),
    )


def _inline_content(fd: int, size: int) -> bytes:
    """Return content that lives in the inode, nothing for a file that is all hole."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return b""
        raise
    content = os.pread(fd, size, 0)
    if len(content) != size:
        raise OSError(errno.EIO, f"{len(content)} of {size} bytes of content in the inode")
    return content
