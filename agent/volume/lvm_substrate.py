"""What the two substrates on LVM have in common: a group's metadata alone remembers volumes, generations and workspaces.

What a logical volume is stands in its tags (lvm_tags.py), and a change of tags is one commit of LVM's: the one step of every
operation. Names are random and never used twice. A snapshot carries its tags from its first commit on. What has no meaning
(unfinished, displaced by another, of a volume that is gone) is swept. Whoever reads or writes one gets a device of ours over it, made
for that use and vanishing with it (mapper.py), so what has such a device is in use.

A change takes the group's lock for as long as it lasts, so that nothing is attached while it is being judged unused.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract.errors import (
    BaseMismatch,
    DeviceBusy,
    DeviceFailed,
    LandfallError,
    LayoutUnsupported,
    NotOurs,
    RequestRefused,
    VolumeExists,
)
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind, empty_generation, plain_name
from agent.contract.messages import GenerationFacts, Role, Unreadable
from agent.system import blockdev
from agent.system.failpoint import failpoint
from agent.volume import lvm, mapper
from agent.volume import lvm_tags as tags
from agent.volume.freeze import frozen, sync_mounted, thaw_if_frozen
from agent.volume.lvm import LogicalVolume
from agent.volume.lvm_held import Held
from agent.volume.mounts import mount_on, mounts
from agent.volume.substrate import Foreign, Take, VolumeRecord, Workspace

HIDDEN: Final = ("--setactivationskip", "y", "--activate", "n")
_LOCKS: Final = Path("/run/lock")


class LvmSubstrate(ABC):
    """The part of ``substrate.Substrate`` that does not depend on what a snapshot is made of."""

    kind: str
    branches: bool

    def __init__(self, group: str) -> None:
        """Open a volume group; NotOurs if it does not carry our tag."""
        self.group = lvm.group(group)
        self._known: tuple[bytes, Held] | None = None

    # --- what a kind of snapshot decides ---

    @abstractmethod
    def _read(self) -> Held:
        """Read what every logical volume is."""

    @abstractmethod
    def _need_room(self, what: str) -> None:
        """Raise NoSpace, before anything is made, if there is no room to begin something new."""

    @abstractmethod
    def _make(self, record: VolumeRecord) -> None:
        """Make what a new volume needs, its g0 last."""

    @abstractmethod
    def _make_empty(self, record: VolumeRecord) -> None:
        """Make a volume's g0 alone, and thereby the volume."""

    @abstractmethod
    def _refuse_kind(self, found: LogicalVolume, listed: tuple[LogicalVolume, ...]) -> None:
        """LayoutUnsupported for a logical volume that cannot become an operational volume as it is; ``listed`` are all of the group."""

    @abstractmethod
    def _foreign_device(self, found: LogicalVolume) -> AbstractContextManager[Path]:
        """Give a read-only device over a logical volume that is not ours yet."""

    @abstractmethod
    def _take_in(self, found: LogicalVolume, record: VolumeRecord) -> None:
        """Make a logical volume the operational one; its tags change in one commit."""

    @abstractmethod
    def _snapshot(self, origin: LogicalVolume, tagged: list[str], *, writable: bool, room_bytes: int | None = None) -> str:
        """Make a snapshot with its tags, into which so many bytes can be written (None: all of it); return its name."""

    @abstractmethod
    def _device(self, volume: LogicalVolume, record: VolumeRecord, *, writable: bool) -> AbstractContextManager[Path]:
        """Give a device of ours over a logical volume."""

    @abstractmethod
    def _clone(self, workspace: Workspace, base: GenerationId, room_bytes: int | None) -> None:
        """Make the workspace in one step."""

    @abstractmethod
    def _after_change(self, volume: UUID) -> None:
        """Tidy up after the newest generation has become another one; what fails here is done at the next occasion."""

    # --- volumes ---

    @property
    def disk(self) -> Path | None:
        """One of the group's disks."""
        return self.group.disk

    def volumes(self) -> tuple[VolumeRecord, ...]:
        """Return every volume held here, by name."""
        return tuple(sorted(self._held().volumes.values(), key=lambda record: (record.name, str(record.id))))

    def unreadable(self) -> tuple[Unreadable, ...]:
        """Return the logical volumes whose tags cannot be read, and why."""
        return self._held().unreadable

    def create(self, record: VolumeRecord) -> None:
        """Make a volume with g0; a primary also gets an empty operational volume. VolumeExists, NoSpace.

        The tag on g0 is the step. If we die before it ``recover`` sweeps.
        """
        plain_name(record.name)
        if record.size_bytes <= 0 or record.size_bytes % BLOCK_BYTES:
            raise LayoutUnsupported(f"{record.size_bytes} bytes are no whole number of blocks", fix=f"Use a multiple of {BLOCK_BYTES}.")
        with self._locked(), self._swept_on_failure():
            if any(other.id == record.id or other.name == record.name for other in self._held().volumes.values()):
                raise VolumeExists(f"volume {record.name} ({record.id}) exists")
            self._need_room(f"volume {record.name}")
            failpoint("substrate.create.before")
            self._make(record)
        failpoint("substrate.create.after")

    @contextmanager
    def foreign(self, source: str) -> Iterator[Foreign]:
        """Give a logical volume of the group that nobody uses. See ``substrate.Substrate.foreign``."""
        with self._locked():
            found = self._found(source)
            below = self.group.disk
            sector_bytes = 512 if below is None else sector_bytes_of(below)
            opened = self._foreign_device(found)
            device = opened.__enter__()
        try:
            yield Foreign(device, found.size_bytes, sector_bytes)
        finally:
            with self._locked():
                opened.__exit__(None, None, None)

    def adopt(self, record: VolumeRecord, source: str) -> None:
        """Make a volume of which a logical volume is the operational one, by one change of its tags. See ``substrate.Substrate.adopt``."""
        with self._locked():
            held = self._held()
            known, operational = held.volumes.get(record.id), held.operational.get(record.id)
            if known is not None and known != record:
                raise VolumeExists(f"volume {record.name} ({record.id}) exists, and is another")
            if operational is not None:
                if operational.name != self._name(source):
                    raise VolumeExists(f"volume {record.name} has an operational volume already")
                return
            found = self._found(source)
            if found.size_bytes != record.size_bytes:
                raise BaseMismatch(f"{source} has {found.size_bytes} bytes, volume {record.name} has {record.size_bytes}")
            failpoint("substrate.adopt.before")
            if known is None:
                plain_name(record.name)
                if any(other.name == record.name for other in held.volumes.values()):
                    raise VolumeExists(f"volume {record.name} exists")
                self._need_room(f"volume {record.name}")
                self._make_empty(record)
            failpoint("substrate.adopt.half")
            self._take_in(found, record)
        failpoint("substrate.adopt.after")

    def _name(self, source: str) -> str:
        """Return the name that a logical volume has in the group: said alone, as GROUP/NAME or as /dev/GROUP/NAME. NotOurs."""
        *above, name = source.removeprefix("/dev/").split("/")
        if above not in ([], [self.group.name]):
            raise NotOurs(f"{source} is no logical volume of {self.group.name}", fix=f"Name one of {self.group.name}, as `lvs` does.")
        return name

    def _found(self, source: str) -> LogicalVolume:
        """Return the logical volume that can be adopted; says what speaks against it."""
        name, listed = self._name(source), lvm.volumes(self.group)
        found = next((volume for volume in listed if volume.name == name), None)
        if found is None:
            raise NotOurs(f"volume group {self.group.name} has no logical volume {name}", fix="`lvs` shows what there is.")
        if any(tag.startswith("landfall/") for tag in found.tags):
            raise VolumeExists(f"logical volume {name} is Landfall's already")
        if found.read_only:
            raise LayoutUnsupported(f"logical volume {name} is read-only", fix=f"lvchange --permission rw {self.group.name}/{name}")
        self._refuse_kind(found, listed)
        device = mapper.by_identity(lvm.dm_uuid(self.group, found.uuid))
        if device is not None and mapper.open_count(device):
            raise DeviceBusy(f"logical volume {name} is mounted or open", fix="Unmount it, and end what uses it (lsof, dmsetup ls --tree).")
        return found

    def remove(self, volume: UUID) -> None:
        """Destroy a volume with all it has; DeviceBusy while any of it is in use. If we die here ``recover`` ends it."""
        with self._locked():
            held = self._held()
            record, empty = held.volume(volume), held.record_of(volume)
            for used in held.all_of(volume):
                mapper.refuse_in_use(used.uuid, f"volume {record.name}")
            failpoint("substrate.remove.before")
            lvm.retag(self.group, empty, drop=sorted(empty.tags), add=[tags.unfinished_tag(volume)])
            failpoint("substrate.remove.renamed")
            self._sweep()
        failpoint("substrate.remove.after")

    def refuse_growth(self, volume: UUID, size_bytes: int) -> None:
        """LayoutUnsupported for less than the volume has, or for part of an extent."""
        record = self._held().volume(volume)
        if size_bytes < record.size_bytes or size_bytes % self.group.extent_bytes:
            raise LayoutUnsupported(
                f"volume {record.name} cannot have {size_bytes} bytes",
                cause=f"it has {record.size_bytes}, in extents of {self.group.extent_bytes}",
                fix=f"Name more than it has, and a multiple of {self.group.extent_bytes}.",
            )

    def set_role(self, volume: UUID, role: Role, epoch: int) -> None:
        """Record the role and epoch in one commit."""
        with self._locked():
            held = self._held()
            record = held.volume(volume)
            was, now = tags.volume_tag(record), tags.volume_tag(replace(record, role=role, epoch=epoch))
            if was != now:
                lvm.retag(self.group, held.record_of(volume), drop=[was], add=[now])

    # --- generations ---

    def generations(self, volume: UUID) -> tuple[GenerationFacts, ...]:
        """Return the generations, oldest first, g0 included."""
        return self._held().generations_of(volume)

    def take(self, volume: UUID, mount_point: Path | None, facts: GenerationFacts) -> float:
        """Take one generation."""
        return self.take_together((Take(volume, mount_point, facts),))

    def take_together(self, takes: Sequence[Take]) -> float:
        """Make the state of operational volumes at one moment generations; return the freeze in milliseconds.

        A volume without a mount point must not be in use (DeviceBusy). NotOurs if something else is mounted there. If we die here the
        guards thaw, and a snapshot that is unfinished is swept.
        """
        with self._locked(), self._swept_on_failure():
            held = self._held()
            operational = [held.operational_of(take.volume) for take in takes]
            for take, volume in zip(takes, operational, strict=True):
                held.refuse_taken(take.facts)
                self._need_room(f"generation {take.facts.id.name}")
                if take.mount_point is None:
                    mapper.refuse_in_use(volume.uuid, "the operational volume")
                else:
                    _refuse_other_mount(take.mount_point, volume)
                    sync_mounted(take.mount_point)
            mounted = [take.mount_point for take in takes if take.mount_point is not None]
            if mounted:
                failpoint("substrate.take.before_freeze")
            with frozen(*mounted) as freeze:
                if mounted:
                    failpoint("substrate.take.frozen")
                unfinished = [tags.unfinished_tag(take.volume) for take in takes]
                names = [self._snapshot(volume, [tag], writable=False) for volume, tag in zip(operational, unfinished, strict=True)]
            for take, name, tag in zip(takes, names, unfinished, strict=True):
                failpoint("substrate.take.before_record")
                taken = self._unfinished(name)
                failpoint("substrate.take.before_rename")
                lvm.retag(self.group, taken, drop=[tag], add=[tags.generation_tag(take.facts)])
        failpoint("substrate.take.after")
        return freeze.milliseconds

    def drop(self, generation: GenerationId) -> None:
        """Give up a generation; NoSuchGeneration if it is not held, DeviceBusy while it is read, RequestRefused for g0."""
        with self._locked():
            held = self._held()
            volume = held.generation(generation)
            if generation == empty_generation(generation.volume):
                raise RequestRefused("g0 is the beginning of every volume and takes no room; it is not dropped")
            mapper.refuse_in_use(volume.uuid, f"generation {generation.name}")
            failpoint("substrate.drop.before")
            self._give_up(held, generation)
            failpoint("substrate.drop.half")
            self._sweep()
            self._after_change(generation.volume)
        failpoint("substrate.drop.after")

    def _give_up(self, held: Held, generation: GenerationId) -> None:
        """Make what holds a generation mean nothing, in one commit."""
        volume = held.generation(generation)
        lvm.retag(self.group, volume, drop=sorted(volume.tags), add=[tags.unfinished_tag(generation.volume)])

    def reading(self, generation: GenerationId) -> AbstractContextManager[Path]:
        """Attach a generation read-only for as long as the context lasts, or a mount of it."""
        held = self._held()
        return self._attached(held.generation(generation), generation.volume, f"generation {generation.name}", writable=False)

    def refuse_written(self, generation: GenerationId) -> None:
        """BaseMismatch if a generation may have been written to: LVM no longer keeps it read-only.

        A write that went around LVM's permission is not seen here; the digests of pieces and files see it.
        """
        volume = self._held().generation(generation)
        if not volume.read_only:
            raise BaseMismatch(
                f"somebody made generation {generation.name} writable",
                cause=f"logical volume {volume.name} ({volume.uuid})",
                fix="Drop it here and replicate from an older generation that both nodes hold, or in full.",
            )

    # --- the operational volume ---

    def operational(self, volume: UUID) -> AbstractContextManager[Path]:
        """Attach the operational volume read-write, exclusively, for as long as the context lasts, or a mount of it. DeviceBusy."""
        return self._attached(self._held().operational_of(volume), volume, "the operational volume", writable=True)

    # --- workspaces ---

    def begin(self, workspace: Workspace, base: GenerationId, room_bytes: int | None = None) -> None:
        """Make a snapshot of ``base`` a workspace, replacing one of the same name (DeviceBusy if that is in use).

        NoSpace leaves everything as it was. If we die here the old one stands, or the new one.
        """
        if base.volume != workspace.volume:
            raise BaseMismatch(f"{base.name} is of another volume")
        with self._locked(), self._swept_on_failure():
            held = self._held()
            held.generation(base)
            old = held.workspaces.get(workspace)
            if old is not None:
                mapper.refuse_in_use(old.uuid, f"the {workspace.kind} volume")
            self._need_room(f"a clone of generation {base.name}")
            failpoint("substrate.begin.before")
            self._clone(workspace, base, room_bytes)
            failpoint("substrate.begin.after")
            self._sweep()

    def branch(self, workspace: Workspace, source: Workspace) -> None:
        """Make a snapshot of one workspace another one, replacing one of that name (DeviceBusy if that, or ``source``, is in use).

        NoSpace leaves everything as it was; RequestRefused where a snapshot of a snapshot would be a copy. If we die here the old one
        stands, or the new one.
        """
        if not self.branches:
            raise RequestRefused(f"{self.kind} makes no snapshot of a {source.kind} volume")
        with self._locked(), self._swept_on_failure():
            held = self._held()
            mapper.refuse_in_use(held.workspace(source).uuid, f"the {source.kind} volume")
            old = held.workspaces.get(workspace)
            if old is not None:
                mapper.refuse_in_use(old.uuid, f"the {workspace.kind} volume")
            self._need_room(f"a clone of the {source.kind} volume")
            failpoint("substrate.begin.before")
            failpoint("substrate.begin.before_rename")
            self._snapshot(
                held.workspace(source), [tags.workspace_tag(workspace), *([tags.instead_of_tag(old.uuid)] if old else [])], writable=True
            )
            failpoint("substrate.begin.after")
            self._sweep()

    def exists(self, workspace: Workspace) -> bool:
        """Whether the workspace is there, whole."""
        return workspace in self._held().workspaces

    def workspaces(self, volume: UUID) -> tuple[Workspace, ...]:
        """Return every workspace of a volume."""
        held = self._held()
        held.volume(volume)
        return tuple(sorted((found for found in held.workspaces if found.volume == volume), key=lambda found: (found.transfer, found.kind)))

    def writing(self, workspace: Workspace) -> AbstractContextManager[Path]:
        """Attach a workspace read-write, exclusively; DeviceBusy if somebody else has it, NoSuchTransfer if it is not there."""
        return self._attached(self._held().workspace(workspace), workspace.volume, f"the {workspace.kind} volume", writable=True)

    def commit(self, workspace: Workspace, facts: GenerationFacts) -> None:
        """Make the workspace a generation by one change of tags. DeviceBusy while it is attached or mounted."""
        with self._locked():
            held = self._held()
            volume = held.workspace(workspace)
            if facts.id.volume != workspace.volume:
                raise BaseMismatch(f"{facts.id.name} is of another volume")
            held.refuse_taken(facts)
            self._settle(volume, workspace)
            failpoint("substrate.commit.before_rename")
            lvm.retag(self.group, volume, drop=sorted(volume.tags), add=[tags.generation_tag(facts)], writable=False)
            failpoint("substrate.commit.after_rename")
            self._after_change(workspace.volume)

    def replace(self, workspace: Workspace, generation: GenerationId) -> None:
        """Let a healed workspace take the place of ``generation`` by one change of tags. DeviceBusy while the workspace is attached.

        Who reads the old one meanwhile goes on reading it; it is removed then or at the next start.
        """
        with self._locked():
            held = self._held()
            volume = held.workspace(workspace)
            if generation.volume != workspace.volume:
                raise BaseMismatch(f"{generation.name} is of another volume")
            old = held.generation(generation)
            self._settle(volume, workspace)
            failpoint("substrate.replace.before")
            # An origin is never displaced: what is a generation in its own right goes before what an origin holds.
            displacing = [] if old in held.origins.values() else [tags.instead_of_tag(old.uuid)]
            taking = [tags.generation_tag(held.facts[generation]), *displacing]
            lvm.retag(self.group, volume, drop=sorted(volume.tags), add=taking, writable=False)
            failpoint("substrate.replace.after")
            self._sweep()
            self._after_change(generation.volume)

    def discard(self, workspace: Workspace) -> None:
        """Remove a workspace if it is there; DeviceBusy while it is in use."""
        with self._locked():
            volume = self._held().workspaces.get(workspace)
            if volume is None:
                return
            mapper.refuse_in_use(volume.uuid, f"the {workspace.kind} volume")
            failpoint("substrate.discard.before")
            lvm.remove(self.group, volume)
        failpoint("substrate.discard.after")

    # --- steps ---

    def _held(self) -> Held:
        """Return what every logical volume is, as read since the last commit to the group."""
        stamp, known = lvm.stamp(self.group), self._known
        if stamp is not None and known is not None and known[0] == stamp:
            return known[1]
        held = self._read()
        self._known = None if stamp is None else (stamp, held)  # a commit since the stamp makes another one, so it is read again
        return held

    @contextmanager
    def _attached(self, volume: LogicalVolume, of: UUID, what: str, *, writable: bool) -> Iterator[Path]:
        with self._locked():
            mapper.refuse_in_use(volume.uuid, what, writers_only=not writable)
            attached = self._device(volume, self._held().volume(of), writable=writable)
            device = attached.__enter__()
        try:
            yield device
        finally:
            attached.__exit__(None, None, None)

    def _settle(self, volume: LogicalVolume, workspace: Workspace) -> None:
        """Refuse a workspace in use, and make what was written to it durable."""
        mapper.refuse_in_use(volume.uuid, f"the {workspace.kind} volume")
        with self._device(volume, self._held().volume(workspace.volume), writable=True) as device:
            device_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(device_fd)
            except OSError as error:
                raise DeviceFailed(f"the {workspace.kind} volume cannot be made durable", cause=f"{device}: {error}") from error
            finally:
                os.close(device_fd)

    def _unfinished(self, name: str) -> LogicalVolume:
        """Return what was made just now and has no meaning yet."""
        return next(found for found in self._held().meaningless if found.name == name)

    def _sweep(self) -> None:
        """Remove what has no meaning and is not in use, snapshots before their origins; the rest goes at the next sweep."""
        needed = set[str]()
        for left in sorted(self._held().meaningless, key=lambda found: not found.origin):
            if left.uuid in needed or mapper.in_use(left.uuid):
                needed.add(left.origin)
            else:
                lvm.remove(self.group, left)

    @contextmanager
    def _swept_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(LandfallError):  # what stays is swept at the next start
                self._sweep()
            raise

    def _thaw(self) -> None:
        """Thaw every mount of an operational volume that a dead freezer left frozen."""
        for operational in self._held().operational.values():
            for mount in mounts():
                if mapper.is_device_of(mount.device, operational.uuid):
                    thaw_if_frozen(mount.mount_point)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock_fd = os.open(_LOCKS / f"landfall-{self.group.uuid}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            # Whoever of ours changes the group has this lock, so what stays suspended is what a killed program of LVM's left.
            mapper.resume_left(lvm.dm_uuid(self.group))
            yield
        finally:
            os.close(lock_fd)


def new_name() -> str:
    """Return a name for a logical volume that none has or had."""
    return f"landfall-{secrets.token_hex(16)}"


def g0_tags(record: VolumeRecord) -> list[str]:
    """Return the tags that make a logical volume of zeros a volume's g0, and thereby the volume."""
    return [tags.volume_tag(record), tags.generation_tag(GenerationFacts(empty_generation(record.id), GenerationKind.EMPTY, 0))]


def refuse_sectors(record: VolumeRecord, below: Path) -> None:
    """LayoutUnsupported for a volume with other sectors than the device below it: LVM's volumes have those of their disks."""
    there = sector_bytes_of(below)
    if record.sector_bytes != there:
        raise LayoutUnsupported(
            f"sectors of {record.sector_bytes} bytes in a volume group on disks with sectors of {there}",
            fix="Put the volume group on disks with the sectors that the volume has.",
        )


def sector_bytes_of(device: Path) -> int:
    """Return the bytes of a block device's sectors."""
    device_fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return blockdev.logical_sector_bytes(device_fd)
    finally:
        os.close(device_fd)


def _refuse_other_mount(mount_point: Path, operational: LogicalVolume) -> None:
    """Refuse to freeze a filesystem that is not on our operational volume."""
    mount = mount_on(mount_point)
    if mount is None or not mapper.is_device_of(mount.device, operational.uuid):
        raise NotOurs(
            f"{mount_point} is not a mount of the operational volume", cause=f"mounted there: {mount.source if mount else 'nothing'}"
        )
