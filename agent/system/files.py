"""Small files that are whole or not there: write-temp, fsync, rename, fsync-directory.

If we die before the rename the old content stands and a ``.new-*`` file is left, which ``sweep`` removes; after it, the new content stands.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.contract.errors import DeviceBusy
from agent.system.clock import wait_until
from agent.system.failpoint import failpoint

TEMPORARY_PREFIX = ".new-"


def write_durably(path: Path, content: bytes | Iterable[bytes], *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``content`` in one step that survives power loss."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in (content,) if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        failpoint("files.before_rename")
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    failpoint("files.after_rename")


def append_durably(path: Path, line: bytes, *, mode: int = 0o600) -> None:
    """Add a line to ``path``, made if need be; on return it survives power loss.

    If we die here a part of the line may be left; the next one begins below it.
    """
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        size = os.fstat(descriptor).st_size
        begun = size and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, (b"\n" if begun else b"") + line + b"\n")  # at once: others may add lines at the same time
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if is_new:
        sync_directory(path.parent)


def rename_durably(old: Path, new: Path) -> None:
    """Rename within one filesystem; on return the new name survives power loss."""
    old.rename(new)
    sync_directory(new.parent)
    if old.parent != new.parent:
        sync_directory(old.parent)


def remove_durably(path: Path) -> None:
    """Remove ``path`` if it is there; on return it stays away after power loss."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_for_life(path: Path, *, wait_s: float = 0.0) -> int:
    """Return a descriptor that holds ``path`` locked until it is closed, or its process is gone; DeviceBusy if another holds it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    if not wait_until(lambda: _is_locked(descriptor), wait_s):
        os.close(descriptor)
        raise DeviceBusy(f"another agent works on {path.parent}", cause=str(path), fix="Stop it first, or name another folder.")
    return descriptor


@contextmanager
def locked(path: Path, *, wait_s: float) -> Iterator[None]:
    """Hold ``path`` locked for as long as the context lasts; DeviceBusy if another holds it for longer than ``wait_s``."""
    descriptor = lock_for_life(path, wait_s=wait_s)
    try:
        yield
    finally:
        os.close(descriptor)


def held_elsewhere(path: Path) -> bool:
    """Whether somebody holds ``path`` locked now."""
    try:
        with locked(path, wait_s=0.0):
            return False
    except DeviceBusy:
        return True


def written_elsewhere(descriptor: int) -> bool:
    """Whether somebody else has an open file open for writing, found by a lease (fcntl(2), F_SETLEASE) that is given back at once."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            return True
        raise
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sweep(directory: Path) -> None:
    """Remove what writers left that died before their rename."""
    for left in directory.glob(f"{TEMPORARY_PREFIX}*"):
        left.unlink(missing_ok=True)
