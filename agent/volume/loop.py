"""Loop devices over image files: attached by identity, vanishing with their last user.

A loop device is bound with AUTOCLEAR, so it goes when its last opener or mount goes, a SIGKILL included. The image's open file
carries a flock(2): shared for readers, exclusive for the writer. The loop device keeps that open file, so the kernel itself holds the
lock for exactly as long as the binding lives, whoever keeps it alive (a mount, another process), and drops it with the binding.

Read-only means: the image is opened O_RDONLY and the device is bound READ_ONLY, so there is no way down for a write. BLKROSET is not
used: it stays with the device's number after the binding is gone and would make the next user's device read-only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from agent.contract.errors import DeviceBusy, DeviceFailed, KernelLacks, NotOurs
from agent.system import block
from agent.system.block import LoopFlag
from agent.system.clock import wait_until
from agent.system.failpoint import failpoint

_LOOP_MAJOR: Final = 7
_CONTROL_MINOR: Final = (10, 237)
_ATTEMPTS: Final = 200
_GRACE_S: Final = 2.0
_LOST_RACE: Final = (errno.EBUSY, errno.ENXIO, errno.ENODEV, errno.ENOENT)


@contextmanager
def attach(image: Path, *, writable: bool = False, sector_bytes: int = 512, devices: Path = Path("/dev")) -> Iterator[Path]:
    """Attach an image for as long as the context lasts, or a mount or opener of the device; DeviceBusy by the rules of ``lock``.

    Several readers of one image get a device each. If we die here the kernel unbinds the device.
    """
    image_fd = open_image(image, writable=writable)
    try:
        lock(image_fd, image, exclusive=writable)
        device_fd, device = _bind(image_fd, image, writable, sector_bytes, devices)
    finally:
        os.close(image_fd)  # the loop device has its own reference to the open file, and with it the lock
    try:
        failpoint("loop.attached")
        yield device
    finally:
        os.close(device_fd)


def open_image(image: Path, *, writable: bool = False) -> int:
    """Return a descriptor of an image; NotOurs if the name is no regular file (a symlink is none). It is never made here."""
    access = os.O_RDWR if writable else os.O_RDONLY
    try:
        image_fd = os.open(image, access | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.EISDIR}:
            raise NotOurs(f"{image} is no image file", cause=str(error)) from error
        raise
    if not stat.S_ISREG(os.fstat(image_fd).st_mode):
        os.close(image_fd)
        raise NotOurs(f"{image} is no image file")
    return image_fd


def lock(image_fd: int, image: Path, *, exclusive: bool) -> None:
    """Lock an open image until its last reference goes: one writer or many readers, DeviceBusy otherwise.

    A binding that just ended may be held for a moment by whoever looks at all block devices (udev, losetup, blkid), so it is waited for.
    """

    def locked() -> bool:
        try:
            fcntl.flock(image_fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    if not wait_until(locked, _GRACE_S):
        raise DeviceBusy(f"{image.name} is attached or being worked on by somebody else", cause=str(image))


def backs(device: Path, image: Path) -> bool:
    """Whether ``device`` is a loop device over ``image``, by inode."""
    device_fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = block.loop_status(device_fd)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENOTTY, errno.EINVAL}:
            return False
        raise
    finally:
        os.close(device_fd)
    there = image.lstat()
    return (status.backing_device, status.backing_inode) == (there.st_dev, there.st_ino)


def node(major: int, minor: int, path: Path) -> Path:
    """Return ``path``, now the block device (major, minor): the node is made where nobody does; NotOurs if it is another."""
    if not path.exists():
        with suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(major, minor))
    there = path.lstat()
    if not stat.S_ISBLK(there.st_mode) or there.st_rdev != os.makedev(major, minor):
        raise NotOurs(f"{path} is not the block device {major}:{minor}")
    return path


def _bind(image_fd: int, image: Path, writable: bool, sector_bytes: int, devices: Path) -> tuple[int, Path]:
    """Return an open, bound and checked loop device. GET_FREE only names a candidate: whoever loses the race asks again."""
    flags = LoopFlag.AUTOCLEAR | LoopFlag.DIRECT_IO | (LoopFlag(0) if writable else LoopFlag.READ_ONLY)
    control_fd = _open_control(devices)
    refused: dict[int, OSError] = {}
    try:
        for _ in range(_ATTEMPTS):
            number = _candidate(control_fd, refused)
            device = node(_LOOP_MAJOR, number, devices / f"loop{number}")
            device_fd = -1
            try:
                device_fd = os.open(device, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
                block.configure_loop(device_fd, image_fd, flags, sector_bytes)
            except OSError as error:
                if device_fd >= 0:
                    os.close(device_fd)
                if error.errno in _LOST_RACE:
                    refused[number] = error
                    continue
                raise DeviceFailed(f"cannot attach {image.name}", cause=f"{device} over {image}: {error}") from error
            try:
                _check(device_fd, device, image_fd, image, writable)
            except BaseException:
                os.close(device_fd)
                raise
            return device_fd, device
    finally:
        os.close(control_fd)
    raise DeviceBusy("no loop device could be had: others took each one first", cause=f"{list(refused.items())[-1:]}")


def _candidate(control_fd: int, refused: dict[int, OSError]) -> int:
    """Return a loop device to try: a free one, or a new one if the free one was refused before (somebody claims it without binding it)."""
    number = block.free_loop_number(control_fd)
    while number in refused:
        number += 1
        with suppress(FileExistsError):
            block.add_loop(control_fd, number)
    return number


def _open_control(devices: Path) -> int:
    path = devices / "loop-control"
    try:
        if not path.exists():
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(*_CONTROL_MINOR))
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENODEV, errno.ENXIO}:
            raise KernelLacks("the kernel has no loop devices", cause=str(error), fix="modprobe loop") from error
        raise


def _check(device_fd: int, device: Path, image_fd: int, image: Path, writable: bool) -> None:
    """Refuse a device that is not what was asked for: another file's, of another size, or not protected."""
    status, there = block.loop_status(device_fd), os.fstat(image_fd)
    if (status.backing_device, status.backing_inode) != (there.st_dev, there.st_ino):
        raise DeviceBusy(f"{device} was bound to another file while {image.name} was being attached")
    if writable and block.is_read_only(device_fd):
        block.set_read_only(device_fd, False)  # somebody's `blockdev --setro` outlived their binding
    if block.is_read_only(device_fd) is writable:
        raise DeviceFailed(f"{device} over {image.name} is {'read-only' if writable else 'writable'}")
    if block.size_bytes(device_fd) != there.st_size & ~511:
        raise DeviceFailed(f"{device} has not the size of {image.name}", cause=f"{block.size_bytes(device_fd)} and {there.st_size} bytes")
