"""One inode: made, filled, given the attributes that are promised."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
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
_NODES: Final = (FileKind.BLOCK, FileKind.CHARACTER)


@dataclass(frozen=True, slots=True)
class State:
    """What is promised of an inode, its names and content apart. Of a kind that has none, a field is 0 or empty."""

    kind: FileKind
    mode: int
    uid: int
    gid: int
    size: int  # of a regular file
    mtime_ns: int
    device: int  # major << 32 | minor
    project: int
    flags: int
    link: bytes
    xattrs: dict[bytes, bytes]


def state_in(dmi: Dmi, row: int) -> State:
    """Return the state that the DMI gives for a row: the target's, or of a deleted file the base's."""
    kind = FileKind(int(dmi.kind[row]))
    return State(
        kind,
        int(dmi.mode[row]) if kind is not FileKind.SYMLINK else 0,
        int(dmi.uid[row]),
        int(dmi.gid[row]),
        int(dmi.size[row]) if kind is FileKind.REGULAR else 0,
        int(dmi.mtime_s[row]) * 10**9 + int(dmi.mtime_ns[row]),
        int(dmi.device[row]) if kind in _NODES else 0,
        int(dmi.project[row]) if kind in FLAGGED else 0,
        int(dmi.attr_flags[row]) if kind in FLAGGED else 0,
        dmi.payload_of(row) if kind is FileKind.SYMLINK else b"",
        dict(dmi.xattrs(row)),
    )


def state_of(fd: int) -> State:
    """Return the state of an inode; ``fd`` may be O_PATH for what has no flags."""
    about = os.fstat(fd)
    kind = FileKind(stat.S_IFMT(about.st_mode) >> 12)
    return State(
        kind,
        stat.S_IMODE(about.st_mode) if kind is not FileKind.SYMLINK else 0,
        about.st_uid,
        about.st_gid,
        about.st_size if kind is FileKind.REGULAR else 0,
        about.st_mtime_ns,
        (os.major(about.st_rdev) << 32) | os.minor(about.st_rdev) if kind in _NODES else 0,
        attributes.project(fd) if kind in FLAGGED else 0,
        attributes.flags(fd) if kind in FLAGGED else 0,
        os.readlink(b"", dir_fd=fd) if kind is FileKind.SYMLINK else b"",
        attributes.xattrs(fd),
    )


def make(state: State, directory_fd: int, name: bytes) -> None:
    """Make an empty inode of a kind as ``name``; FileExistsError if there is something of that name."""
    match state.kind:
        case FileKind.DIRECTORY:
            os.mkdir(name, 0o700, dir_fd=directory_fd)
        case FileKind.SYMLINK:
            os.symlink(state.link, name, dir_fd=directory_fd)
        case FileKind.REGULAR:
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _MADE_MODE, dir_fd=directory_fd))
        case kind:
            os.mknod(name, (kind << 12) | _MADE_MODE, os.makedev(state.device >> 32, state.device & 0xFFFFFFFF), dir_fd=directory_fd)


def prepare(fd: int, size: int, ranges: list[tuple[int, int]], *, anew: bool) -> None:
    """Let a regular file have nothing but what is written to ``ranges`` afterwards; ``finish`` gives it its size.

    ``anew``: not a byte stays of what it had. Otherwise what lies in ``ranges`` stays, for ``write_changed``.
    """
    if anew:
        os.ftruncate(fd, 0)
        return
    if os.fstat(fd).st_size < min(BLOCK_BYTES, size):
        # Linux 6.18 loses what is written to a file whose content lives in its ext4 inode if it was grown by ftruncate before;
        # punching a hole gives it blocks.
        punch(fd, 0, BLOCK_BYTES)
    os.ftruncate(fd, size)
    for offset, length in hole_ranges(ranges, size):
        for begin, end in _data_within(fd, offset, offset + length):
            _zero(fd, begin, end)


def finish(fd: int, size: int) -> None:
    """Give a regular file whose content is written its size, if it does not have it yet."""
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, size)


def write_changed(fd: int, offset: int, data: memoryview) -> None:
    """Make the file hold ``data`` at ``offset``, writing only the blocks that differ from what it holds, and those of zeros: it may have a
    hole there."""
    old = memoryview(os.pread(fd, len(data), offset))
    if len(old) != len(data):
        write(fd, offset, data)
        return
    whole = len(data) // BLOCK_BYTES * BLOCK_BYTES
    written = np.empty(-(-len(data) // BLOCK_BYTES), dtype=np.bool_)
    blocks = _blocks(data[:whole])
    written[: whole // BLOCK_BYTES] = np.any(_blocks(old[:whole]) != blocks, axis=1) | ~np.any(blocks, axis=1)
    written[whole // BLOCK_BYTES :] = old[whole:] != data[whole:] or not any(data[whole:])
    edges = np.flatnonzero(np.diff(np.concatenate(([False], written, [False])).astype(np.int8)))
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


def set_attributes(fd: int, state: State) -> None:
    """Give an inode owner, xattrs, mode, project id and flags but for those that lock it; ``fd`` may be O_PATH for what has no flags."""
    path = f"/proc/self/fd/{fd}"
    now = os.fstat(fd)
    if (now.st_uid, now.st_gid) != (state.uid, state.gid):
        os.chown(path, state.uid, state.gid)
    attributes.set_xattrs(fd, state.xattrs)
    # Changing the owner, the ACL or the content takes setuid and setgid away, so the mode is set after them.
    if state.kind != FileKind.SYMLINK and stat.S_IMODE(os.fstat(fd).st_mode) != state.mode:
        Path(path).chmod(state.mode)
    if state.kind in FLAGGED:
        attributes.set_project(fd, state.project)
        attributes.set_flags(fd, state.flags & ~LOCKS)


def set_mtime(fd: int, state: State) -> None:
    """Give an inode its modification time; the access time stays. ``fd`` may be O_PATH."""
    os.utime(f"/proc/self/fd/{fd}", ns=(os.fstat(fd).st_atime_ns, state.mtime_ns))


def _data_within(fd: int, begin: int, end: int) -> list[tuple[int, int]]:
    """Return where a file has data between two offsets, as (begin, end) (lseek(2), SEEK_DATA)."""
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
    """Make a hole of whole blocks, the last one perhaps cut by the file's end; zeros where there can be none."""
    if punch(fd, begin, -(-end // BLOCK_BYTES) * BLOCK_BYTES - begin):
        return
    while begin < end:
        begin += os.pwrite(fd, memoryview(_ZEROS)[: min(len(_ZEROS), end - begin)], begin)
