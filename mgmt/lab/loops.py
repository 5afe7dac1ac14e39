"""Loop devices, found by the identity of the file behind them: names of files lie once mounts have gone.

A node's death ends its mounts, and its loop devices detach themselves (autoclear). Only a frozen filesystem stays, mounted
nowhere, with its loop device and the pool below: mounting the device once more reaches the same superblock, which can then be
thawed. This is done here only where the superblock still lives, so that the disks of a killed node are left as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.contract.errors import CommandFailed, LabMissing
from agent.system.clock import wait_until
from agent.system.run import run

GRACE_S = 1.0
POOL_DEVICE = "pool.device"
"""The file beside a pool's image with the device number of the files in the pool (btrfs makes one up at each mount)."""


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop device, and the device and inode number of its backing file."""

    path: str
    number: str
    backing_device: str
    backing_inode: int


def attached() -> list[Loop]:
    """Return every loop device of the machine that has a backing file."""
    text = run(["losetup", "--list", "--json", "--output", "NAME,MAJ:MIN,BACK-MAJ:MIN,BACK-INO"]).text
    entries = json.loads(text)["loopdevices"] if text.strip() else []
    return [
        Loop(entry["name"], entry["maj:min"].strip(), entry["back-maj:min"].strip(), int(entry["back-ino"]))
        for entry in entries
        if entry["back-maj:min"]  # one that goes while it is listed has lost its file
    ]


def backed_by(image: Path) -> list[Loop]:
    """Return the loop devices whose backing file is this very file."""
    if not image.exists():
        return []
    status = image.stat()
    return [loop for loop in attached() if (loop.backing_device, loop.backing_inode) == (number(status.st_dev), status.st_ino)]


def on_pool(image: Path) -> list[Loop]:
    """Return the loop devices that a pool's image leads to, those of the volumes on it before its own."""
    pools = backed_by(image)
    if not pools:
        return []
    devices = {loop.number for loop in pools}
    with contextlib.suppress(FileNotFoundError):
        devices.add((image.parent / POOL_DEVICE).read_text(encoding="ascii").strip())
    return [loop for loop in attached() if loop.backing_device in devices] + pools


def number(device: int) -> str:
    """Return a device number as losetup prints it."""
    return f"{os.major(device)}:{os.minor(device)}"


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
            thaw(loop)
            run(["losetup", "--detach", loop.path], ok=(0, 1))
        return not stuck

    if not wait_until(lambda: not left(), GRACE_S) and not wait_until(pushed, limit_s):
        raise LabMissing(f"loop devices stay attached: {', '.join(loop.path for loop in left())}")


def thaw(loop: Loop) -> None:
    """Thaw the filesystem on a loop device if it is mounted somewhere, be it in a namespace that nobody can reach."""
    name = Path(loop.path).name
    kind = next((kind for kind in ("ext4", "xfs") if Path("/sys/fs", kind, name).exists()), None)
    if kind is None:
        return
    with tempfile.TemporaryDirectory(prefix="landfall-thaw-") as point, contextlib.suppress(CommandFailed):
        run(["mount", "-t", kind, loop.path, point])
        try:
            run(["fsfreeze", "--unfreeze", point], ok=(0, 1))
        finally:
            run(["umount", point])
