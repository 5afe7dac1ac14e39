"""The private mounts of a salvage: the clone of the base, which nobody else sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agent.contract.errors import CommandFailed, SalvageFailed
from agent.contract.identity import FilesystemKind
from agent.system.block import sync_filesystem
from agent.system.run import run
from agent.volume import filesystem

_PROTECTED: Final = "nosuid,nodev,noexec,noatime"
_OPTIONS: Final = {
    (FilesystemKind.EXT4, False): f"rw,{_PROTECTED}",
    (FilesystemKind.XFS, False): f"rw,nouuid,{_PROTECTED}",
    # It was unmounted in order, so there is nothing to replay: what can be read is what is on the device.
    (FilesystemKind.EXT4, True): f"ro,noload,{_PROTECTED}",
    (FilesystemKind.XFS, True): f"ro,norecovery,nouuid,{_PROTECTED}",
}
_LIMIT_S: Final = 300.0


@contextmanager
def mounted(device: Path, mount_point: Path, kind: FilesystemKind, *, read_only: bool) -> Iterator[int]:
    """Mount for as long as the context lasts and give a descriptor of the root. Everything is on the device when it ends without an error.

    If we die here the mount stays; ``unmount`` at the next start takes it away.
    """
    try:
        run(["mount", "-n", "-t", str(kind), "-o", _OPTIONS[kind, read_only], str(device), str(mount_point)], timeout_s=_LIMIT_S)
    except CommandFailed as error:
        raise SalvageFailed("the clone of the base cannot be mounted", cause=error.cause) from error
    try:
        fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
            if not read_only:
                sync_filesystem(fd)
        finally:
            os.close(fd)
    finally:
        filesystem.unmount(mount_point)


def unmount(mount_point: Path) -> None:
    """Unmount what is on ``mount_point``, several mounts if need be; nothing if it is none."""
    while filesystem.is_mounted(mount_point):
        filesystem.unmount(mount_point)
