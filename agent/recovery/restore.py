"""Single files from a generation into the operational volume while clients use it: to the side, or in place.

Nothing here can leave either mount: every path is resolved by openat2(2) beneath its root and follows no link, and what is made is made
relative to an open directory. A file comes into being under a name of its own and takes its place by one rename, so a reader sees the old
or the new one, whole. Hard links among the files are not kept: each is a file of its own then.
"""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from agent.contract.errors import RequestRefused
from agent.recovery.inode import write
from agent.recovery.tree import LOCKS
from agent.system import attributes
from agent.system.handles import open_beneath

_PORTION_BYTES: Final = 1 << 20
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_PREFIX: Final = b".landfall-restore-"


@dataclass(slots=True)
class Restored:
    """What was restored: numbers of files and of their bytes, and the paths that were not, each with the reason."""

    files: int = 0
    length_bytes: int = 0
    refused: list[tuple[bytes, str]] = field(default_factory=list)


def restore(source_fd: int, target_fd: int, paths: list[bytes], folder: bytes) -> Restored:
    """Return what came of restoring ``paths``, directories with all below them, from one root beneath ``folder`` of another; b"": in place.

    RequestRefused for a path that could lead elsewhere, before anything is done. What the filesystem refuses is told for each path.
    If we die here, files are old or new, and at most one with a name of ours lies beside them.
    """
    for path in (*paths, *([folder] if folder else [])):
        if not path or any(part in (b"", b".", b"..") or b"\0" in part for part in path.split(b"/")):
            raise RequestRefused(f"{os.fsdecode(path)!r} is no path below the root of the volume", fix="Give it as `landfall losses` does.")
    done = Restored()
    for path in paths:
        try:
            parent_fd = _parents(source_fd, target_fd, path, folder)
        except OSError as error:
            done.refused.append((path, error.strerror or str(error)))
            continue
        try:
            _restore(done, source_fd, path, parent_fd, path.rpartition(b"/")[2])
        finally:
            os.close(parent_fd)
    return done


def _restore(done: Restored, source_fd: int, path: bytes, parent_fd: int, name: bytes) -> None:
    """Restore what ``path`` is beneath the source's root as ``name`` in a directory."""
    try:
        looked_fd = open_beneath(source_fd, path, _LOOK)
    except OSError as error:
        done.refused.append((path, error.strerror or str(error)))
        return
    try:
        if stat.S_ISDIR(os.fstat(looked_fd).st_mode):
            _restore_folder(done, source_fd, path, parent_fd, name)
        else:
            done.length_bytes += _replace(looked_fd, parent_fd, name)
            done.files += 1
    except OSError as error:
        done.refused.append((path, error.strerror or str(error)))
    finally:
        os.close(looked_fd)


def _restore_folder(done: Restored, source_fd: int, path: bytes, parent_fd: int, name: bytes) -> None:
    """Restore a directory: what else is in one that is there stays there."""
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent_fd)
    folder_fd = open_beneath(parent_fd, name, _FOLDER)
    try:
        read_fd = open_beneath(source_fd, path, _FOLDER)
        try:
            with os.scandir(read_fd) as entries:
                names = sorted(os.fsencode(entry.name) for entry in entries)
            for below in names:
                _restore(done, source_fd, path + b"/" + below, folder_fd, below)
            _copy_attributes(read_fd, folder_fd)
        finally:
            os.close(read_fd)
    finally:
        os.close(folder_fd)


def _parents(source_fd: int, target_fd: int, path: bytes, folder: bytes) -> int:
    """Return a descriptor of the directory that a path is to lie in. One that is missing is made as it is in the generation."""
    at_fd = os.open(".", _FOLDER | os.O_CLOEXEC, dir_fd=target_fd)
    try:
        for part in folder.split(b"/") if folder else []:
            at_fd = _entered(at_fd, part)[0]
        above = path.split(b"/")[:-1]
        for depth, part in enumerate(above, 1):
            at_fd, is_new = _entered(at_fd, part)
            if is_new:
                like_fd = open_beneath(source_fd, b"/".join(above[:depth]), _FOLDER)
                try:
                    _copy_attributes(like_fd, at_fd)
                finally:
                    os.close(like_fd)
    except BaseException:
        os.close(at_fd)
        raise
    return at_fd


def _entered(at_fd: int, part: bytes) -> tuple[int, bool]:
    """Return a descriptor of a directory below another, which is closed, and whether it was made now."""
    is_new = True
    try:
        os.mkdir(part, 0o700, dir_fd=at_fd)
    except FileExistsError:
        is_new = False
    below_fd = open_beneath(at_fd, part, _FOLDER)
    os.close(at_fd)
    return below_fd, is_new


def _replace(looked_fd: int, parent_fd: int, name: bytes) -> int:
    """Put a copy of an inode that is no directory in the place of ``name``; return the bytes of its content."""
    temporary = _PREFIX + secrets.token_hex(8).encode()
    about = os.fstat(looked_fd)
    try:
        copied = _make(looked_fd, about, parent_fd, temporary)
        os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        os.fsync(parent_fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=parent_fd)
        raise
    return copied


def _make(looked_fd: int, about: os.stat_result, parent_fd: int, name: bytes) -> int:
    if not stat.S_ISREG(about.st_mode):
        if stat.S_ISLNK(about.st_mode):
            os.symlink(os.readlink(b"", dir_fd=looked_fd), name, dir_fd=parent_fd)
        else:
            os.mknod(name, stat.S_IFMT(about.st_mode) | 0o600, about.st_rdev, dir_fd=parent_fd)
        made_fd = open_beneath(parent_fd, name, _LOOK)
        try:
            _copy_attributes(looked_fd, made_fd)
        finally:
            os.close(made_fd)
        return 0
    read_fd = os.open(f"/proc/self/fd/{looked_fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        made_fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent_fd)
        try:
            copied = _copy_content(read_fd, made_fd, about.st_size)
            _copy_attributes(read_fd, made_fd)
            os.fsync(made_fd)
        finally:
            os.close(made_fd)
    finally:
        os.close(read_fd)
    return copied


def _copy_content(read_fd: int, made_fd: int, size: int) -> int:
    """Copy what is data; holes stay holes."""
    os.ftruncate(made_fd, size)
    copied = at = 0
    while at < size:
        try:
            at = os.lseek(read_fd, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            break
        end = min(os.lseek(read_fd, at, os.SEEK_HOLE), size)
        while at < end:
            part = os.pread(read_fd, min(_PORTION_BYTES, end - at), at)
            if not part:
                raise OSError(5, "the file ends before its size")
            write(made_fd, at, memoryview(part))
            at += len(part)
            copied += len(part)
    return copied


def _copy_attributes(from_fd: int, to_fd: int) -> None:
    """Give an inode the attributes that salvages promise, but for the flags that would lock it: its name is to change yet."""
    about, path = os.fstat(from_fd), f"/proc/self/fd/{to_fd}"
    flagged = stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)
    os.chown(path, about.st_uid, about.st_gid)
    attributes.set_xattrs(to_fd, attributes.xattrs(from_fd))
    if not stat.S_ISLNK(about.st_mode):
        os.chmod(path, stat.S_IMODE(about.st_mode))
    if flagged:
        attributes.set_project(to_fd, attributes.project(from_fd))
        attributes.set_flags(to_fd, attributes.flags(from_fd) & ~LOCKS)
    os.utime(path, ns=(os.fstat(to_fd).st_atime_ns, about.st_mtime_ns))
