"""Open files by inode number, and beneath a directory and nowhere else.

``open_by_handle_at(2)`` reaches an inode of one mounted filesystem without a path, so a recovery cannot be led out of the mount by a name.
``openat2(2)`` with RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV does the same for paths. Handle layouts:
include/linux/exportfs.h (FILEID_INO32_GEN) and fs/xfs/xfs_export.h (xfs_fid64).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

from agent.contract.identity import FilesystemKind

_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_SYS_OPENAT2: Final = 437
_FILEID_INO32_GEN: Final = 1
_XFS_FILEID_64: Final = 0x81
_RESOLVE_BENEATH: Final = 0x08 | 0x04 | 0x02 | 0x01  # BENEATH, NO_SYMLINKS, NO_MAGICLINKS, NO_XDEV


def open_inode(mount_fd: int, kind: FilesystemKind, inode: int, generation: int, flags: int) -> int:
    """Return a descriptor of ``inode`` on the filesystem that ``mount_fd`` is on. OSError ESTALE: no such inode and generation.

    Needs CAP_DAC_READ_SEARCH. O_PATH opens anything without side effects; a FIFO or device must not be opened otherwise.
    """
    if kind is FilesystemKind.XFS:
        handle_type, handle = _XFS_FILEID_64, struct.pack("<QI", inode, generation)
    else:
        handle_type, handle = _FILEID_INO32_GEN, struct.pack("<II", inode, generation)
    raw = ctypes.create_string_buffer(struct.pack("<Ii", len(handle), handle_type) + handle)
    return _checked(_LIBC.open_by_handle_at(mount_fd, raw, flags | os.O_CLOEXEC), f"inode {inode}")


def identity_at(directory_fd: int, path: bytes) -> tuple[int, int]:
    """Return (inode, generation) of what ``path`` below a directory names; a symlink at its end is not followed."""
    room = 128
    raw = ctypes.create_string_buffer(struct.pack("<Ii", room, 0) + bytes(room))
    mount_id = ctypes.c_int()
    _checked(_LIBC.name_to_handle_at(directory_fd, path, raw, ctypes.byref(mount_id), 0), os.fsdecode(path))
    length, handle_type = struct.unpack_from("<Ii", raw.raw)
    layout = "<QI" if handle_type == _XFS_FILEID_64 else "<II"
    if length < struct.calcsize(layout):
        raise OSError(errno.EOPNOTSUPP, "a file handle of unknown layout", os.fsdecode(path))
    inode, generation = struct.unpack_from(layout, raw.raw, 8)
    return int(inode), int(generation)


def open_beneath(directory_fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    """Return a descriptor of ``path`` below ``directory_fd``; OSError EXDEV or ELOOP where it would leave it or follow a link."""
    how = ctypes.create_string_buffer(struct.pack("<QQQ", flags | os.O_CLOEXEC, mode, _RESOLVE_BENEATH))
    return _checked(_LIBC.syscall(_SYS_OPENAT2, directory_fd, path, how, ctypes.c_size_t(24)), os.fsdecode(path))


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return int(result)
