"""What is mounted where, from /proc/self/mountinfo (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of this namespace. ``device`` is (major, minor); btrfs gives one that belongs to no block device."""

    mount_point: Path
    root: str
    kind: str
    source: str
    device: tuple[int, int]
    options: frozenset[str]
    super_options: frozenset[str]


def mounts() -> tuple[Mount, ...]:
    """Return every mount of this process's namespace, in mount order."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return tuple(_mount(os.fsdecode(line)) for line in lines)


def mounted_at(path: Path) -> Mount:
    """Return the mount that ``path`` lies on."""
    real = path.resolve(strict=True)
    found = [mount for mount in mounts() if real == mount.mount_point or mount.mount_point in real.parents]
    deepest = max(len(mount.mount_point.parts) for mount in found)
    return [mount for mount in found if len(mount.mount_point.parts) == deepest][-1]


def mount_on(mount_point: Path) -> Mount | None:
    """Return the mount on exactly this directory, the topmost if several are stacked, None if there is none."""
    real = mount_point.resolve()
    found = [mount for mount in mounts() if mount.mount_point == real]
    return found[-1] if found else None


def _mount(line: str) -> Mount:
    left, _, right = line.partition(" - ")
    _, _, device, root, mount_point, options, *_ = left.split(" ")
    kind, source, super_options = right.split(" ")
    major, minor = device.split(":")
    return Mount(
        Path(_plain(mount_point)),
        _plain(root),
        kind,
        _plain(source),
        (int(major), int(minor)),
        frozenset(options.split(",")),
        frozenset(super_options.split(",")),
    )


def _plain(text: str) -> str:
    """Return a field with its octal escapes undone."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
