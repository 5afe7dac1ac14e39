"""The `lvm-snapshot` substrate: LVM's classic snapshots. A generation's COW device is the differential volume, with real addresses.

A volume is one plain logical volume, its origin, and snapshots of it. On a primary the origin is the operational volume and every
generation is a snapshot: before a block of the origin is overwritten the kernel copies it into the COW device of each generation that
lacks it. So a generation's table (cow_table.py) names everything that changed since it, and where its pre-image lies, whatever came in
between. On a secondary the origin holds the newest generation, and the older ones are snapshots. g0 is a logical volume of zeros.

    landing       a writable snapshot of the origin
    commit        one change of tags makes that snapshot the generation. It is then merged into the origin: gN, which the origin holds,
                  gets a snapshot of its own, made for as much as is to be merged; the origin is journalled as becoming gN+1;
                  `lvconvert --merge`. Each step is a commit of LVM's and is redone by ``recover``; what reads gN or gN+1 meanwhile
                  only makes the merge wait for the next change or start. At no moment has a generation two meanings: the snapshot
                  that is one goes before what the origin holds, and one that LVM is merging is none any more
    undo          dropping the newest generation leaves the origin without meaning; the one before is merged back
    serve         the newest generation gets a snapshot, and the origin becomes the operational volume
    grow          while nobody uses any of it: LVM makes no origin larger that the kernel has, and a snapshot never. So the origin is
                  journalled as having its snapshots; each becomes a volume of its own; the origin gets extents, and zeros in them; each
                  becomes a snapshot again, as large as the origin now. ``recover`` makes them snapshots again, whatever the size

Why so, and what it costs. LVM has no snapshot of a snapshot, and one could not have the pre-images of several steps on one device.
So all are snapshots of the one moving origin: the first write to a block since G generations were taken costs up to G copies (and a
merge as many), each generation needs room for everything that changed since it, and a clone of what the origin does not hold is made by
copying what differs. Keep few generations, or use lvm-thin. In return the origin is a plain volume that any LVM reads, no pool can fill
up under it, and the published method's differential volume is here literally.

A snapshot that runs out of room, or cannot be written, is given up by the kernel, the origin going on: whatever was read from it is
void. So its status is looked at before it is given to anybody and again when they are done (GenerationInvalid), and before a commit. A
merge overflows none: every snapshot of the origin is first extended by what may come, or the merge waits. A workspace has the room it
was begun with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final
from uuid import UUID

import numpy as np

from agent.blockio.device import Device
from agent.contract.dmi import HOLE
from agent.contract.errors import (
    BaseMismatch,
    CommandFailed,
    DeviceBusy,
    DeviceFailed,
    GenerationInvalid,
    LayoutUnsupported,
    NoSpace,
    NotOurs,
)
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind, empty_generation
from agent.contract.messages import GenerationFacts, Role
from agent.contract.messages import newest as newest_of
from agent.system.clock import wait_until
from agent.system.failpoint import failpoint
from agent.volume import chunks, lvm, lvm_held, mapper
from agent.volume import lvm_tags as tags
from agent.volume.chunks import ChunkRuns
from agent.volume.cow_table import CowTable, cow_bytes, read_table, runs_of
from agent.volume.lvm import LogicalVolume
from agent.volume.lvm_held import Held
from agent.volume.lvm_substrate import HIDDEN, LvmSubstrate, g0_tags, new_name, refuse_sectors
from agent.volume.substrate import ChangedRuns, Take, VolumeRecord, Workspace

CHUNK_BYTES: Final = 4096
"""A block: so a COW device is exactly as large as what may change, and nothing beside a changed block is copied."""

_SLACK_BYTES: Final = 4 << 20
_COPY_BLOCKS: Final = 256
_MERGE_LIMIT_S: Final = 24 * 3600.0
_ZERO_KIND: Final = "zero"
_PLAIN_KINDS: Final = frozenset({"linear", "striped"})
WAITING_TAG: Final = "landfall-adopt"
"""What an administrator gives a logical volume that is to be adopted: with it the group may hold it until then."""

_log = logging.getLogger(__name__)


class LvmSnapshotSubstrate(LvmSubstrate):
    """Keeps the contract of ``substrate.Substrate`` with classic snapshots."""

    kind = "lvm-snapshot"
    branches = False  # a snapshot of a snapshot is a copy

    def __init__(self, group: str, *, snapshot_percent: float = 25.0) -> None:
        """Open a volume group; NotOurs if it does not carry our tag or holds what is none of ours. ``recover`` comes before anything else.

        A generation of a volume that is served gets room for that share of the volume to change.
        """
        super().__init__(group)
        self.snapshot_percent = snapshot_percent
        strangers = [found.name for found in lvm.volumes(self.group) if not _is_ours(found) and WAITING_TAG not in found.tags]
        if strangers:
            raise NotOurs(
                f"volume group {group} holds volumes that lvm-snapshot did not make",
                cause=", ".join(sorted(strangers)[:5]),
                fix="Give Landfall a group of its own, and each substrate its own; "
                f"what is to become a volume by `landfall volume adopt` waits with the tag {WAITING_TAG}.",
            )

    def differential_identity(self, base: GenerationId) -> str:
        """UUID of the logical volume whose COW device has the base's pre-images."""
        return self._held().generation(base).uuid

    @contextmanager
    def differential(self, base: GenerationId) -> Iterator[Path]:
        """Give the base's COW device, read-only; the origin itself if that holds the base; zeros for g0."""
        held = self._held()
        volume, record = held.generation(base), held.volume(base.volume)
        if not volume.origin:
            with self._attached(volume, base.volume, f"generation {base.name}", writable=False) as device:
                yield device
            return
        self._active(volume, record)
        cow = self._existing(volume, "cow")
        with mapper.device_over(mapper.linear(cow), volume.size_bytes, volume.uuid, writable=False) as device:
            yield device
        self._refuse_invalid(volume, record)

    def free_bytes(self, workspace: Workspace | None = None) -> int:
        """Return how much can still be written into a workspace; without one, into new ones."""
        if workspace is None:
            return lvm.free_bytes(self.group)
        held = self._held()
        volume, record = held.workspace(workspace), held.volume(workspace.volume)
        status = mapper.snapshot_status(self._active(volume, record))
        left = max(0, (status.total_bytes - status.used_bytes) // CHUNK_BYTES - 2)
        return record.size_bytes if self._is_full_size(volume, record) else (left - left // 256) * CHUNK_BYTES

    def exists(self, workspace: Workspace) -> bool:
        """Whether the workspace is there, whole: one that the kernel gave up is not."""
        held = self._held()
        if workspace not in held.workspaces:
            return False
        return mapper.snapshot_status(self._active(held.workspaces[workspace], held.volume(workspace.volume))).valid

    def changed(self, base: GenerationId, target: GenerationId) -> ChangedRuns:
        """Return the runs that differ, with the pre-images' addresses on ``differential(base)``. BaseMismatch for two volumes.

        The addresses hold for as long as the base is held. Blocks of zeros are holes. GenerationInvalid if a snapshot was given up
        before the last block of it was read.
        """
        if base.volume != target.volume:
            raise BaseMismatch(f"{base.name} and {target.name} are of different volumes")
        held = self._held()
        record, before, after = held.volume(base.volume), held.generation(base), held.generation(target)
        with self.reading(base) as old, self.reading(target) as new:
            if before.kind == _ZERO_KIND:
                return chunks.refined(_everything(record), 1, old, new)
            if not before.origin:
                table = self._table(after, record)
                return chunks.refined(runs_of(replace(table, new=table.old)), table.chunk_blocks, old, new)
            table = self._table(before, record)
            if after.origin:
                self._refuse_elsewhere(table, self._table(after, record), old, new)
            return chunks.refined(runs_of(table), table.chunk_blocks, old, new)

    def refuse_growth(self, volume: UUID, size_bytes: int) -> None:
        """LayoutUnsupported as on lvm-thin, DeviceBusy while any of the volume is in use or being merged, NoSpace."""
        super().refuse_growth(volume, size_bytes)
        held = self._held()
        record, origin = held.volume(volume), held.origins.get(volume) or held.operational_of(volume)
        if size_bytes == record.size_bytes:
            return
        for used in (origin, *self._snapshots_of(origin)):
            if mapper.in_use(used.uuid):
                raise DeviceBusy(
                    f"volume {record.name} is mounted, or a generation of it is read, and on {self.kind} it grows only while it is not",
                    cause=f"logical volume {self.group.name}/{used.name}",
                    fix=f"`landfall unserve {record.name}`, `landfall volume grow` again, `landfall serve {record.name}`.",
                )
        if origin.merging or tags.read_becoming(origin.tags) or tags.detached(origin.tags):
            raise DeviceBusy(
                f"the last change of volume {record.name} is not ended: a commit is being merged, or it is being made larger",
                fix="Ask again when it is (`lvs -a` shows how far a merge is); if nothing goes on, start the agent anew.",
            )
        missing, free = size_bytes - origin.size_bytes, lvm.free_bytes(self.group)
        if missing > free:
            raise self._no_space(f"volume {record.name} of {size_bytes} bytes", missing, free)

    def grow(self, volume: UUID, size_bytes: int) -> None:
        """Let a volume that nobody uses be larger, by zeros at its end. What ``refuse_growth`` raises, before anything is changed.

        The tag on g0 goes last: until then no device of ours reaches what was added, so if we die before it, asked again, all of it is
        done again. Older generations then get room for what the filesystem writes when it grows.
        """
        with self._locked():
            self._after_change(volume)
            self.refuse_growth(volume, size_bytes)
            record = self._held().volume(volume)
            if size_bytes == record.size_bytes:
                return
            self._sweep()
            failpoint("substrate.grow.before")
            try:
                self._lengthen(record, size_bytes)
            finally:
                self._rejoin(volume)
            failpoint("substrate.grow.half")
            held = self._held()
            empty = held.record_of(volume)
            if empty.size_bytes < size_bytes:
                lvm.extend(self.group, empty, size_bytes)
            was, now = tags.volume_tag(record), tags.volume_tag(replace(record, size_bytes=size_bytes))
            lvm.retag(self.group, empty, drop=[was], add=[now])
            if volume in held.operational:
                self._widen(volume)
        failpoint("substrate.grow.after")

    def take_together(self, takes: Sequence[Take]) -> float:
        """Make the state of operational volumes at one moment generations; return the freeze in milliseconds.

        Older generations get room for what may change until the next one, as far as there is any.
        """
        milliseconds = super().take_together(takes)
        with self._locked():
            for take in takes:
                self._widen(take.volume)
        return milliseconds

    def refuse_written(self, generation: GenerationId) -> None:
        """BaseMismatch if a generation may have been written to, GenerationInvalid if its snapshot was given up."""
        super().refuse_written(generation)
        held = self._held()
        self._refuse_invalid(held.generation(generation), held.volume(generation.volume))

    def clone_operational(self, volume: UUID, generation: GenerationId) -> None:
        """Make the origin the operational volume with the content of ``generation``; DeviceBusy if it is in use.

        Where the origin holds it already that is one change of tags. Otherwise the origin is journalled as becoming it and what differs
        is copied; if we die then ``recover`` ends it.
        """
        if generation.volume != volume:
            raise BaseMismatch(f"{generation.name} is of another volume")
        with self._locked(), self._swept_on_failure():
            held = self._held()
            record, source = held.volume(volume), held.generation(generation)
            mapper.refuse_in_use(held.origins[volume].uuid, "the operational volume")
            failpoint("substrate.operational.before")
            self._keep(volume, None)
            origin, held_already = self._held().origins[volume], source.uuid == held.origins[volume].uuid
            becoming = tags.operational_tag(volume) if held_already else tags.becoming_tag(source.uuid)
            if not held_already:
                self._make_way(record, self._bytes_apart(source, record), but=source.uuid)
            failpoint("substrate.operational.before_rename")
            lvm.retag(self.group, origin, drop=_content_tags(origin), add=[becoming], writable=True)
            failpoint("substrate.operational.journalled")
            self._become(volume)
            self._widen(volume)
            failpoint("substrate.operational.after")

    def recover(self) -> None:
        """Thaw what is frozen of ours, let go of devices, end what is journalled, sweep what has no meaning. Idempotent."""
        with self._locked():
            self._thaw()
            mapper.remove_unused()
            for volume in self._held().origins:
                self._after_change(volume)
            failpoint("substrate.recover.before_sweep")
            self._sweep()

    # --- what it is made of ---

    def _read(self) -> Held:
        """Read what every logical volume is. One that LVM is merging is nothing any more; one that is no snapshot yet, nothing yet.

        One that is no snapshot while its origin is being made larger is what it was, and not to be read.
        """
        found = [volume for volume in lvm.volumes(self.group) if _is_ours(volume)]
        detached = frozenset[str]().union(*(tags.detached(volume.tags) for volume in found))
        plain = [volume for volume in found if not volume.origin and volume.kind != _ZERO_KIND and volume.uuid not in detached]
        half = tuple(volume for volume in plain if not any(tag.startswith("landfall/origin/") for tag in volume.tags))
        alive = [volume for volume in found if volume not in half and not (volume.merging and volume.origin)]
        held = lvm_held.read(alive, self.group.name)
        there = {volume.uuid for volume in alive}
        for origin in held.origins.values():
            facts = tags.read_generation(origin.tags)
            if facts is not None and facts.id not in held.generations and tags.read_becoming(origin.tags) not in there:
                held.facts[facts.id], held.generations[facts.id] = facts, origin
        return replace(held, meaningless=held.meaningless + half)

    def _need_room(self, what: str) -> None:
        """Nothing: whatever makes something knows how much room it needs, and asks before it does."""

    def _make(self, record: VolumeRecord) -> None:
        """Make the origin, zeroed throughout: what its disks held before is nobody's to read."""
        if self.group.disk is not None:
            refuse_sectors(record, self.group.disk)
        free = lvm.free_bytes(self.group)
        if free < record.size_bytes:
            raise self._no_space(f"volume {record.name}", record.size_bytes, free)
        name, unfinished = new_name(), tags.unfinished_tag(record.id)
        shape = ["--size", f"{record.size_bytes}b", "--zero", "n", "--wipesignatures", "n", "--setactivationskip", "y"]
        lvm.create(self.group, [*shape, self.group.name], name, [unfinished])
        origin = self._unfinished(name)
        lvm.activate(self.group, origin)
        target = mapper.linear(self._existing(origin))
        with mapper.device_over(target, record.size_bytes, origin.uuid, writable=True) as path, Device.open_writing(path) as device:
            device.write_zeros(0, device.size_blocks)
            device.sync()
        empty = GenerationFacts(empty_generation(record.id), GenerationKind.EMPTY, 0)
        is_primary = record.role is Role.PRIMARY
        content = tags.operational_tag(record.id) if is_primary else tags.generation_tag(empty)
        lvm.retag(self.group, origin, drop=[unfinished], add=[tags.origin_tag(record.id), content], writable=is_primary)
        failpoint("substrate.create.before_rename")
        self._make_empty(record)

    def _make_empty(self, record: VolumeRecord) -> None:
        zeros = ["--type", _ZERO_KIND, "--size", f"{record.size_bytes}b", "--permission", "r", *HIDDEN]
        lvm.create(self.group, [*zeros, self.group.name], new_name(), g0_tags(record))

    def _refuse_kind(self, found: LogicalVolume, listed: tuple[LogicalVolume, ...]) -> None:
        if found.kind not in _PLAIN_KINDS or found.origin or any(other.origin == found.uuid for other in listed):
            raise LayoutUnsupported(
                f"logical volume {found.name} is no plain one without snapshots",
                cause=f"it is {found.kind}{', a snapshot or the origin of one' if found.kind in _PLAIN_KINDS else ''}",
                fix="Only a linear or striped volume without snapshots can be adopted; remove its snapshots, or copy it.",
            )

    @contextmanager
    def _foreign_device(self, found: LogicalVolume) -> Iterator[Path]:
        was_active = mapper.by_identity(lvm.dm_uuid(self.group, found.uuid)) is not None
        if not was_active:
            lvm.activate(self.group, found)
        try:
            with mapper.device_over(mapper.linear(self._existing(found)), found.size_bytes, found.uuid, writable=False) as device:
                yield device
        finally:
            if not was_active and not mapper.in_use(found.uuid):
                lvm.deactivate(self.group, found)

    def _take_in(self, found: LogicalVolume, record: VolumeRecord) -> None:
        if self.group.disk is not None:
            refuse_sectors(record, self.group.disk)
        mapper.refuse_in_use(found.uuid, f"logical volume {found.name}")
        lvm.change(self.group, found.name, "--setactivationskip", "y")
        lvm.retag(
            self.group, found, drop=sorted(found.tags & {WAITING_TAG}), add=[tags.origin_tag(record.id), tags.operational_tag(record.id)]
        )

    def _snapshot(self, origin: LogicalVolume, tagged: list[str], *, writable: bool, room_bytes: int | None = None) -> str:
        """Make a snapshot; without a room a generation gets the share that is configured, a workspace as much as it can use.

        NoSpace before anything is made.
        """
        _refuse_detached(origin)
        free, most = lvm.free_bytes(self.group), cow_bytes(origin.size_bytes, CHUNK_BYTES)
        if room_bytes is not None:
            size = min(most, cow_bytes(room_bytes, CHUNK_BYTES) + _SLACK_BYTES)
        elif writable:
            size = min(most, max(_SLACK_BYTES, free // 2))
        else:
            size = min(most, cow_bytes(int(origin.size_bytes * self.snapshot_percent / 100), CHUNK_BYTES) + _SLACK_BYTES)
        size = -(-size // self.group.extent_bytes) * self.group.extent_bytes
        if size > free:
            raise self._no_space("a snapshot", size, free)
        name, permission = new_name(), "rw" if writable else "r"
        shape = ["--snapshot", "--permission", permission, "--size", f"{size}b", "--chunksize", f"{CHUNK_BYTES}b"]
        lvm.create(self.group, [*shape, f"{self.group.name}/{origin.name}"], name, tagged)
        return name

    @contextmanager
    def _device(self, volume: LogicalVolume, record: VolumeRecord, *, writable: bool) -> Iterator[Path]:
        if volume.kind == _ZERO_KIND:
            with mapper.device_over(mapper.ZERO, record.size_bytes, volume.uuid, writable=False) as device:
                yield device
            return
        below = self._active(volume, record)
        self._refuse_invalid(volume, record)
        with mapper.device_over(mapper.linear(below), record.size_bytes, volume.uuid, writable=writable) as device:
            yield device
        self._refuse_invalid(volume, record)

    def _clone(self, workspace: Workspace, base: GenerationId, room_bytes: int | None) -> None:
        self._after_change(base.volume)  # a merge that had to wait may make this a plain snapshot of the origin
        held = self._held()
        origin, source, record = held.origins[base.volume], held.generation(base), held.volume(base.volume)
        self._activate(base.volume)
        old = held.workspaces.get(workspace)
        tagged = [tags.workspace_tag(workspace), *([tags.instead_of_tag(old.uuid)] if old else [])]
        holds = tags.read_generation(origin.tags)
        if source.uuid == origin.uuid or (holds is not None and holds.id == base and not tags.read_becoming(origin.tags)):
            failpoint("substrate.begin.before_rename")
            self._snapshot(origin, tagged, writable=True, room_bytes=room_bytes)
            return
        unfinished = tags.unfinished_tag(base.volume)
        room_bytes = room_bytes if room_bytes is None else room_bytes + self._bytes_apart(source, record)
        made = self._unfinished(self._snapshot(origin, [unfinished], writable=True, room_bytes=room_bytes))
        self._copy(source, made, record)
        failpoint("substrate.begin.before_rename")
        lvm.retag(self.group, made, drop=[unfinished], add=tagged)

    def _give_up(self, held: Held, generation: GenerationId) -> None:
        volume, origin = held.generation(generation), held.origins[generation.volume]
        holds, becoming = tags.read_generation(origin.tags), tags.read_becoming(origin.tags)
        if becoming == volume.uuid and holds is None:
            raise DeviceBusy(f"the operational volume is being made from generation {generation.name}")
        if holds is not None and holds.id == generation:
            lvm.retag(self.group, origin, drop=_content_tags(origin), writable=False)
        if volume.uuid != origin.uuid:
            super()._give_up(held, generation)

    # --- the origin ---

    def _after_change(self, volume: UUID) -> None:
        """End what is journalled, and merge the newest generation into an origin that serves nobody; what is in the way makes it wait."""
        try:
            self._rejoin(volume)
            self._become(volume)
            self._merge_newest(volume)
        except (NoSpace, DeviceBusy, DeviceFailed, CommandFailed, GenerationInvalid) as error:
            _log.warning("volume %s: what its origin is to hold is not where it belongs yet, and waits: %s", volume, error)

    def _merge_newest(self, volume: UUID) -> None:
        """Let the origin hold the newest generation. If we die here every generation is what it was, and ``recover`` goes on.

        The origin is read-only for LVM too, but while it is journalled as becoming what a snapshot holds.
        """
        held = self._held()
        if volume not in held.volumes or volume in held.operational or held.unreadable:
            return
        self._activate(volume)
        origin, record = self._held().origins[volume], held.volume(volume)
        newest = newest_of(held.generations_of(volume))
        source, becoming = held.generation(newest.id), tags.read_becoming(origin.tags)
        if source.origin:
            for used, what in ((origin, "the origin"), (source, f"generation {newest.id.name}")):
                mapper.refuse_in_use(used.uuid, what)
            status = self._refuse_invalid(source, record)
            if becoming != source.uuid:
                self._make_way(record, status.used_bytes, but=source.uuid)
                self._keep(volume, status.used_bytes)
                failpoint("substrate.merge.kept")
                origin = self._held().origins[volume]
                journal = [tags.generation_tag(newest), tags.becoming_tag(source.uuid)]
                lvm.retag(self.group, origin, drop=_content_tags(origin), add=journal, writable=True)
            failpoint("substrate.merge.journalled")
            lvm.merge(self.group, source)
            failpoint("substrate.merge.merged")
            self._activate(volume)
        origin = self._held().origins[volume]
        if becoming := tags.read_becoming(origin.tags):
            lvm.retag(self.group, origin, drop=[tags.becoming_tag(becoming)], writable=False)
        failpoint("substrate.merge.after")

    def _keep(self, volume: UUID, room_bytes: int | None) -> None:
        """Give what the origin alone holds a snapshot of its own, so that the origin can change; None: the configured room."""
        held = self._held()
        origin, holds = held.origins[volume], tags.read_generation(held.origins[volume].tags)
        if holds is None or holds.kind is GenerationKind.EMPTY or held.generations.get(holds.id) != origin:
            return
        self._activate(volume)
        self._snapshot(origin, [tags.generation_tag(holds)], writable=False, room_bytes=room_bytes)

    def _widen(self, volume: UUID) -> None:
        """Let every snapshot of an operational volume have room for the configured share to change, as far as there is room."""
        record = self._held().volume(volume)
        try:
            self._make_way(record, int(record.size_bytes * self.snapshot_percent / 100))
        except (NoSpace, CommandFailed, DeviceFailed) as error:
            _log.warning("volume %s: its older generations get no more room: %s", record.name, error)

    def _make_way(self, record: VolumeRecord, coming_bytes: int, *, but: str = "") -> None:
        """Extend every snapshot of the origin so that as much may be written to the origin; NoSpace before any is."""
        held = self._held()
        most = cow_bytes(held.origins[record.id].size_bytes, CHUNK_BYTES)
        wanted: list[tuple[LogicalVolume, int]] = []
        for snapshot in (found for found in held.all_of(record.id) if found.origin and found.uuid != but):
            status = mapper.snapshot_status(self._active(snapshot, record))
            size = min(most, status.used_bytes + cow_bytes(coming_bytes, CHUNK_BYTES) + _SLACK_BYTES)
            if status.valid and size > status.total_bytes:
                wanted.append((snapshot, size))
        growth, free = sum(size - snapshot.size_bytes for snapshot, size in wanted), lvm.free_bytes(self.group)
        if growth + len(wanted) * self.group.extent_bytes > free:
            raise self._no_space("the generations that keep what is overwritten", growth, free)
        for snapshot, size in wanted:
            lvm.extend(self.group, snapshot, size)

    def _become(self, volume: UUID) -> None:
        """End what makes the origin the operational volume with a generation's content, if that was begun. Repeating it does no harm."""
        held = self._held()
        origin = held.origins.get(volume)
        becoming = tags.read_becoming(origin.tags) if origin else None
        if origin is None or becoming is None or tags.read_generation(origin.tags) is not None:
            return
        source = next(found for found in held.generations.values() if found.uuid == becoming)
        self._copy(source, origin, held.volume(volume))
        failpoint("substrate.operational.copied")
        lvm.retag(self.group, origin, drop=[tags.becoming_tag(becoming)], add=[tags.operational_tag(volume)])

    def _lengthen(self, record: VolumeRecord, size_bytes: int) -> None:
        """Give the origin extents, and zeros in them, while it has no snapshots; ``_rejoin`` gives it back what it had.

        Whatever the disks held there before would otherwise be copied into each snapshot when it is zeroed.
        """
        origin = self._held().origins[record.id]
        snapshots = self._snapshots_of(origin)
        lvm.retag(self.group, origin, add=[tags.detached_tag(found.uuid) for found in (origin, *snapshots)], writable=True)
        failpoint("substrate.grow.journalled")
        lvm.deactivate(self.group, origin)
        for snapshot in snapshots:
            lvm.detach(self.group, snapshot)
        failpoint("substrate.grow.detached")
        if origin.size_bytes < size_bytes:
            lvm.extend(self.group, origin, size_bytes)
        failpoint("substrate.grow.extended")
        lvm.activate(self.group, origin)
        target, first = mapper.linear(self._existing(origin)), record.size_bytes // BLOCK_BYTES
        with mapper.device_over(target, size_bytes, origin.uuid, writable=True) as path, Device.open_writing(path) as device:
            device.write_zeros(first, device.size_blocks - first)
            device.sync()

    def _rejoin(self, volume: UUID) -> None:
        """Make what an origin is journalled to have as snapshots its snapshots again. Repeating it does no harm.

        If we die here ``recover`` goes on: until the journal is empty nothing of the volume is given to anybody.
        """
        held = self._held()
        origin = held.origins.get(volume)
        journal = tags.detached(origin.tags) if origin else None
        if origin is None or not journal:
            return
        mapper.refuse_in_use(origin.uuid, "the origin")
        lvm.deactivate(self.group, origin)
        for found in lvm.volumes(self.group):
            if found.uuid in journal - {origin.uuid} and not found.origin:
                lvm.rejoin(self.group, origin, found, CHUNK_BYTES)
                failpoint("substrate.grow.rejoined")
        lvm.retag(self.group, origin, drop=[tags.detached_tag(found) for found in journal], writable=volume in held.operational)

    def _snapshots_of(self, origin: LogicalVolume) -> list[LogicalVolume]:
        """Return every snapshot that LVM knows of an origin, also those without a meaning."""
        return [found for found in lvm.volumes(self.group) if found.origin == origin.uuid]

    def _activate(self, volume: UUID) -> None:
        """Let the kernel have the origin with its snapshots, and wait for a merge that was begun. DeviceBusy if that cannot go on.

        Until the kernel merges, an origin that LVM calls merging reads as it did before: nobody may see it then. Nor while its snapshots
        are detached.
        """
        origin = self._held().origins[volume]
        _refuse_detached(origin)
        device = mapper.by_identity(lvm.dm_uuid(self.group, origin.uuid))
        if device is None:
            lvm.activate(self.group, origin)
        if not origin.merging:
            return
        if device is not None and mapper.target_of(device) != "snapshot-merge":
            mapper.refuse_in_use(origin.uuid, "the origin")
            lvm.deactivate(self.group, origin)
            lvm.activate(self.group, origin)
        lvm.poll(self.group, origin)
        if not wait_until(lambda: not self._held().origins[volume].merging, _MERGE_LIMIT_S, every_s=0.2):
            raise DeviceBusy(f"volume {volume} is being merged still")

    # --- steps ---

    def _table(self, volume: LogicalVolume, record: VolumeRecord) -> CowTable:
        self._active(volume, record)
        return read_table(self._existing(volume, "cow"), record.size_bytes)

    def _bytes_apart(self, source: LogicalVolume, record: VolumeRecord) -> int:
        """Return at most how many bytes a generation differs in from the origin."""
        if source.kind == _ZERO_KIND or not source.origin:
            return record.size_bytes
        return len(self._table(source, record).old) * CHUNK_BYTES

    def _copy(self, source: LogicalVolume, to: LogicalVolume, record: VolumeRecord) -> None:
        """Give ``to``, the origin or a snapshot made of it just now, the content of a generation, durably."""
        with ExitStack() as opened:
            before = opened.enter_context(Device.open_reading(opened.enter_context(self._device(source, record, writable=False))))
            after = opened.enter_context(Device.open_writing(opened.enter_context(self._device(to, record, writable=True))))
            if source.kind == _ZERO_KIND:
                runs, chunk_blocks = _everything(record), 1
            else:
                table = self._table(source, record)
                runs, chunk_blocks = runs_of(table), table.chunk_blocks
            for first, count in zip(runs.first.tolist(), runs.chunks.tolist(), strict=True):
                end = min((first + count) * chunk_blocks, after.size_blocks)
                for at in range(first * chunk_blocks, end, _COPY_BLOCKS):
                    content = before.read(at, min(_COPY_BLOCKS, end - at))
                    if content != after.read(at, min(_COPY_BLOCKS, end - at)):
                        after.write(at, content)
            after.sync()

    def _refuse_elsewhere(self, base: CowTable, target: CowTable, old: Path, new: Path) -> None:
        """LayoutUnsupported if the target differs where the base has no pre-image of its own: it was not taken after the base."""
        others = ~np.isin(target.old, base.old)
        only = CowTable(target.chunk_blocks, target.old[others], target.new[others])
        if len(chunks.refined(runs_of(only), only.chunk_blocks, old, new).first):
            raise LayoutUnsupported(
                "the target was not taken from the operational volume after the base, so the base has no pre-images of all that differs",
                fix="Name a later base.",
            )

    def _active(self, volume: LogicalVolume, record: VolumeRecord) -> Path:
        """Return LVM's device of the origin or a snapshot of it, activating them all if need be."""
        device = mapper.by_identity(lvm.dm_uuid(self.group, volume.uuid))
        origin = self._held().origins[record.id]
        if device is None or origin.merging or tags.detached(origin.tags):
            self._activate(record.id)
        return self._existing(volume)

    def _existing(self, volume: LogicalVolume, layer: str = "") -> Path:
        device = mapper.by_identity(lvm.dm_uuid(self.group, volume.uuid, layer))
        if device is None:
            raise DeviceFailed(f"logical volume {volume.name} is not active", cause=volume.uuid, fix="Look at dmesg and `lvs -a`.")
        return device

    def _refuse_invalid(self, volume: LogicalVolume, record: VolumeRecord) -> mapper.SnapshotStatus:
        """Return the status of a snapshot that holds; GenerationInvalid. Whatever is no snapshot holds always."""
        if not volume.origin:
            return mapper.SnapshotStatus(True, 0, 0)
        status = mapper.snapshot_status(self._active(volume, record))
        if not status.valid:
            facts, workspace = tags.read_generation(volume.tags), tags.read_workspace(volume.tags)
            what = f"generation {facts.id.name}" if facts else f"the {workspace.kind} volume" if workspace else "a snapshot"
            raise GenerationInvalid(
                f"the kernel gave up {what} of volume {record.name}",
                cause=f"the COW device of logical volume {volume.name} ran out of room (it had {volume.size_bytes >> 20} MiB) "
                "or could not be written",
            )
        return status

    def _is_full_size(self, volume: LogicalVolume, record: VolumeRecord) -> bool:
        return volume.size_bytes >= cow_bytes(record.size_bytes, CHUNK_BYTES)

    def _no_space(self, what: str, needed: int, free: int) -> NoSpace:
        return NoSpace(
            f"no room in volume group {self.group.name} for {what}",
            cause=f"{-(-needed >> 20)} MiB are needed, {free >> 20} MiB are free",
            fix="Extend the volume group (vgextend), or drop generations or a partial transfer.",
        )


def _is_ours(volume: LogicalVolume) -> bool:
    return any(tag.startswith("landfall/") for tag in volume.tags) and volume.kind != "thin-pool"


def _refuse_detached(origin: LogicalVolume) -> None:
    """DeviceBusy while an origin has snapshots that LVM does not know: they would miss what is written to it."""
    if tags.detached(origin.tags):
        raise DeviceBusy("the volume is being made larger", cause=origin.name, fix="If that was cut short: start the agent anew.")


def _content_tags(origin: LogicalVolume) -> list[str]:
    """Return the tags that say what an origin's content is, or is to be."""
    kept = ("landfall/origin/", "landfall/detached/")
    return sorted(tag for tag in origin.tags if tag.startswith("landfall/") and not tag.startswith(kept))


def _everything(record: VolumeRecord) -> ChunkRuns:
    """Return the whole volume as one run that the base has nothing of."""
    blocks = np.array([record.size_bytes // BLOCK_BYTES], np.uint64)
    return ChunkRuns(np.zeros(1, np.uint64), blocks, np.full(1, HOLE, np.uint64), np.ones(1, np.bool_))
