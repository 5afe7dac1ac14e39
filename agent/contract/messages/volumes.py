"""Volumes: what a node holds of them, and how they come to be there."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

from agent.contract.identity import FilesystemKind
from agent.contract.messages.generations import GenerationFacts


class Role(StrEnum):
    """What this node is to a volume."""

    PRIMARY = "primary"  # serves the operational volume
    SECONDARY = "secondary"  # holds the second operational volume


class ReplicaState(StrEnum):
    """States of a volume on a node, in DRBD's sense."""

    UP_TO_DATE = "up-to-date"
    OUTDATED = "outdated"
    INCONSISTENT = "inconsistent"


@dataclass(frozen=True, slots=True)
class VolumeFacts:
    """A volume as a node holds it; ``generations`` oldest first."""

    id: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    role: Role
    state: ReplicaState
    epoch: int
    serving: bool
    device: str  # the operational volume's block device while serving, else empty
    mount_point: str  # where it is mounted while serving, else empty
    generations: tuple[GenerationFacts, ...] = ()
    lease_s: float | None = None  # how long its lease lasts; None: it has none
    address: str = ""  # the service address that this node has for it
    confirmed: bool = False  # a primary that was told to serve at its epoch since this node was booted, and got that done
    exports: tuple[str, ...] = ()  # the protocols by which clients reach it: SMB, NFS
    sector_bytes: int = 512
    rests: bool = False  # it was served, and was told to stop: read-only, or not mounted


@dataclass(frozen=True, slots=True)
class CreateVolume:
    """volume.create: make an operational volume with an empty filesystem, mount and serve it (NAS 1)."""

    volume: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    sector_bytes: int = 512
    mkfs_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AppraiseVolume:
    """volume.appraise: look at a filesystem that is to become a volume; ``source`` in the words of the node's substrate:
    the path of an image file, or the name of a logical volume (NAS 1)."""

    source: str


@dataclass(frozen=True, slots=True)
class Appraised:
    """Answer to volume.appraise: it can be adopted, as this."""

    filesystem: FilesystemKind
    size_bytes: int
    sector_bytes: int


@dataclass(frozen=True, slots=True)
class AdoptVolume:
    """volume.adopt: make a filesystem that was appraised an operational volume, in place, mount and serve it (NAS 1)."""

    volume: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    sector_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class AdmitReplica:
    """volume.admit: get ready to hold the second operational volume, beginning with g0 (NAS 2)."""

    volume: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    sector_bytes: int = 512


@dataclass(frozen=True, slots=True)
class ListVolumes:
    """volume.list"""


@dataclass(frozen=True, slots=True)
class GrowVolume:
    """volume.grow: let the volume be larger, and a primary's filesystem. Asked again, what is missing is done."""

    volume: UUID
    size_bytes: int
    dry_run: bool = False  # only say what speaks against it


@dataclass(frozen=True, slots=True)
class RemoveVolume:
    """volume.remove: destroy everything this node holds of a volume that it does not serve and of which no transfer is open."""

    volume: UUID


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record of a volume or a generation that cannot be read, and why; it was left as it is, and hides nothing else."""

    volume: UUID | None  # None: even that is not known
    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Volumes:
    """Answer to volume.list: what is held here, and what cannot be read of it."""

    volumes: tuple[VolumeFacts, ...]
    unreadable: tuple[Unreadable, ...] = ()
    troubles: tuple[str, ...] = ()  # what is wrong with the disks below all of them, one sentence each
    term: int = 0  # the highest that a management node named
