"""Block devices of this node and what identifies each: by udev where it runs, by /sys where it does not.

A device's name says nothing lasting (the kernel hands names out anew at every start); what counts is its serial number, WWN or the UUID
of what is on it, and for a loop device the file behind it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyudev

from agent.contract.identity import FilesystemKind
from agent.contract.messages import DeviceFacts
from agent.system import block
from agent.volume.mounts import mounts
from agent.volume.superblock import kind_of, read_ext4, read_xfs

_SYS: Final = Path("/sys")
_UDEV_CONTROL: Final = Path("/run/udev/control")
_UDEV_IDENTITIES: Final = ("ID_WWN_WITH_EXTENSION", "ID_WWN", "ID_SERIAL", "ID_PART_ENTRY_UUID", "DM_UUID", "ID_FS_UUID")
_SYS_IDENTITIES: Final = ("wwid", "device/wwid", "serial", "device/serial", "device/vpd_pg83", "dm/uuid")


def devices(*, sys: Path = _SYS, udev_control: Path = _UDEV_CONTROL) -> tuple[DeviceFacts, ...]:
    """Return every block device that has a size, by name. A device that goes while we look is left out."""
    by_udev = _identities_of_udev() if udev_control.exists() else {}
    holders = _mounted()
    found = []
    for folder in sorted((sys / "class" / "block").iterdir()):
        if _text(folder / "size") in {"", "0"}:
            continue
        try:
            found.append(_facts(folder, by_udev, holders))
        except OSError:
            continue
    return tuple(found)


def _facts(folder: Path, by_udev: dict[str, str], holders: dict[str, str]) -> DeviceFacts:
    path = Path("/dev") / folder.name.replace("!", "/")
    number = _text(folder / "dev")
    kind = _kind(folder)
    queue = folder / "queue" if (folder / "queue").exists() else folder.resolve().parent / "queue"
    identity = _loop_identity(folder, path) if kind == "loop" else ""
    identity = identity or by_udev.get(number, "") or _sys_identity(folder) or _filesystem_identity(path)
    return DeviceFacts(
        path=str(path),
        size_bytes=int(_text(folder / "size") or 0) * 512,  # always in units of 512 bytes, whatever the sector
        sector_bytes=int(_text(queue / "logical_block_size") or 512),
        read_only=_text(folder / "ro") == "1",
        kind=kind,
        identity=identity,
        holder=holders.get(number, "") or ", ".join(sorted(path.name for path in (folder / "holders").glob("*"))),
    )


def _kind(folder: Path) -> str:
    if (folder / "partition").exists():
        return "partition"
    if (folder / "dm").exists():
        return "dm"
    return "loop" if (folder.name.startswith("loop") and folder.name[4:].isdigit()) else "disk"


def _identities_of_udev() -> dict[str, str]:
    """Return what udev calls each device, by "major:minor"."""
    found: dict[str, str] = {}
    for device in pyudev.Context().list_devices(subsystem="block"):
        number = device.device_number
        for name in _UDEV_IDENTITIES:
            value = device.properties.get(name)
            if value:
                found[f"{os.major(number)}:{os.minor(number)}"] = f"{name.removeprefix('ID_').lower()}:{value}"
                break
    return found


def _sys_identity(folder: Path) -> str:
    for name in _SYS_IDENTITIES:
        value = _text(folder / name)
        if value:
            return f"{Path(name).name}:{value}"
    return ""


def _loop_identity(folder: Path, device: Path) -> str:
    """A loop device is the file behind it, by device and inode: names of files change."""
    if not (folder / "loop").exists():
        return ""
    device_fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = block.loop_status(device_fd)
    finally:
        os.close(device_fd)
    major, minor = os.major(status.backing_device), os.minor(status.backing_device)
    return f"file:{major}:{minor}:{status.backing_inode}"


def _filesystem_identity(device: Path) -> str:
    """The UUID of an ext4 or XFS on a device that has no identity of its own."""
    if not device.exists():
        return ""
    kind = kind_of(device)
    if kind is None:
        return ""
    return f"fs_uuid:{(read_ext4(device) if kind is FilesystemKind.EXT4 else read_xfs(device)).uuid}"


def _mounted() -> dict[str, str]:
    """Return where devices are mounted, by "major:minor"."""
    found: dict[str, str] = {}
    for mounted in mounts():
        numbers = {f"{mounted.device[0]}:{mounted.device[1]}", *_number_of(mounted.source)}
        for number in numbers:
            found.setdefault(number, f"mounted on {mounted.mount_point}")
    return found


def _number_of(source: str) -> Iterator[str]:
    """A mount's source names a device even where the mount's own number is none (btrfs)."""
    known = _SYS / "class" / "block" / source.removeprefix("/dev/").replace("/", "!") / "dev"
    if source.startswith("/dev/") and known.exists():
        yield _text(known)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().strip(b"\0 \n").decode("ascii", "backslashreplace")
    except OSError:
        return ""
