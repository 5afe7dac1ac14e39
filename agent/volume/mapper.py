"""Device-mapper devices of our own over LVM's volumes: made for one use, known by identity, vanishing with their last user.

A device is made and at once ordered to be removed when it is closed for the last time (dmsetup(8), remove --deferred). We hold it
open as long as the context lasts; a mount or another opener keeps it longer. So a device of ours that exists is in use, a SIGKILL
included, and the kernel alone decides it. Read-only devices are so in their table: every write is refused below the page cache.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from agent.contract.errors import CommandFailed, DeviceBusy, DeviceFailed, KernelLacks, ProgramMissing
from agent.system.clock import wait_until
from agent.system.run import Output, run

_SYS: Final = Path("/sys/class/block")
_UDEV: Final = Path("/run/udev/control")
_WITHOUT_UDEV: Final = ("--noudevsync", "--noudevrules")
_SECTOR_BYTES: Final = 512
_GRACE_S: Final = 2.0
_OURS: Final = "LANDFALL-"


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A thin pool as the kernel sees it, in chunks and in blocks of metadata; ``held``: a metadata snapshot is reserved."""

    metadata_used: int
    metadata_total: int
    data_used: int
    data_total: int
    held: bool
    mode: str
    needs_check: bool

    @property
    def takes_writes(self) -> bool:
        """Whether the pool commits: after a commit that failed the kernel keeps it read-only, until its metadata was checked."""
        return self.mode in {"rw", "out_of_data_space"} and not self.needs_check

    @property
    def metadata_is_full(self) -> bool:
        return self.metadata_used >= self.metadata_total


@dataclass(frozen=True, slots=True)
class SnapshotStatus:
    """A classic snapshot as the kernel sees it; invalid ones have given up. ``used_bytes`` of its COW device includes the tables."""

    valid: bool
    used_bytes: int
    total_bytes: int


def linear(device: Path) -> str:
    """Return the target that gives a device from its beginning on."""
    return f"linear {device} 0"


def thin(pool: Path, thin_id: int) -> str:
    """Return the target that gives a thin volume of a pool."""
    return f"thin {pool} {thin_id}"


ZERO: Final = "zero"
"""The target that reads as zeros."""


@contextmanager
def device_over(target: str, size_bytes: int, lv_uuid: str, *, writable: bool) -> Iterator[Path]:
    """Give a device over a logical volume for as long as the context lasts, or a mount or opener of it. DeviceFailed.

    Exclusion is the caller's (``in_use``). If we die here the kernel removes it, or ``remove_unused`` does.
    """
    name = f"landfall-{secrets.token_hex(8)}"
    identity = f"{_OURS}{lv_uuid}-{'w' if writable else 'r'}-{name[-16:]}"
    table = f"0 {size_bytes // _SECTOR_BYTES} {target}"
    try:
        dmsetup(["create", name, "--uuid", identity, *(() if writable else ("--readonly",)), "--table", table])
    except CommandFailed as error:
        if "busy" in str(error.cause).lower():
            raise DeviceBusy("the device below is mounted or open for somebody alone", cause=str(error.cause)) from error
        raise
    device_fd = -1
    try:
        device = by_identity(identity)
        if device is None:
            raise DeviceFailed(f"the device {name} did not come")
        device_fd = os.open(device, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except BaseException:
        dmsetup(["remove", name])
        raise
    try:
        dmsetup(["remove", "--deferred", name])
        _forget_node(name, device_fd)
        yield device
    finally:
        os.close(device_fd)


def in_use(lv_uuid: str, *, writers_only: bool = False) -> bool:
    """Whether a logical volume has a device of ours; one that is about to go is waited for."""
    return not wait_until(lambda: not _devices(f"{_OURS}{lv_uuid}-{'w-' if writers_only else ''}"), _GRACE_S)


def refuse_in_use(lv_uuid: str, what: str, *, writers_only: bool = False) -> None:
    """DeviceBusy if a logical volume has a device of ours."""
    if in_use(lv_uuid, writers_only=writers_only):
        raise DeviceBusy(f"{what} is attached or mounted", cause=f"{', '.join(map(str, _devices(_OURS + lv_uuid)))}")


def resize(lv_uuid: str, size_bytes: int) -> None:
    """Let every device of ours over a thin volume have the size that the volume has now, whoever uses it."""
    for device in _devices(f"{_OURS}{lv_uuid}-"):
        name = (_SYS / device.name / "dm" / "name").read_text().strip()
        _, _, *rest = dmsetup(["table", name]).text.split()
        read_only = ("--readonly",) if (_SYS / device.name / "ro").read_text().strip() == "1" else ()
        dmsetup(["reload", name, *read_only, "--table", " ".join(["0", str(size_bytes // _SECTOR_BYTES), *rest])])
        dmsetup(["resume", name])


def open_count(device: Path) -> int:
    """Return how many have a device open, mounts and devices over it included."""
    return int(dmsetup(["info", "--columns", "--noheadings", "-o", "open", str(device)]).text.strip() or 0)


def is_device_of(number: tuple[int, int], lv_uuid: str) -> bool:
    """Whether the block device (major, minor) is one of ours over a logical volume."""
    return _identity(Path(f"/sys/dev/block/{number[0]}:{number[1]}")).startswith(f"{_OURS}{lv_uuid}-")


def remove_unused() -> None:
    """Let every device of ours go with its last user: of those whose maker died before it could say so."""
    for device in _devices(_OURS):
        with suppress(CommandFailed, OSError):
            name = (_SYS / device.name / "dm" / "name").read_text().strip()
            dmsetup(["remove", "--deferred", name])


def by_identity(identity: str) -> Path | None:
    """Return the device that device-mapper knows by exactly this UUID, if it is there."""
    found = [device for device in _devices(identity) if _identity(_SYS / device.name) == identity]
    return found[0] if found else None


def resume_left(prefix: str) -> None:
    """Resume the devices that stay suspended, of those whose identity begins so: until then they take no reader and no writer."""

    def suspended() -> list[Path]:
        return [device for device in _devices(prefix) if _suspended(device)]

    if suspended() and not wait_until(lambda: not suspended(), _GRACE_S):
        for device in suspended():
            dmsetup(["resume", (_SYS / device.name / "dm" / "name").read_text().strip()])


def pool_status(pool: Path) -> PoolStatus:
    """Return the status of a thin pool (Documentation/admin-guide/device-mapper/thin-provisioning.rst).

    Of one that has failed altogether nothing is known but that: its mode is ``Fail``.
    """
    words = dmsetup(["status", str(pool)]).text.split()[3:]
    if len(words) < 6 or "/" not in words[1]:
        return PoolStatus(0, 1, 1, 1, held=False, mode="Fail", needs_check=True)
    metadata_used, metadata_total = map(int, words[1].split("/"))
    data_used, data_total = map(int, words[2].split("/"))
    return PoolStatus(metadata_used, metadata_total, data_used, data_total, words[3] != "-", words[4], "needs_check" in words)


def snapshot_status(snapshot: Path) -> SnapshotStatus:
    """Return the status of a classic snapshot (Documentation/admin-guide/device-mapper/snapshot.rst)."""
    text = dmsetup(["status", str(snapshot)]).text.strip()
    words = text.split()[3:]
    used, _, total = words[0].partition("/") if words else ("", "", "")
    if not (used.isdigit() and total.isdigit()):  # Invalid, Overflow, Unknown
        return SnapshotStatus(False, 0, 0)
    return SnapshotStatus(True, int(used) * _SECTOR_BYTES, int(total) * _SECTOR_BYTES)


def target_of(device: Path) -> str:
    """Return the kind of a device's first target, such as ``snapshot-merge``."""
    return dmsetup(["table", str(device)]).text.split()[2]


def message(pool: Path, text: str) -> None:
    """Send a thin pool a message."""
    dmsetup(["message", str(pool), "0", text])


def dmsetup(arguments: list[str]) -> Output:
    """Run dmsetup; KernelLacks without device-mapper, ProgramMissing without the program."""
    try:
        return run(["dmsetup", *(() if _UDEV.exists() else _WITHOUT_UDEV), *arguments])
    except ProgramMissing as error:
        raise ProgramMissing("dmsetup is not installed", fix="Install lvm2.") from error
    except CommandFailed as error:
        if not Path("/sys/class/misc/device-mapper").exists():
            raise KernelLacks("the kernel has no device-mapper", cause=str(error.cause), fix="modprobe dm-mod") from error
        raise


def _devices(prefix: str) -> list[Path]:
    return [Path("/dev") / folder.name for folder in _SYS.glob("dm-*") if _identity(folder).startswith(prefix)]


def _suspended(device: Path) -> bool:
    try:
        return (_SYS / device.name / "dm" / "suspended").read_text().strip() == "1"
    except OSError:
        return False


def _identity(folder: Path) -> str:
    try:
        return (folder / "dm" / "uuid").read_text().strip()
    except OSError:
        return ""


def _forget_node(name: str, device_fd: int) -> None:
    """Remove the name that dmsetup made where no udevd would: it would outlive its device."""
    node = Path("/dev/mapper") / name
    with suppress(FileNotFoundError):
        there = node.lstat()
        if not _UDEV.exists() and stat.S_ISBLK(there.st_mode) and there.st_rdev == os.fstat(device_fd).st_rdev:
            node.unlink()
