"""The `lvm-thin` substrate: every volume, generation and workspace is a thin volume of one pool, remembered by the group's metadata alone.

What a logical volume is stands in its tags (lvm_tags.py), and a change of tags is one commit of LVM's: the one step of every
operation. Names are random and never used twice. A snapshot carries its tags from its first commit on. What has no meaning
(unfinished, displaced by another, of a volume that is gone) is swept. LVM keeps them all inactive; devices are made for each use
and vanish with it (mapper.py).

A change takes the group's lock for as long as it lasts, so that nothing is attached while it is being judged unused.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract.errors import (
    BaseMismatch,
    DeviceFailed,
    LandfallError,
    LayoutUnsupported,
    NoSpace,
    NoSuchGeneration,
    NoSuchTransfer,
    NoSuchVolume,
    NotOurs,
    RequestRefused,
    VolumeExists,
)
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind, empty_generation, plain_name
from agent.contract.messages import GenerationFacts, Role, Unreadable
from agent.system import blockdev
from agent.system.failpoint import failpoint
from agent.volume import lvm, mapper, thin_map
from agent.volume import lvm_tags as tags
from agent.volume.freeze import frozen, sync_mounted, thaw_if_frozen
from agent.volume.lvm import LogicalVolume
from agent.volume.mounts import mount_on, mounts
from agent.volume.substrate import ChangedRuns, VolumeRecord, Workspace

POOL_TAG: Final = "landfall/pool/1"
CHUNK_BYTES: Final = 64 << 10
_LOCKS: Final = Path("/run/lock")
_HIDDEN: Final = ("--setactivationskip", "y", "--activate", "n")


@dataclass(frozen=True, slots=True)
class Limits:
    """How full the pool may be for something new to be begun in it; what is under way may go further."""

    data_percent: float = 95.0
    metadata_percent: float = 80.0


@dataclass(frozen=True, slots=True)
class _Held:
    """The group's meaning at one moment: only what has a meaning is in it."""

    volumes: dict[UUID, tuple[VolumeRecord, LogicalVolume]]
    generations: dict[GenerationId, tuple[GenerationFacts, LogicalVolume]]
    workspaces: dict[Workspace, LogicalVolume]
    operational: dict[UUID, LogicalVolume]
    meaningless: tuple[LogicalVolume, ...]
    unreadable: tuple[Unreadable, ...] = ()


class LvmThinSubstrate:
    """Keeps the contract of ``substrate.Substrate`` with thin volumes."""

    kind = "lvm-thin"

    def __init__(self, group: str, *, limits: Limits | None = None) -> None:
        """Open a volume group; NotOurs if it or its pool does not carry our tag. ``recover`` is the caller's, before anything else."""
        self.group = lvm.group(group)
        self.limits = limits or Limits()
        pools = [held for held in lvm.volumes(self.group) if POOL_TAG in held.tags]
        if len(pools) != 1:
            raise NotOurs(f"volume group {group} has {len(pools)} thin pools of Landfall", fix="Make one with `landfall-agent pool`.")
        self.pool_volume = pools[0]
        self._known: tuple[bytes, _Held] | None = None
        if not self.pool_volume.errors_when_full:
            lvm.change(self.group, self.pool_volume.name, "--errorwhenfull", "y")
        self._activate()

    @staticmethod
    def initialise(group: str) -> LvmThinSubstrate:
        """Make the pool of a volume group that carries our tag, if there is none yet, and open it."""
        found = lvm.group(group)
        held = lvm.volumes(found)
        if not any(POOL_TAG in volume.tags for volume in held):
            if any(not volume.name.endswith("_pmspare") for volume in held):
                raise NotOurs(f"volume group {group} holds volumes that Landfall did not make", fix="Give Landfall a group of its own.")
            name = f"pool-{secrets.token_hex(8)}"
            metadata = max(4 << 20, found.free_bytes >> 9) // found.extent_bytes * found.extent_bytes
            room = found.free_bytes - 2 * max(metadata, found.extent_bytes)
            room = room // found.extent_bytes * found.extent_bytes
            shape = ["--type", "thin-pool", "--size", f"{room}b", "--chunksize", f"{CHUNK_BYTES}b", "--poolmetadatasize", f"{metadata}b"]
            lvm.create(found, [*shape, "--zero", "y", found.name], name, [POOL_TAG])
        return LvmThinSubstrate(group)

    @property
    def differential_identity(self) -> str:
        """UUID of the pool's data volume."""
        return self.pool_volume.data

    @property
    def differential_device(self) -> Path:
        """The pool's data device: ``diff_block`` counts its blocks of 4096 bytes."""
        return self._existing_device(lvm.dm_uuid(self.group, self.pool_volume.data, "tdata"))

    def free_bytes(self) -> int:
        """Return how much can still be written into the pool."""
        status = mapper.pool_status(self._pool())
        return (status.data_total - status.data_used) * self.pool_volume.chunk_bytes

    # --- volumes ---

    def volumes(self) -> tuple[VolumeRecord, ...]:
        """Return every volume held here, by name."""
        found = [record for record, _ in self._held().volumes.values()]
        return tuple(sorted(found, key=lambda record: (record.name, str(record.id))))

    def unreadable(self) -> tuple[Unreadable, ...]:
        """Return the logical volumes of the pool whose tags cannot be read, and why."""
        return self._held().unreadable

    def create(self, record: VolumeRecord) -> None:
        """Make a volume with g0; a primary also gets an empty operational volume. VolumeExists, NoSpace.

        The tag on g0 is the step. If we die before it ``recover`` sweeps.
        """
        plain_name(record.name)
        if record.size_bytes <= 0 or record.size_bytes % BLOCK_BYTES:
            raise LayoutUnsupported(f"{record.size_bytes} bytes are no whole number of blocks", fix=f"Use a multiple of {BLOCK_BYTES}.")
        self._refuse_sectors(record)
        with self._locked(), self._swept_on_failure():
            held = self._held()
            if any(other.id == record.id or other.name == record.name for other, _ in held.volumes.values()):
                raise VolumeExists(f"volume {record.name} ({record.id}) exists")
            self._need_room(f"volume {record.name}")
            failpoint("substrate.create.before")
            empty = GenerationFacts(empty_generation(record.id), GenerationKind.EMPTY, 0)
            if record.role is Role.PRIMARY:
                self._new_empty(record.size_bytes, [tags.operational_tag(record.id)])
            failpoint("substrate.create.before_rename")
            self._new_empty(record.size_bytes, [tags.volume_tag(record), tags.generation_tag(empty)], "--permission", "r")
        failpoint("substrate.create.after")

    def remove(self, volume: UUID) -> None:
        """Destroy a volume with all it has; DeviceBusy while any of it is in use. If we die here ``recover`` ends it."""
        with self._locked():
            held = self._held()
            record, empty = self._volume(held, volume)
            for used in _all_of(held, volume):
                mapper.refuse_in_use(used.uuid, f"volume {record.name}")
            failpoint("substrate.remove.before")
            lvm.retag(self.group, empty, drop=sorted(empty.tags), add=[tags.unfinished_tag(volume)])
            failpoint("substrate.remove.renamed")
            self._sweep()
        failpoint("substrate.remove.after")

    def grow(self, volume: UUID, size_bytes: int) -> None:
        """Let every thin volume of a volume be larger, by what was never written at its end. LayoutUnsupported for less, or for part of
        an extent.

        The tag on g0 goes last: if we die before it, asked again, the rest is done.
        """
        with self._locked():
            record, empty = self._volume(self._held(), volume)
            if size_bytes < record.size_bytes or size_bytes % self.group.extent_bytes:
                raise LayoutUnsupported(
                    f"volume {record.name} cannot have {size_bytes} bytes",
                    cause=f"it has {record.size_bytes}, in extents of {self.group.extent_bytes}",
                    fix=f"Name more than it has, and a multiple of {self.group.extent_bytes}.",
                )
            failpoint("substrate.grow.before")
            for found in _all_of(self._held(), volume):
                if found.size_bytes < size_bytes:
                    lvm.extend(self.group, found, size_bytes)
                mapper.resize(found.uuid, size_bytes)
            failpoint("substrate.grow.half")
            was, now = tags.volume_tag(record), tags.volume_tag(replace(record, size_bytes=size_bytes))
            if was != now:
                lvm.retag(self.group, empty, drop=[was], add=[now])
        failpoint("substrate.grow.after")

    def set_role(self, volume: UUID, role: Role, epoch: int) -> None:
        """Record the role and epoch in one commit."""
        with self._locked():
            record, empty = self._volume(self._held(), volume)
            was, now = tags.volume_tag(record), tags.volume_tag(replace(record, role=role, epoch=epoch))
            if was != now:
                lvm.retag(self.group, empty, drop=[was], add=[now])

    # --- generations ---

    def generations(self, volume: UUID) -> tuple[GenerationFacts, ...]:
        """Return the generations, oldest first, g0 included."""
        return self._generations(self._held(), volume)

    def take(self, volume: UUID, mount_point: Path | None, facts: GenerationFacts) -> float:
        """Make the operational volume's state under a freeze a generation; return the freeze in milliseconds.

        Without a mount point the volume must not be in use (DeviceBusy). NotOurs if something else is mounted there. If we die here
        the guard thaws, and the snapshot, which is unfinished, is swept.
        """
        with self._locked(), self._swept_on_failure():
            held = self._held()
            operational = self._operational(held, volume)
            self._refuse_taken(held, facts)
            self._need_room(f"generation {facts.id.name}")
            if mount_point is None:
                mapper.refuse_in_use(operational.uuid, "the operational volume")
                name, milliseconds = self._snapshot(operational, [tags.unfinished_tag(volume)], "--permission", "r"), 0.0
            else:
                _refuse_other_mount(mount_point, operational)
                sync_mounted(mount_point)
                failpoint("substrate.take.before_freeze")
                with frozen(mount_point) as freeze:
                    failpoint("substrate.take.frozen")
                    name = self._snapshot(operational, [tags.unfinished_tag(volume)], "--permission", "r")
                milliseconds = freeze.milliseconds
            failpoint("substrate.take.before_record")
            taken = self._named(name)
            failpoint("substrate.take.before_rename")
            lvm.retag(self.group, taken, drop=[tags.unfinished_tag(volume)], add=[tags.generation_tag(facts)])
        failpoint("substrate.take.after")
        return milliseconds

    def drop(self, generation: GenerationId) -> None:
        """Give up a generation; NoSuchGeneration if it is not held, DeviceBusy while it is read, RequestRefused for g0."""
        with self._locked():
            volume = self._generation(self._held(), generation)
            if generation == empty_generation(generation.volume):
                raise RequestRefused("g0 is the beginning of every volume and takes no room; it is not dropped")
            mapper.refuse_in_use(volume.uuid, f"generation {generation.name}")
            failpoint("substrate.drop.before")
            lvm.retag(self.group, volume, drop=sorted(volume.tags), add=[tags.unfinished_tag(generation.volume)])
            failpoint("substrate.drop.half")
            lvm.remove(self.group, volume)
        failpoint("substrate.drop.after")

    def changed(self, base: GenerationId, target: GenerationId) -> ChangedRuns:
        """Return the runs that differ, with the pre-images' addresses on ``differential_device``. BaseMismatch for two volumes.

        The addresses hold for as long as the base is held. Blocks of zeros are holes, in whatever chunk they lie.
        """
        if base.volume != target.volume:
            raise BaseMismatch(f"{base.name} and {target.name} are of different volumes")
        held = self._held()
        before, after = self._generation(held, base), self._generation(held, target)
        with self.reading(base) as old, self.reading(target) as new:
            with self._locked():
                metadata = self._existing_device(lvm.dm_uuid(self.group, self.pool_volume.metadata, "tmeta"))
                runs = thin_map.differing_chunks(self._pool(), metadata, _thin_id(before), _thin_id(after))
            return thin_map.refined(runs, self.pool_volume.chunk_bytes // BLOCK_BYTES, old, new)

    @contextmanager
    def _attached(self, volume: LogicalVolume, what: str, *, writable: bool) -> Iterator[Path]:
        with self._locked():
            mapper.refuse_in_use(volume.uuid, what, writers_only=not writable)
            attached = mapper.thin_device(self._pool(), _thin_id(volume), volume.size_bytes, volume.uuid, writable=writable)
            device = attached.__enter__()
        try:
            yield device
        finally:
            attached.__exit__(None, None, None)

    def reading(self, generation: GenerationId) -> AbstractContextManager[Path]:
        """Attach a generation read-only for as long as the context lasts, or a mount of it."""
        return self._attached(self._generation(self._held(), generation), f"generation {generation.name}", writable=False)

    def refuse_written(self, generation: GenerationId) -> None:
        """BaseMismatch if a generation may have been written to: LVM no longer keeps it read-only.

        A write that went around LVM's permission is not seen here; the digests of pieces and files see it.
        """
        volume = self._generation(self._held(), generation)
        if not volume.read_only:
            raise BaseMismatch(
                f"somebody made generation {generation.name} writable",
                cause=f"logical volume {volume.name} ({volume.uuid})",
                fix="Drop it here and replicate from an older generation that both nodes hold, or in full.",
            )

    # --- the operational volume ---

    def operational(self, volume: UUID) -> AbstractContextManager[Path]:
        """Attach the operational volume read-write, exclusively, for as long as the context lasts, or a mount of it. DeviceBusy."""
        return self._attached(self._operational(self._held(), volume), "the operational volume", writable=True)

    def clone_operational(self, volume: UUID, generation: GenerationId) -> None:
        """Make the operational volume a snapshot of ``generation`` in one commit; DeviceBusy if the old one is in use."""
        if generation.volume != volume:
            raise BaseMismatch(f"{generation.name} is of another volume")
        with self._locked():
            held = self._held()
            self._clone(held, generation, held.operational.get(volume), tags.operational_tag(volume), "operational")

    # --- workspaces ---

    def begin(self, workspace: Workspace, base: GenerationId) -> None:
        """Make a snapshot of ``base`` a workspace, replacing one of the same name (DeviceBusy if that is in use).

        NoSpace leaves everything as it was. If we die here the old one stands, or the new one.
        """
        if base.volume != workspace.volume:
            raise BaseMismatch(f"{base.name} is of another volume")
        with self._locked():
            held = self._held()
            self._clone(held, base, held.workspaces.get(workspace), tags.workspace_tag(workspace), "begin")

    def exists(self, workspace: Workspace) -> bool:
        """Whether the workspace is there, whole."""
        return workspace in self._held().workspaces

    def workspaces(self, volume: UUID) -> tuple[Workspace, ...]:
        """Return every workspace of a volume."""
        held = self._held()
        self._volume(held, volume)
        return tuple(sorted((found for found in held.workspaces if found.volume == volume), key=lambda found: (found.transfer, found.kind)))

    def writing(self, workspace: Workspace) -> AbstractContextManager[Path]:
        """Attach a workspace read-write, exclusively; DeviceBusy if somebody else has it, NoSuchTransfer if it is not there."""
        return self._attached(self._workspace(self._held(), workspace), f"the {workspace.kind} volume", writable=True)

    def commit(self, workspace: Workspace, facts: GenerationFacts) -> None:
        """Make the workspace a generation by one change of tags. DeviceBusy while it is attached or mounted."""
        with self._locked():
            held = self._held()
            volume = self._workspace(held, workspace)
            if facts.id.volume != workspace.volume:
                raise BaseMismatch(f"{facts.id.name} is of another volume")
            self._refuse_taken(held, facts)
            self._settle(volume, workspace)
            failpoint("substrate.commit.before_rename")
            lvm.retag(self.group, volume, drop=sorted(volume.tags), add=[tags.generation_tag(facts)])
        failpoint("substrate.commit.after_rename")

    def replace(self, workspace: Workspace, generation: GenerationId) -> None:
        """Let a healed workspace take the place of ``generation`` by one change of tags. DeviceBusy while the workspace is attached.

        Who reads the old one meanwhile goes on reading it; it is removed then or at the next start.
        """
        with self._locked():
            held = self._held()
            volume = self._workspace(held, workspace)
            if generation.volume != workspace.volume:
                raise BaseMismatch(f"{generation.name} is of another volume")
            old = self._generation(held, generation)
            facts, _ = held.generations[generation]
            self._settle(volume, workspace)
            failpoint("substrate.replace.before")
            taking = [tags.generation_tag(facts), tags.instead_of_tag(old.uuid)]
            lvm.retag(self.group, volume, drop=sorted(volume.tags), add=taking)
            failpoint("substrate.replace.after")
            self._sweep()

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

    # --- after a crash ---

    def recover(self) -> None:
        """Thaw what is frozen of ours, let go of devices and of the metadata snapshot, sweep what has no meaning. Idempotent."""
        with self._locked():
            self._activate()
            for operational in self._held().operational.values():
                for mount in mounts():
                    if mapper.is_device_of(mount.device, operational.uuid):
                        thaw_if_frozen(mount.mount_point)
            mapper.remove_unused()
            thin_map.release_metadata(self._pool())
            self._sweep()

    # --- steps ---

    def _held(self) -> _Held:
        """Return what every logical volume of the pool is, as read since the last commit to the group."""
        stamp, known = lvm.stamp(self.group), self._known
        if stamp is not None and known is not None and known[0] == stamp:
            return known[1]
        held = self._read()
        self._known = None if stamp is None else (stamp, held)  # a commit since the stamp makes another one, so it is read again
        return held

    def _read(self) -> _Held:
        """Read what every logical volume of the pool is. The tag on g0 is the volume: what belongs to none has no meaning.

        As long as some tag cannot be read, what seems to belong to none may belong to that, and is left alone.
        """
        ours = [found for found in lvm.volumes(self.group) if found.pool == self.pool_volume.uuid and found.thin_id is not None]
        displaced = frozenset[str]().union(*(tags.displaced(found.tags) for found in ours))
        held = _Held({}, {}, {}, {}, ())
        unreadable: dict[str, Unreadable] = {}
        for found in ours:
            try:
                if (record := tags.read_volume(found.tags)) is not None:
                    held.volumes[record.id] = (record, found)
                for read in (tags.read_generation, tags.read_workspace):
                    read(found.tags)
                for what in ("operational", "unfinished"):
                    tags.read_uuid(found.tags, what)
            except LandfallError as error:
                unreadable[found.uuid] = Unreadable(None, f"{self.group.name}/{found.name}", str(error))
        meaningless: list[LogicalVolume] = []
        for found in ours:
            if found.uuid in unreadable:
                continue
            facts, workspace = tags.read_generation(found.tags), tags.read_workspace(found.tags)
            operational, unfinished = (tags.read_uuid(found.tags, what) for what in ("operational", "unfinished"))
            of = facts.id.volume if facts else workspace.volume if workspace else operational
            if unfinished or found.uuid in displaced:
                meaningless.append(found)
            elif of is not None and of not in held.volumes:
                meaningless += [] if unreadable else [found]
            elif facts:
                held.generations[facts.id] = (facts, found)
            elif workspace:
                held.workspaces[workspace] = found
            elif operational:
                held.operational[operational] = found
        return replace(held, meaningless=tuple(meaningless), unreadable=tuple(unreadable.values()))

    @staticmethod
    def _volume(held: _Held, volume: UUID) -> tuple[VolumeRecord, LogicalVolume]:
        if volume not in held.volumes:
            raise NoSuchVolume(f"no volume {volume} here")
        return held.volumes[volume]

    def _generation(self, held: _Held, generation: GenerationId) -> LogicalVolume:
        self._volume(held, generation.volume)
        if generation not in held.generations:
            raise NoSuchGeneration(f"generation {generation.name} of volume {generation.volume} is not held here")
        return held.generations[generation][1]

    def _generations(self, held: _Held, volume: UUID) -> tuple[GenerationFacts, ...]:
        self._volume(held, volume)
        found = [facts for facts, _ in held.generations.values() if facts.id.volume == volume]
        return tuple(sorted(found, key=lambda facts: (facts.id.epoch, facts.id.counter, facts.id.nonce)))

    def _workspace(self, held: _Held, workspace: Workspace) -> LogicalVolume:
        self._volume(held, workspace.volume)
        if workspace not in held.workspaces:
            raise NoSuchTransfer(f"there is no {workspace.kind} volume of transfer {workspace.transfer}")
        return held.workspaces[workspace]

    def _operational(self, held: _Held, volume: UUID) -> LogicalVolume:
        self._volume(held, volume)
        if volume not in held.operational:
            raise NoSuchVolume(f"volume {volume} has no operational volume here", fix="Serve it first, or ask the node that does.")
        return held.operational[volume]

    def _refuse_taken(self, held: _Held, facts: GenerationFacts) -> None:
        if any(known.id.name == facts.id.name for known in self._generations(held, facts.id.volume)):
            raise RequestRefused(f"generation {facts.id.name} is here already")

    def _refuse_sectors(self, record: VolumeRecord) -> None:
        pool_fd = os.open(self._pool(), os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = blockdev.logical_sector_bytes(pool_fd)
        finally:
            os.close(pool_fd)
        if record.sector_bytes != there:
            raise LayoutUnsupported(
                f"sectors of {record.sector_bytes} bytes in a pool on disks with sectors of {there}",
                fix="Put the volume group on disks with the sectors that the volume has.",
            )

    def _need_room(self, what: str) -> None:
        """Raise NoSpace above the limits, before anything is made; DeviceFailed for a pool that must be repaired."""
        status = mapper.pool_status(self._pool())
        if status.needs_check or status.mode not in {"rw", "out_of_data_space"}:
            raise DeviceFailed(f"the thin pool takes no {what}", cause=f"its mode is {status.mode}", fix="Repair it: lvconvert --repair.")
        data, metadata = (
            100 * used / total for used, total in ((status.data_used, status.data_total), (status.metadata_used, status.metadata_total))
        )
        if data > self.limits.data_percent or metadata > self.limits.metadata_percent:
            raise NoSpace(
                f"no room in the pool for {what}",
                cause=f"data {data:.1f} % (limit {self.limits.data_percent:g}), "
                f"metadata {metadata:.1f} % (limit {self.limits.metadata_percent:g})",
                fix=f"Extend the pool (lvextend {self.group.name}/{self.pool_volume.name}), or drop generations or a partial transfer.",
            )

    def _settle(self, volume: LogicalVolume, workspace: Workspace) -> None:
        """Refuse a workspace in use, make what was written to it durable, and let LVM keep it read-only from here on."""
        mapper.refuse_in_use(volume.uuid, f"the {workspace.kind} volume")
        with mapper.thin_device(self._pool(), _thin_id(volume), volume.size_bytes, volume.uuid, writable=True) as device:
            device_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(device_fd)
            finally:
                os.close(device_fd)
        if not volume.read_only:
            lvm.change(self.group, volume.name, "--permission", "r")

    def _clone(self, held: _Held, base: GenerationId, old: LogicalVolume | None, tag: str, step: str) -> None:
        source = self._generation(held, base)
        if old is not None:
            mapper.refuse_in_use(old.uuid, old.name)
        self._need_room(f"a clone of generation {base.name}")
        failpoint(f"substrate.{step}.before")
        failpoint(f"substrate.{step}.before_rename")
        self._snapshot(source, [tag, *([tags.instead_of_tag(old.uuid)] if old else [])], "--permission", "rw")
        failpoint(f"substrate.{step}.after")
        if old is not None:
            self._sweep()

    def _new_empty(self, size_bytes: int, tagged: list[str], *options: str) -> None:
        shape = ["--virtualsize", f"{size_bytes}b", "--thinpool", self.pool_volume.name, "--wipesignatures", "n", *_HIDDEN, *options]
        lvm.create(self.group, [*shape, self.group.name], _new_name(), tagged)

    def _snapshot(self, origin: LogicalVolume, tagged: list[str], *options: str) -> str:
        name = _new_name()
        lvm.create(self.group, ["--snapshot", *_HIDDEN, *options, f"{self.group.name}/{origin.name}"], name, tagged)
        return name

    def _named(self, name: str) -> LogicalVolume:
        return next(found for found in lvm.volumes(self.group) if found.name == name)

    def _sweep(self) -> None:
        """Remove what has no meaning and is not in use; the rest goes at the next sweep."""
        for left in self._held().meaningless:
            if not mapper.in_use(left.uuid):
                lvm.remove(self.group, left)

    @contextmanager
    def _swept_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with suppress(LandfallError):  # what stays is swept at the next start
                self._sweep()
            raise

    def _activate(self) -> None:
        if mapper.by_identity(lvm.dm_uuid(self.group, self.pool_volume.uuid, "tpool")) is None:
            lvm.change(self.group, self.pool_volume.name, "--activate", "y")

    def _pool(self) -> Path:
        return self._existing_device(lvm.dm_uuid(self.group, self.pool_volume.uuid, "tpool"))

    def _existing_device(self, identity: str) -> Path:
        device = mapper.by_identity(identity)
        if device is None:
            raise DeviceFailed(f"the thin pool of {self.group.name} is not active", cause=identity, fix=f"vgchange -ay {self.group.name}")
        return device

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock_fd = os.open(_LOCKS / f"landfall-{self.group.uuid}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
            # Whoever of ours changes the group has this lock, so a pool that stays suspended is what a killed program of LVM's left.
            mapper.resume_left(lvm.dm_uuid(self.group, self.pool_volume.uuid, "tpool"))
            yield
        finally:
            os.close(lock_fd)


def _new_name() -> str:
    return f"landfall-{secrets.token_hex(16)}"


def _thin_id(volume: LogicalVolume) -> int:
    if volume.thin_id is None:
        raise NotOurs(f"logical volume {volume.name} is no thin volume")
    return volume.thin_id


def _all_of(held: _Held, volume: UUID) -> Iterator[LogicalVolume]:
    yield from (found for facts, found in held.generations.values() if facts.id.volume == volume)
    yield from (found for workspace, found in held.workspaces.items() if workspace.volume == volume)
    with suppress(KeyError):
        yield held.operational[volume]


def _refuse_other_mount(mount_point: Path, operational: LogicalVolume) -> None:
    """Refuse to freeze a filesystem that is not on our operational volume."""
    mount = mount_on(mount_point)
    if mount is None or not mapper.is_device_of(mount.device, operational.uuid):
        raise NotOurs(
            f"{mount_point} is not a mount of the operational volume", cause=f"mounted there: {mount.source if mount else 'nothing'}"
        )
