"""Image files of the `reflink` substrate, one at a time: opened, made, locked, and refused when they are not what they must be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.contract.errors import BaseMismatch, DeviceBusy, LayoutUnsupported, NotOurs
from agent.contract.identity import BLOCK_BYTES
from agent.system import attributes, files
from agent.volume.loop import backs, lock, open_image
from agent.volume.mounts import mount_on
from agent.volume.pool import Pool
from agent.volume.substrate import VolumeRecord


@contextmanager
def opened(image: Path) -> Iterator[int]:
    """Open an image without following links; LandfallError says why it cannot be."""
    image_fd = open_image(image)
    try:
        yield image_fd
    finally:
        os.close(image_fd)


@contextmanager
def made(image: Path) -> Iterator[int]:
    """Make an empty image; the name is ours alone, so what a crash left under it goes."""
    image.unlink(missing_ok=True)
    image_fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        yield image_fd
    finally:
        os.close(image_fd)


@contextmanager
def locked_if_there(image: Path) -> Iterator[None]:
    """Hold an image for ourselves, if there is one; DeviceBusy if somebody uses it."""
    if not image.exists():
        yield
        return
    with opened(image) as image_fd:
        lock(image_fd, image, exclusive=True)
        yield


@contextmanager
def removed_on_failure(*made: Path) -> Iterator[None]:
    """Take away what was half made when whatever is done here fails."""
    try:
        yield
    except BaseException:
        for path in made:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def refuse_foreign(image_fd: int, image: Path, pool: Pool) -> None:
    """Refuse an image that cannot be moved into the pool as it is, or that somebody else can write to."""
    about = os.fstat(image_fd)
    if about.st_dev != pool.path.stat().st_dev:
        raise NotOurs(
            f"{image} does not lie on the filesystem of this node's pool",
            cause=f"the pool is {pool.path}",
            fix="Move it there first; between two filesystems that is a copy.",
        )
    if about.st_size % BLOCK_BYTES or not about.st_size:
        raise LayoutUnsupported(
            f"{image} has {about.st_size} bytes", fix=f"Make it a multiple of {BLOCK_BYTES}: `truncate -s %{BLOCK_BYTES}`."
        )
    if about.st_nlink != 1:
        raise DeviceBusy(f"{image} has {about.st_nlink} names", fix="Remove the others: who has them can write to it.")
    if pool.kind == "btrfs" and not attributes.flags(image_fd) & attributes.NOCOW:
        raise LayoutUnsupported(
            f"{image} has data checksums, so it cannot be cloned within the pool",
            fix="Copy it into a folder with `chattr +C` on the same filesystem, and adopt that.",
        )
    for folder in Path("/sys/class/block").glob("loop*/loop"):
        device = Path("/dev") / folder.parent.name
        if device.exists() and backs(device, image):
            raise DeviceBusy(f"{image} is attached to {device}", fix=f"Unmount it, and `losetup -d {device}`.")
    if files.written_elsewhere(image_fd):
        raise DeviceBusy(f"{image} is open by another program", fix="Find it (lsof, fuser), and let it end.")


def make_sparse(image: Path, size_bytes: int) -> None:
    """Make an image of zeros that takes no room; durable on return."""
    with made(image) as image_fd:
        os.truncate(image_fd, size_bytes)
        os.fsync(image_fd)


def refuse_size(image_fd: int, record: VolumeRecord, image: Path) -> None:
    """BaseMismatch unless an image has its volume's size."""
    size_bytes = os.fstat(image_fd).st_size
    if size_bytes != record.size_bytes:
        raise BaseMismatch(
            f"{image.name} has {size_bytes} bytes, volume {record.name} has {record.size_bytes}",
            fix="Replicate in full into a volume of the right size.",
        )


def refuse_other_mount(mount_point: Path, operational: Path) -> None:
    """Refuse to freeze a filesystem that is not on our operational image."""
    mount = mount_on(mount_point)
    if mount is None or not mount.source.startswith("/dev/") or not backs(Path(mount.source), operational):
        raise NotOurs(f"{mount_point} is not a mount of {operational}", cause=f"mounted there: {mount.source if mount else 'nothing'}")
