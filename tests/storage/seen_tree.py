"""A tree as its users see it: what stat, listxattr, chattr, reading and seeking say of every path. Shares no code with what made it."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import struct
from dataclasses import dataclass, fields, replace
from pathlib import Path

_GETFLAGS, _FSGETXATTR = 0x80086601, 0x801C581F
_CHATTR = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x80 | 0x10000 | 0x20000 | 0x800000 | 0x20000000


@dataclass(frozen=True, slots=True)
class Seen:
    """One path. ``same_as`` is the first path of the same inode; ``data`` where it has data, as (begin, end)."""

    mode: int
    owner: tuple[int, int]
    links: int
    size: int
    mtime_ns: int
    device: int
    link: str
    digest: str
    data: tuple[tuple[int, int], ...]
    xattrs: tuple[tuple[str, bytes], ...]
    flags: int
    project: int
    same_as: bytes


def seen(root: Path) -> dict[bytes, Seen]:
    """Return what is to be seen of every path below ``root``, which is b"."."""
    top = os.fsencode(root)
    paths = [b"."]
    for above, folders, files in os.walk(top):
        paths += [os.path.relpath(os.path.join(above, name), top) for name in folders + files]
    # Seeking comes before all reading: what was read of an unwritten extent counts as data afterwards.
    data = {path: _data(os.path.join(top, path)) for path in paths}
    first: dict[int, bytes] = {}
    return {path: _seen(os.path.join(top, path), path, data[path], first) for path in sorted(paths)}


def differences(one: dict[bytes, Seen], other: dict[bytes, Seen], *, made: bytes = b"") -> list[str]:
    """Return in words what differs; folders at ``made`` and below are as old as the salvage that made them."""
    found = [f"{path!r} is in one tree only" for path in sorted(one.keys() ^ other.keys())]
    for path in sorted(one.keys() & other.keys()):
        pair = [one[path], other[path]]
        if made and (path == made or path.startswith(made + b"/")) and stat.S_ISDIR(pair[0].mode):
            pair = [replace(each, mtime_ns=0) for each in pair]
        for name in (field.name for field in fields(Seen)):
            values = [getattr(each, name) for each in pair]
            if values[0] != values[1]:
                found.append(f"{path!r}: {name} {values[0]!r} and {values[1]!r}")
    return found


def _seen(full: bytes, path: bytes, data: tuple[tuple[int, int], ...], first: dict[int, bytes]) -> Seen:
    about = os.lstat(full)
    is_file, is_folder, is_link = stat.S_ISREG(about.st_mode), stat.S_ISDIR(about.st_mode), stat.S_ISLNK(about.st_mode)
    digest, flags, project = "", 0, 0
    if is_file or is_folder:
        fd = os.open(full, os.O_RDONLY | os.O_NOATIME)
        try:
            flags = struct.unpack("<q", fcntl.ioctl(fd, _GETFLAGS, bytes(8)))[0] & _CHATTR
            project = struct.unpack_from("<IIII", fcntl.ioctl(fd, _FSGETXATTR, bytes(28)))[3]
            if is_file:
                with open(fd, "rb", closefd=False) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
        finally:
            os.close(fd)
    names = os.listxattr(full, follow_symlinks=False)
    return Seen(
        about.st_mode,
        (about.st_uid, about.st_gid),
        about.st_nlink,
        0 if is_folder else about.st_size,
        about.st_mtime_ns,
        about.st_rdev,
        os.fsdecode(os.readlink(full)) if is_link else "",
        digest,
        data,
        tuple(sorted((name, os.getxattr(full, name, follow_symlinks=False)) for name in names)),
        flags,
        project,
        first.setdefault(about.st_ino, path),
    )


def _data(full: bytes) -> tuple[tuple[int, int], ...]:
    if not stat.S_ISREG(os.lstat(full).st_mode):
        return ()
    fd = os.open(full, os.O_RDONLY | os.O_NOATIME)
    found, at = [], 0
    try:
        while at < os.fstat(fd).st_size:
            try:
                begin = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # nothing but a hole
                break
            at = os.lseek(fd, begin, os.SEEK_HOLE)
            found.append((begin, at))
    finally:
        os.close(fd)
    return tuple(found)
