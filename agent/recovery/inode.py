"""One inode: made, filled, given the attributes that the DMI promises."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.contract.dmi import Dmi, FileKind
from agent.contract.identity import BLOCK_BYTES
from agent.recovery.content import hole_ranges
from agent.recovery.tree import FLAGGED, LOCKS
from agent.system import attributes
from agent.system.blockdev import punch

_MADE_MODE: Final = 0o600
_ZEROS: Final = bytes(1 << 20)


def make(dmi: Dmi, row: int, directory_fd: int, name: bytes) -> None:
    """Make an empty inode of the row's kind as ``name``; FileExistsError if there is something of that name."""
    match FileKind(int(dmi.kind[row])):
        case FileKind.DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=directory_fd)
        case FileKind.SYMLINK:
            os.symlink(dmi.payload_of(row), name, dir_fd=directory_fd)
        case FileKind.REGULAR:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MADE_MODE, dir_fd=directory_fd))
        case kind:
            device = os.makedev(int(dmi.device[row]) >> 32, int(dmi.device[row]) & 0xFFFFFFFF)
            os.mknod(name, (kind << 12) | _MADE_MODE, device, dir_fd=directory_fd)


def prepare(fd: int, dmi: Dmi, row: int, *, fresh: bool) -> None:
    """Give a regular file its size and its holes; what is written afterwards makes it whole. The old tail is gone for good."""
    if fresh:
        os.ftruncate(fd, int(dmi.size[row]))
        return
    if dmi.payload_of(row):
        os.ftruncate(fd, 0)
        return
    if os.fstat(fd).st_size < min(BLOCK_BYTES, int(dmi.size[row])):
        # Linux 6.18 loses what is written to a file whose content lives in its ext4 inode if it was grown by ftruncate before;
        # punching a hole gives it blocks.
        punch(fd, 0, BLOCK_BYTES)
    os.ftruncate(fd, int(dmi.size[row]))
    for offset, length in hole_ranges(dmi, row):
        for begin, end in _data_within(fd, offset, offset + length):
            _zero(fd, begin, end)


def finish(fd: int, dmi: Dmi, row: int) -> None:
    """Give a regular file whose content is written its size, if it does not have it yet."""
    if os.fstat(fd).st_size != int(dmi.size[row]):
        os.ftruncate(fd, int(dmi.size[row]))


def write_changed(fd: int, offset: int, data: memoryview) -> None:
    """Make the file hold ``data`` at ``offset``, writing only the blocks that differ from what it holds."""
    old = memoryview(os.pread(fd, len(data), offset))
    if len(old) != len(data):
        write(fd, offset, data)
        return
    if old == data:
        return
    whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
    differs = np.empty(-(-len(data) // BLOCK_BYTES), dtype=np.bool_)
    differs[: whole // BLOCK_BYTES] = np.any(_blocks(old[:whole]) != _blocks(data[:whole]), axis=1)
    differs[whole // BLOCK_BYTES :] = old[whole:] != data[whole:]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], differs, [False])).astype(np.int8)))
    for begin, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        write(fd, offset + begin * BLOCK_BYTES, data[begin * BLOCK_BYTES : end * BLOCK_BYTES])


def _blocks(data: memoryview) -> NDArray[np.uint64]:
    return np.frombuffer(data, np.uint64).reshape(-1, BLOCK_BYTES // 8)


def write(fd: int, offset: int, data: memoryview) -> None:
    """Write all of ``data`` at ``offset``."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def reads_as_zeros(fd: int, offset: int, length: int) -> bool:
    """Whether a range has no data, or only zeros."""
    for begin, end in _data_within(fd, offset, offset + length):
        while begin < end:
            part = os.pread(fd, min(len(_ZEROS), end - begin), begin)
            if not part or part.count(0) != len(part):
                return False
            begin += len(part)
    return True


def set_attributes(fd: int, dmi: Dmi, row: int) -> None:
    """Give an inode owner, xattrs, mode, project id and flags but for those that lock it; ``fd`` may be O_PATH for what has no flags."""
    path, kind = f"/proc/self/fd/{fd}", int(dmi.kind[row])
    now, uid, gid, mode = os.fstat(fd), int(dmi.uid[row]), int(dmi.gid[row]), int(dmi.mode[row])
    if (now.st_uid, now.st_gid) != (uid, gid):
        os.chown(path, uid, gid)
    attributes.set_xattrs(fd, dict(dmi.xattrs(row)))
    # Changing the owner, the ACL or the content takes setuid and setgid away, so the mode is set after them.
    if kind != FileKind.SYMLINK and stat.S_IMODE(os.fstat(fd).st_mode) != mode:
        Path(path).chmod(mode)
    if kind in FLAGGED:
        attributes.set_project(fd, int(dmi.project[row]))
        attributes.set_flags(fd, int(dmi.attr_flags[row]) & ~LOCKS)


def set_mtime(fd: int, dmi: Dmi, row: int) -> None:
    """Give an inode the modification time of the DMI; the access time stays. ``fd`` may be O_PATH."""
    os.utime(f"/proc/self/fd/{fd}", ns=(os.fstat(fd).st_atime_ns, mtime_ns(dmi, row)))


def mtime_ns(dmi: Dmi, row: int) -> int:
    """Return the row's modification time in ns since the epoch."""
    return int(dmi.mtime_s[row]) * 10**9 + int(dmi.mtime_ns[row])


def _data_within(fd: int, begin: int, end: int) -> list[tuple[int, int]]:
    """Return where a file has data between two offsets (lseek(2), SEEK_DATA)."""
    found = []
    end = min(end, os.fstat(fd).st_size)
    while begin < end:
        try:
            start = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing more
            break
        if start >= end:
            break
        begin = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        found.append((start, begin))
    return found


def _zero(fd: int, begin: int, end: int) -> None:
    if punch(fd, begin, end - begin):
        return
    while begin < end:
        begin += os.pwrite(fd, memoryview(_ZEROS)[: min(len(_ZEROS), end - begin)], begin)
