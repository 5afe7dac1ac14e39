"""LVM as typed facts and single acts: volume groups and logical volumes known by UUID, sizes in bytes, changes that are one commit each.

Facts come from ``--reportformat json`` with named columns alone; names are only ever taken from a report made a moment ago, and a report is
believed only if the group's UUID in it is the one that was opened. Sources: lvmreport(7), lvm(8) for the characters of a tag.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from agent.blockio.device import Device
from agent.contract.errors import CommandFailed, DeviceFailed, NotOurs, ProgramMissing
from agent.system.run import Output, run

TAGS: Final = frozenset({"landfall", "landfall-lab"})
"""A volume group must carry one of these; in one without nothing is ever made, changed or removed."""

_UDEV: Final = Path("/run/udev/control")
_WITHOUT_UDEV: Final = "udev_sync=0 udev_rules=0"
_TIME_LIMIT_S: Final = 120.0
_MERGE_LIMIT_S: Final = 24 * 3600.0  # it copies everything that the snapshot holds
_HEADERS_BLOCKS: Final = 2  # the label and, at 4096, the header of the metadata area: lib/format_text/layout.h of lvm2
_AREA_AT: Final = 4096
_AREA_MAGIC: Final = b" LVM2 x[5A%r0N*>"
_GROUP_COLUMNS: Final = "vg_uuid,vg_name,vg_tags,vg_free,vg_extent_size,pv_name,pv_mda_used_count"
_VOLUME_COLUMNS: Final = (
    "vg_uuid,vg_tags,lv_uuid,lv_name,lv_size,lv_tags,lv_permissions,segtype,thin_id,pool_lv_uuid,data_lv_uuid,metadata_lv_uuid,chunk_size,"
    "lv_when_full,origin_uuid,lv_merging"
)


@dataclass(frozen=True, slots=True)
class Group:
    """A volume group."""

    uuid: str
    name: str
    tags: frozenset[str]
    free_bytes: int
    extent_bytes: int
    disk: Path | None  # one of its disks that keeps the metadata


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """A logical volume; thin ones have ``thin_id`` and ``pool`` (a UUID), pools ``data`` and ``metadata`` (UUIDs), snapshots ``origin``.

    ``size_bytes`` of a classic snapshot is that of its COW device. ``merging``: it is being merged, or is merged into.
    """

    uuid: str
    name: str
    size_bytes: int
    tags: frozenset[str]
    read_only: bool
    kind: str
    thin_id: int | None
    pool: str
    data: str
    metadata: str
    chunk_bytes: int
    errors_when_full: bool
    origin: str
    merging: bool


def group(name: str) -> Group:
    """Return our volume group of that name; NotOurs if there is none or it does not carry one of ``TAGS``, ProgramMissing without lvm2."""
    rows = _report(["vgs", "-o", _GROUP_COLUMNS, "--select", f"vg_name={name}"], "vg")
    called = {row["vg_uuid"] for row in rows}
    if len(called) != 1:
        raise NotOurs(f"there is no volume group {name}" if not rows else f"{len(called)} volume groups are called {name}")
    row = rows[0]
    disk = next((Path(row["pv_name"]) for row in rows if int(row["pv_mda_used_count"] or 0)), None)
    found = Group(row["vg_uuid"], row["vg_name"], _tags(row["vg_tags"]), int(row["vg_free"]), int(row["vg_extent_size"]), disk)
    if not found.tags & TAGS:
        raise NotOurs(
            f"volume group {name} was not given to Landfall",
            cause=f"it carries none of the tags {', '.join(sorted(TAGS))}",
            fix=f"If all of it is for Landfall: vgchange --addtag landfall {name}.",
        )
    return found


def free_bytes(of: Group) -> int:
    """Return how much of a group no logical volume has."""
    return sum(int(row["vg_free"]) for row in _report(["vgs", "-o", "vg_free", "--select", f"vg_uuid={of.uuid}"], "vg"))


def volumes(of: Group) -> tuple[LogicalVolume, ...]:
    """Return every logical volume of a group, hidden ones too; NotOurs if the name has come to mean another group."""
    rows = _report(["lvs", "-a", "-o", _VOLUME_COLUMNS, of.name], "lv")
    found: dict[str, LogicalVolume] = {}
    for row in rows:
        if row["vg_uuid"] != of.uuid or not _tags(row["vg_tags"]) & TAGS:
            raise NotOurs(f"volume group {of.name} is not the one that was opened", cause=f"{row['vg_uuid']} and {of.uuid}")
        found[row["lv_uuid"]] = LogicalVolume(
            row["lv_uuid"],
            row["lv_name"].strip("[]"),
            int(row["lv_size"]),
            _tags(row["lv_tags"]),
            row["lv_permissions"].startswith("read-only"),
            row["segtype"],
            int(row["thin_id"]) if row["thin_id"] else None,
            row["pool_lv_uuid"],
            row["data_lv_uuid"],
            row["metadata_lv_uuid"],
            int(row["chunk_size"] or 0),
            row["lv_when_full"] == "error",
            row["origin_uuid"],
            row["lv_merging"] == "merging",
        )
    return tuple(found.values())


def stamp(of: Group) -> bytes | None:
    """Return something that differs after every commit to the group's metadata, by whomever; None if it cannot be told.

    It is the header that LVM writes last in a commit, read past the page cache from one of the group's disks.
    """
    if of.disk is None:
        return None
    with Device.open_reading(of.disk) as disk:
        headers = bytes(disk.read(0, _HEADERS_BLOCKS))
    return headers if headers[_AREA_AT + 4 :].startswith(_AREA_MAGIC) else None


def create(of: Group, arguments: Sequence[str], name: str, tags: Sequence[str] = ()) -> None:
    """Make a logical volume with its tags in one commit."""
    _lvm(["lvcreate", "--yes", *_options("--addtag", tags), "--name", name, *arguments])
    _make_durable(of)


def retag(of: Group, volume: LogicalVolume, *, add: Sequence[str] = (), drop: Sequence[str] = (), writable: bool | None = None) -> None:
    """Change the tags of a logical volume, and whether it may be written, in one commit: all of it, or nothing."""
    drop = [tag for tag in drop if tag not in add]
    permission = [] if writable is None or writable is not volume.read_only else ["--permission", "rw" if writable else "r"]
    _lvm(["lvchange", *_options("--deltag", drop), *_options("--addtag", add), *permission, f"{of.name}/{volume.name}"])
    _make_durable(of)


def change(of: Group, name: str, *arguments: str) -> None:
    """Change one property of a logical volume."""
    _lvm(["lvchange", *arguments, f"{of.name}/{name}"])


def remove(of: Group, volume: LogicalVolume) -> None:
    """Remove a logical volume that nobody uses, in one commit."""
    _lvm(["lvremove", "--force", "--force", "--yes", f"{of.name}/{volume.name}"])


def activate(of: Group, volume: LogicalVolume) -> None:
    """Let the kernel have a logical volume, an origin with all its snapshots; a merge that was under way goes on."""
    _lvm(["lvchange", "--activate", "y", "--ignoreactivationskip", f"{of.name}/{volume.name}"])


def activate_checked(of: Group, pool: LogicalVolume) -> None:
    """Let the kernel have a thin pool, after its metadata was checked; CommandFailed, and it has it not, if the check fails.

    A check that finds nothing also ends the kernel's doubts after a failed commit (thin_check(8), --clear-needs-check-flag), which LVM
    as some distributions build it leaves standing for ever.
    """
    _lvm(["lvchange", "--activate", "y", f"{of.name}/{pool.name}"], check="--clear-needs-check-flag")


def deactivate(of: Group, volume: LogicalVolume) -> None:
    """Take a logical volume from the kernel, an origin with all its snapshots; CommandFailed if one of them is in use."""
    _lvm(["lvchange", "--activate", "n", f"{of.name}/{volume.name}"])


def extend(of: Group, volume: LogicalVolume, size_bytes: int) -> None:
    """Let a logical volume (of a classic snapshot: its COW device) have at least so many bytes; CommandFailed if the group has not."""
    _lvm(["lvextend", "--size", f"{size_bytes}b", f"{of.name}/{volume.name}"])


def merge(of: Group, snapshot: LogicalVolume) -> None:
    """Write what a classic snapshot holds into its origin, and remove it. Neither may be in use.

    From LVM's first commit on the origin reads as the snapshot did. If we die here LVM and the kernel go on, also after a boot.
    """
    _lvm(["lvconvert", "--merge", "--interval", "1", f"{of.name}/{snapshot.name}"], timeout_s=_MERGE_LIMIT_S)
    _make_durable(of)


def detach(of: Group, snapshot: LogicalVolume) -> None:
    """Make a classic snapshot a volume of its own, which has its COW device's bytes, in one commit; the origin is not protected then.

    Names, tags and UUID stay. ``rejoin`` takes it back, if neither was written meanwhile (lvconvert(8), --splitsnapshot).
    """
    _lvm(["lvconvert", "--yes", "--splitsnapshot", f"{of.name}/{snapshot.name}"])
    _make_durable(of)


def rejoin(of: Group, origin: LogicalVolume, detached: LogicalVolume, chunk_bytes: int) -> None:
    """Make what was detached a snapshot of its origin again, in one commit; as large as the origin is now."""
    shape = ["--type", "snapshot", "--zero", "n", "--chunksize", f"{chunk_bytes}b"]
    _lvm(["lvconvert", "--yes", *shape, f"{of.name}/{origin.name}", f"{of.name}/{detached.name}"])
    _make_durable(of)


def poll(of: Group, origin: LogicalVolume) -> None:
    """Let LVM look after a merge that it began and that nobody waits for any more."""
    _lvm(["lvchange", "--poll", "y", f"{of.name}/{origin.name}"], settings="polling_interval=1")


def dm_uuid(of: Group, volume_uuid: str = "", layer: str = "") -> str:
    """Return the identity by which the kernel knows LVM's own device of a logical volume, or of a hidden layer of it.

    Without a volume: what those of all volumes of the group begin with.
    """
    identity = f"{of.uuid}{volume_uuid}".replace("-", "")
    return f"LVM-{identity}-{layer}" if layer else f"LVM-{identity}"


def _make_durable(of: Group) -> None:
    """Flush what LVM wrote of the group's metadata: its direct writes alone are in the disk's cache. DeviceFailed: it may be lost yet."""
    if of.disk is not None:
        disk_fd = os.open(of.disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(disk_fd)
        except OSError as error:
            raise DeviceFailed(f"the metadata of volume group {of.name} cannot be made durable", cause=f"{of.disk}: {error}") from error
        finally:
            os.close(disk_fd)


def _options(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _report(argv: list[str], kind: str) -> list[dict[str, str]]:
    """Return the rows of a report, all values as LVM's texts, sizes in bytes without suffix."""
    output = _lvm([*argv, "--reportformat", "json", "--units", "b", "--nosuffix"])
    try:
        document: dict[str, Any] = json.loads(output.text)
        return [row for part in document["report"] for row in part.get(kind, [])]
    except (ValueError, KeyError, TypeError) as error:
        raise CommandFailed(f"{argv[0]} gave a report that cannot be read", cause=f"{error}: {output.text[:200]}") from error


def _lvm(argv: list[str], *, timeout_s: float = _TIME_LIMIT_S, settings: str = "", check: str = "") -> Output:
    settings = settings if _UDEV.exists() else f"{_WITHOUT_UDEV} {settings}"
    config = [f"activation {{ {settings} }}"] if settings else []
    config += [f'global {{ thin_check_options=[ "-q", "{check}" ] }}'] if check else []
    try:
        return run([argv[0], *(["--config", " ".join(config)] if config else []), *argv[1:]], timeout_s=timeout_s)
    except ProgramMissing as error:
        raise ProgramMissing(f"{argv[0]} is not installed", fix="Install lvm2 and thin-provisioning-tools.") from error


def _tags(text: str) -> frozenset[str]:
    return frozenset(filter(None, text.split(",")))
