"""Loop devices, found by the identity of the file behind them: names of files lie once mounts have gone.

A node's death ends its mounts, and its loop devices detach themselves (autoclear). Only a frozen filesystem stays, mounted
nowhere, with its loop device and the pool below: mounting the device once more reaches the same superblock, which can then be
thawed. This is done here only where the superblock still lives, so that the disks of a killed node are left as they are.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.contract.errors import CommandFailed, LabMissing
from agent.system.block import loop_status
from agent.system.clock import wait_until
from agent.system.run import run

GRACE_S = 1.0
POOL_DEVICE = "pool.device"
"""The file beside a pool's image with the device number of the files in the pool (btrfs makes one up at each mount)."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop device, and st_dev and st_ino of its backing file."""

    path: str
    number: str
    backing_device: int
    backing_inode: int


def attached(file_name: str | None = None) -> list[Loop]:
    """Return the machine's loop devices that have a backing file (of that name).

    To ask a loop device is to open it, and while it is open it cannot be detached; so others' are asked only where it must be.
    """
    found = []
    for backing_file in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            name = Path(backing_file.read_text(errors="surrogateescape").rstrip("\n").removesuffix(" (deleted)")).name
            if file_name is None or name == file_name:
                device = backing_file.parents[1]
                found.append(_ask(Path("/dev", device.name), (device / "dev").read_text().strip()))
    return found


def _ask(device: Path, number: str) -> Loop:
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = loop_status(descriptor)
    finally:
        os.close(descriptor)
    return Loop(str(device), number, status.backing_device, status.backing_inode)


def backed_by(image: Path) -> list[Loop]:
    """Return the loop devices whose backing file is this very file."""
    if not image.exists():
        return []
    status = image.stat()
    return [loop for loop in attached(image.name) if (loop.backing_device, loop.backing_inode) == (status.st_dev, status.st_ino)]


def on_pool(image: Path) -> list[Loop]:
    """Return the loop devices that a pool's image leads to, those of the volumes on it before its own."""
    pools = backed_by(image)
    if not pools:
        return []
    devices = {_device(loop.number) for loop in pools}
    with contextlib.suppress(FileNotFoundError):
        devices.add(_device((image.parent / POOL_DEVICE).read_text(encoding="ascii")))
    return [loop for loop in attached() if loop.backing_device in devices] + pools


def _device(number: str) -> int:
    major, _, minor = number.partition(":")
    return os.makedev(int(major), int(minor))


def wait_until_released(image: Path, limit_s: float) -> bool:
    """Return whether the last loop device of this file went within the limit."""
    return wait_until(lambda: not backed_by(image), limit_s)


def release(images: Iterable[Path], limit_s: float = 20.0) -> None:
    """Guarantee that no loop device leads to these images: wait for those that go by themselves, thaw and detach the others."""
    pending = list(images)

    def left() -> list[Loop]:
        return [loop for image in pending for loop in on_pool(image)]

    def pushed() -> bool:
        for loop in (stuck := left()):
            thaw(loop.path)
            run(["losetup", "--detach", loop.path], ok=(0, 1))
        return not stuck

    if not wait_until(lambda: not left(), GRACE_S) and not wait_until(pushed, limit_s):
        raise LabMissing(f"loop devices stay attached: {', '.join(loop.path for loop in left())}")


def thaw(device: str) -> None:
    """Thaw the filesystem on a device if it is mounted somewhere, be it in a namespace that nobody can reach."""
    name = Path(device).name
    kind = next((kind for kind in ("ext4", "xfs") if Path("/sys/fs", kind, name).exists()), None)
    if kind is None:
        return
    with tempfile.TemporaryDirectory(prefix="landfall-thaw-") as point, contextlib.suppress(CommandFailed):
        run(["mount", "-t", kind, device, point])
        try:
            run(["fsfreeze", "--unfreeze", point], ok=(0, 1))
        finally:
            run(["umount", point])
