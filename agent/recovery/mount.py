"""The private mounts of a salvage: the clone of the base, which nobody else sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from agent.contract.errors import LayoutUnsupported
from agent.contract.identity import FilesystemKind
from agent.system.block import sync_filesystem
from agent.system.run import run
from agent.volume.mounts import mount_on

_OPTIONS: Final = {FilesystemKind.EXT4: "", FilesystemKind.XFS: ",nouuid"}
_PROGRAM: Final = {FilesystemKind.EXT4: "mkfs.ext4", FilesystemKind.XFS: "mkfs.xfs"}
_OUTWARD: Final = ("/", "device=", "logdev", "rtdev", "name=", "file", "proto")
_OUTWARD_OPTIONS: Final = {FilesystemKind.EXT4: ("-d", "-u", "-S"), FilesystemKind.XFS: ("-p", "-P", "-c", "-l@")}


@contextmanager
def mounted(device: Path, mount_point: Path, kind: FilesystemKind, *, read_only: bool) -> Iterator[int]:
    """Mount for as long as the context lasts and give a descriptor of the root. Everything is on the device when it ends without an error.

    If we die here the mount stays; ``unmount`` at the next start takes it away.
    """
    options = f"{'ro' if read_only else 'rw'},nosuid,nodev,noexec,noatime{_OPTIONS[kind]}"
    run(["mount", "-t", kind.value, "-o", options, str(device), str(mount_point)], timeout_s=300)
    try:
        run(["mount", "--make-private", str(mount_point)])
        fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield fd
            if not read_only:
                sync_filesystem(fd)
        finally:
            os.close(fd)
    finally:
        unmount(mount_point)


def unmount(mount_point: Path) -> None:
    """Unmount what is on ``mount_point``, several mounts if need be; nothing if it is none."""
    while mount_on(mount_point) is not None:
        run(["umount", str(mount_point)], timeout_s=600)


def make_filesystem(device: Path, kind: FilesystemKind, arguments: tuple[str, ...]) -> None:
    """Make an empty filesystem by the DMI's words, which the source wrote: LayoutUnsupported unless they are about this device alone."""
    words = list(arguments) if arguments and not arguments[0].startswith("-") else [_PROGRAM[kind], *arguments]
    if words[0] not in (_PROGRAM[kind], f"mkfs -t {kind.value}"):
        raise LayoutUnsupported(f"{words[0]!r} does not make a filesystem of kind {kind.value}")
    for word in words[1:]:
        if any(part in word for part in _OUTWARD) or word.startswith(_OUTWARD_OPTIONS[kind]):
            raise LayoutUnsupported(f"the option {word!r} for a new filesystem reaches outside its device")
    run([*words, str(device)], timeout_s=600)
