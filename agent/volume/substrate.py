"""What a substrate must do: hold a volume's generations, say which blocks differ, and commit a workspace in one step.

Three substrates keep this contract (reflink, lvm-thin, lvm-snapshot), and one conformance suite proves each. Above this line
everything is a block device. Reading devices are read-only for the kernel too, and vanish with their last user.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from agent.contract.identity import FilesystemKind, GenerationId
from agent.contract.messages import GenerationFacts, Role, Unreadable


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """A volume as its substrate remembers it, durable beside its images."""

    id: UUID
    name: str
    filesystem: FilesystemKind
    size_bytes: int
    sector_bytes: int
    role: Role
    epoch: int


@dataclass(frozen=True, slots=True, eq=False)
class ChangedRuns:
    """Runs of blocks whose content may differ between two generations: ascending, disjoint, none missed.

    ``diff_block`` is the block address of the run's pre-image in the differential volume (dmi.HOLE: a hole in the base); inside a run
    the addresses ascend with the blocks. ``target_hole`` marks runs that the target does not have.
    """

    first: NDArray[np.uint64]
    blocks: NDArray[np.uint64]
    diff_block: NDArray[np.uint64]
    target_hole: NDArray[np.bool_]


class WorkspaceKind(StrEnum):
    """Writable clones that nobody else sees until they are committed."""

    LANDING = "landing"  # pieces land here
    SALVAGE = "salvage"  # base plus whole files
    HEALED = "healed"  # a base whose damaged blocks are being replaced


@dataclass(frozen=True, slots=True)
class Workspace:
    """One workspace: what for, and of which transfer."""

    volume: UUID
    transfer: UUID
    kind: WorkspaceKind


@dataclass(frozen=True, slots=True)
class Take:
    """A generation that is to be taken of a volume, mounted on ``mount_point`` or, where that is None, not at all."""

    volume: UUID
    mount_point: Path | None
    facts: GenerationFacts


@dataclass(frozen=True, slots=True)
class Foreign:
    """Something that holds a filesystem, which is no volume yet: a device to look into it, which must not be written."""

    device: Path
    size_bytes: int
    sector_bytes: int


class Substrate(Protocol):
    """Operational volumes, their generations, and workspaces."""

    kind: str
    branches: bool  # whether ``branch`` costs no copy, and may be asked for

    @property
    def disk(self) -> Path | None:
        """A device that everything here stands on; None where it cannot be told."""

    def differential_identity(self, base: GenerationId) -> str:
        """Return the identity of the device that ``diff_block`` addresses: the pool's, or that of the base's own COW device."""

    def differential(self, base: GenerationId) -> AbstractContextManager[Path]:
        """Give the device that ``diff_block`` addresses, for reading, for as long as the context lasts."""

    def free_bytes(self, workspace: Workspace | None = None) -> int:
        """Return how much can still be written into a workspace; without one, into what is made next."""

    def volumes(self) -> tuple[VolumeRecord, ...]:
        """Return every volume held here whose record can be read."""

    def unreadable(self) -> tuple[Unreadable, ...]:
        """Return the records of volumes and generations that cannot be read: they count for nothing and are swept by nobody."""

    def create(self, record: VolumeRecord) -> None:
        """Make a volume with g0 as its only generation; a primary also gets an empty operational image. VolumeExists, NoSpace."""

    def foreign(self, source: str) -> AbstractContextManager[Foreign]:
        """Give what ``source`` names in the substrate's own words, to look into. NotOurs, LayoutUnsupported for what cannot become an
        operational volume without being copied, DeviceBusy for what is used, VolumeExists for what is Landfall's already."""

    def adopt(self, record: VolumeRecord, source: str) -> None:
        """Make a volume of which ``source`` is the operational volume, in place: not a block of it is written.

        The volume comes first, without an operational one, then ``source`` takes that place in one step. If we die in between, ``source``
        is as it was, and asked again, the rest is done; asked after the end, nothing is. VolumeExists.
        """

    def remove(self, volume: UUID) -> None:
        """Destroy a volume with all its generations and workspaces; DeviceBusy while any is in use."""

    def refuse_growth(self, volume: UUID, size_bytes: int) -> None:
        """Raise what ``grow`` would raise before it changes anything."""

    def grow(self, volume: UUID, size_bytes: int) -> None:
        """Let a volume be larger: its operational volume, and by zeros at the end every generation of it.

        LayoutUnsupported for less than it has, or a size that the substrate cannot give; DeviceBusy while it is mounted or read, where
        the substrate cannot do it then. Asked again, what is missing is done.
        """

    def set_role(self, volume: UUID, role: Role, epoch: int) -> None:
        """Record the role and epoch durably."""

    def generations(self, volume: UUID) -> tuple[GenerationFacts, ...]:
        """Return the generations whose records can be read, g0 included, oldest first: by epoch, then by counter."""

    def take(self, volume: UUID, mount_point: Path | None, facts: GenerationFacts) -> float:
        """Take one generation: ``take_together`` of one volume."""

    def take_together(self, takes: Sequence[Take]) -> float:
        """Make the state of operational volumes at one moment generations, one of each; return the freeze in milliseconds.

        All that are mounted are frozen before the first is cloned, and thawed after the last is. If we die here each is thawed by its
        guard, and a clone without its record is swept. Records are made one by one after that: whoever asked counts those of one order.
        """

    def drop(self, generation: GenerationId) -> None:
        """Give up a generation; NoSuchGeneration if it is not held, DeviceBusy while it is read, RequestRefused for g0."""

    def changed(self, base: GenerationId, target: GenerationId) -> ChangedRuns:
        """Return the runs that differ. Against g0 these are all runs that the target has. GenerationInvalid for a base that is lost."""

    def reading(self, generation: GenerationId) -> AbstractContextManager[Path]:
        """Attach a generation read-only for as long as the context lasts, or a mount of it."""

    def refuse_written(self, generation: GenerationId) -> None:
        """BaseMismatch if somebody wrote to a generation, or exchanged its content, since it became one. GenerationInvalid."""

    def operational(self, volume: UUID) -> AbstractContextManager[Path]:
        """Attach the operational image read-write for as long as the context lasts, or a mount of it."""

    def clone_operational(self, volume: UUID, generation: GenerationId) -> None:
        """Make the operational image a clone of ``generation``, replacing the old image in one step; DeviceBusy if it is in use."""

    def begin(self, workspace: Workspace, base: GenerationId, room_bytes: int | None = None) -> None:
        """Clone ``base`` as a workspace, replacing one of the same name. NoSpace leaves everything as it was.

        At most ``room_bytes`` of it will be written (None: nobody knows): a substrate that sets room aside goes by that.
        """

    def branch(self, workspace: Workspace, source: Workspace) -> None:
        """Clone one workspace of a volume as another, replacing one of that name. DeviceBusy while ``source`` is attached; NoSuchTransfer,
        NoSpace leave everything as it was. If we die here the old one stands, or the new one."""

    def exists(self, workspace: Workspace) -> bool:
        """Whether the workspace is there, whole."""

    def workspaces(self, volume: UUID) -> tuple[Workspace, ...]:
        """Return every workspace of a volume."""

    def writing(self, workspace: Workspace) -> AbstractContextManager[Path]:
        """Attach a workspace read-write, exclusively; DeviceBusy if somebody else has it, NoSuchTransfer if it is not there."""

    def commit(self, workspace: Workspace, facts: GenerationFacts) -> None:
        """Make the workspace a generation in one durable step. If we die here it is a workspace still, or the generation, never both."""

    def replace(self, workspace: Workspace, generation: GenerationId) -> None:
        """Let a healed workspace take the place of ``generation`` in one durable step."""

    def discard(self, workspace: Workspace) -> None:
        """Remove a workspace if it is there; DeviceBusy while it is attached or mounted."""

    def recover(self) -> None:
        """Finish or sweep what a crash left half done; run at every start, idempotent."""
