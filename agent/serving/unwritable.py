"""Making a volume unwritable within a time limit, whoever uses it."""

from __future__ import annotations

import os
from pathlib import Path

from agent.system import block
from agent.system.run import finishes
from agent.volume import filesystem
from agent.volume.mounts import mount_on


def make_unwritable(mount_point: Path, *, limit_s: float) -> str:
    """Return in words how: unmounted, or where a process uses it read-only, or shut down as by a power cut; ``limit_s`` for each way.

    What was written before is written back first, as far as the time allows; a filesystem that was shut down replays its log at its next
    mount. A program that hangs is left behind: it can do no harm to what comes after it.
    """
    there = mount_on(mount_point)
    if there is None:
        return "not mounted"
    if finishes(["umount", "-n", str(mount_point)], limit_s) or not filesystem.is_mounted(mount_point):
        return "unmounted"
    finishes(["sync", "--file-system", str(mount_point)], limit_s)
    if finishes(["mount", "-n", "-o", "remount,ro", str(mount_point)], limit_s) and not filesystem.is_writable(mount_point):
        return "in use, made read-only"
    mount_fd = os.open(mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # What was left behind above may have ended by now: what lies below the mount point is another filesystem, perhaps the root's.
        if os.fstat(mount_fd).st_dev != os.makedev(*there.device):
            return "unmounted"
        block.go_down(mount_fd, flush_log=True)
    finally:
        os.close(mount_fd)
    return "in use, shut down"
