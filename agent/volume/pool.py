"""The filesystem that a node's images lie on: its identity, its device, its room, and its rules for images.

A pool carries a marker file; nothing is ever made, changed or removed in a folder without it. Everything below it is for root alone.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract.errors import DeviceFailed, KernelLacks, LayoutUnsupported, NoSpace, NotOurs
from agent.contract.identity import BLOCK_BYTES
from agent.system import attributes, block
from agent.system.files import write_durably
from agent.volume.loop import node
from agent.volume.mounts import mounted_at

MARKER: Final = "landfall-pool"
_MARKER_TEXT: Final = b"landfall pool 1\n"
RESERVE_BYTES: Final = 16 << 20
"""Room a pool must have before anything is begun in it: clones, records and the filesystem's own trees."""


class Pool:
    """A marked folder on XFS or btrfs with reflinks."""

    def __init__(self, path: Path) -> None:
        """Open a pool; NotOurs if the folder does not carry the marker, LayoutUnsupported on another filesystem."""
        self.path = path.resolve()
        if not _is_marked(self.path):
            raise NotOurs(f"{path} is no pool", cause=f"no file {MARKER} in it", fix="Make one with `landfall-agent pool`.")
        mount = mounted_at(self.path)
        self.kind, self.device = mount.kind, Path(mount.source)
        self.filesystem = _superblock_uuid(self.device, self.kind)
        self.volumes = self.path / "volumes"

    @staticmethod
    def initialise(path: Path) -> None:
        """Mark a folder as a pool, after proving that images there can be cloned; NotOurs for a folder with something in it."""
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_marked(path):
            return
        kind = mounted_at(path).kind
        if kind not in {"xfs", "btrfs"}:
            raise LayoutUnsupported(f"{path} lies on {kind}", fix="Put the pool on XFS (reflink=1) or btrfs.")
        volumes = path / "volumes"
        volumes.mkdir(mode=0o700, exist_ok=True)
        if any(volumes.iterdir()):
            raise NotOurs(f"{path} has a folder `volumes` that Landfall did not make")
        if kind == "btrfs":
            _refuse_checksums(volumes)
        _prove_clone(volumes)
        write_durably(path / MARKER, _MARKER_TEXT)

    def room_bytes(self) -> int:
        """Return how much can still be written here."""
        now = os.statvfs(self.path)
        return now.f_bavail * now.f_frsize

    def need_room(self, length_bytes: int, what: str) -> None:
        """Raise NoSpace unless ``length_bytes`` and the reserve are free."""
        room = self.room_bytes()
        if room < length_bytes + RESERVE_BYTES:
            raise NoSpace(
                f"no room in the pool for {what}", cause=f"{room >> 20} MiB free, {(length_bytes + RESERVE_BYTES) >> 20} MiB needed"
            )


@contextmanager
def said_plainly(what: str) -> Iterator[None]:
    """Turn the kernel's refusals into errors an operator can act on."""
    try:
        yield
    except OSError as error:
        cause = f"{what}: {error}"
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace(f"the pool ran full: {what}", cause=cause) from error
        if error.errno in {errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY}:
            raise KernelLacks(f"the pool's filesystem cannot clone files: {what}", cause=cause, fix="Make it with reflink=1.") from error
        raise DeviceFailed(f"the pool failed: {what}", cause=cause, fix="Look at dmesg and the disk below the pool.") from error


def _is_marked(path: Path) -> bool:
    try:
        marker_fd = os.open(path / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return False
        raise
    with os.fdopen(marker_fd, "rb") as marker:
        return stat.S_ISREG(os.fstat(marker_fd).st_mode) and marker.read(64) == _MARKER_TEXT


def _refuse_checksums(folder: Path) -> None:
    """Let every file made below ``folder`` be without data checksums: btrfs(5), nodatacow; the folders below inherit it."""
    folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        attributes.set_flags(folder_fd, attributes.flags(folder_fd) | attributes.NOCOW)
    finally:
        os.close(folder_fd)


def _prove_clone(folder: Path) -> None:
    with said_plainly("a clone of one block"):
        first, second = (os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600) for _ in range(2))
        try:
            os.pwrite(first, b"\x5a" * BLOCK_BYTES, 0)
            block.clone(first, second)
            extents = block.extent_map(second)
            if len(extents.flags) != 1 or not int(extents.flags[0]) & block.ExtentFlag.SHARED:
                raise KernelLacks("a cloned block is not reported as shared", fix="Use XFS (reflink=1) or btrfs.")
        finally:
            os.close(first)
            os.close(second)


def _superblock_uuid(device: Path, kind: str) -> UUID:
    """Return the filesystem's UUID (xfs_format.h: at 32 of the device; btrfs on-disk format: at 64 KiB + 32)."""
    places = {"xfs": (0, b"XFSB", 0, 32), "btrfs": (65536, b"_BHRfS_M", 64, 32)}
    if kind not in places:
        raise LayoutUnsupported(f"a pool cannot lie on {kind}", fix="Put the pool on XFS (reflink=1) or btrfs.")
    known = Path("/sys/class/block") / device.name / "dev"
    if not device.exists() and known.exists():  # a folder of device nodes of our own
        major, minor = known.read_text().split(":")
        node(int(major), int(minor), device)
    offset, magic, magic_at, uuid_at = places[kind]
    device_fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        superblock = os.pread(device_fd, 128, offset)
    finally:
        os.close(device_fd)
    if superblock[magic_at:][: len(magic)] != magic:
        raise NotOurs(f"{device} is not the {kind} that the pool lies on")
    return UUID(bytes=superblock[uuid_at:][:16])
