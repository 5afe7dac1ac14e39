"""The `lvm-thin` substrate: every volume, generation and workspace is a thin volume of one pool.

LVM keeps them all inactive; devices are made for each use and vanish with it. What is common with classic snapshots is in
lvm_substrate.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

from agent.contract.errors import BaseMismatch, CommandFailed, DeviceBusy, DeviceFailed, LayoutUnsupported, NoSpace, NotOurs
from agent.contract.identity import BLOCK_BYTES, GenerationId
from agent.contract.messages import Role
from agent.system.failpoint import failpoint
from agent.volume import chunks, lvm, lvm_held, mapper, thin_map
from agent.volume import lvm_tags as tags
from agent.volume.lvm import LogicalVolume
from agent.volume.lvm_held import Held
from agent.volume.lvm_substrate import HIDDEN, LvmSubstrate, g0_tags, new_name, refuse_sectors
from agent.volume.substrate import ChangedRuns, VolumeRecord, Workspace

POOL_TAG: Final = "landfall/pool/1"
CHUNK_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """How full the pool may be for something new to be begun in it; what is under way may go further."""

    data_percent: float = 95.0
    metadata_percent: float = 80.0


class LvmThinSubstrate(LvmSubstrate):
    """Keeps the contract of ``substrate.Substrate`` with thin volumes."""

    kind = "lvm-thin"
    branches = True

    def __init__(self, group: str, *, limits: Limits | None = None) -> None:
        """Open a volume group; NotOurs if it or its pool does not carry our tag. ``recover`` is the caller's, before anything else."""
        super().__init__(group)
        self.limits = limits or Limits()
        pools = [held for held in lvm.volumes(self.group) if POOL_TAG in held.tags]
        if len(pools) != 1:
            raise NotOurs(f"volume group {group} has {len(pools)} thin pools of Landfall", fix="Make one with `landfall-agent pool`.")
        self.pool_volume = pools[0]
        if not self.pool_volume.errors_when_full:
            lvm.change(self.group, self.pool_volume.name, "--errorwhenfull", "y")
        self._take_into_use()

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

    def differential_identity(self, base: GenerationId) -> str:
        """UUID of the pool's data volume."""
        return self.pool_volume.data

    @contextmanager
    def differential(self, base: GenerationId) -> Iterator[Path]:
        """Give the pool's data device: ``diff_block`` counts its blocks of 4096 bytes."""
        yield self._existing_device(lvm.dm_uuid(self.group, self.pool_volume.data, "tdata"))

    def free_bytes(self, workspace: Workspace | None = None) -> int:
        """Return how much can still be written into the pool."""
        status = self._status()
        return (status.data_total - status.data_used) * self.pool_volume.chunk_bytes

    def changed(self, base: GenerationId, target: GenerationId) -> ChangedRuns:
        """Return the runs that differ, with the pre-images' addresses on ``differential``. BaseMismatch for two volumes.

        The addresses hold for as long as the base is held. Blocks of zeros are holes, in whatever chunk they lie.
        """
        if base.volume != target.volume:
            raise BaseMismatch(f"{base.name} and {target.name} are of different volumes")
        held = self._held()
        before, after = held.generation(base), held.generation(target)
        with self.reading(base) as old, self.reading(target) as new:
            with self._locked():
                metadata = self._existing_device(lvm.dm_uuid(self.group, self.pool_volume.metadata, "tmeta"))
                runs = thin_map.differing_chunks(self._pool(), metadata, _thin_id(before), _thin_id(after))
            return chunks.refined(runs, self.pool_volume.chunk_bytes // BLOCK_BYTES, old, new)

    def grow(self, volume: UUID, size_bytes: int) -> None:
        """Let every thin volume of a volume be larger, by what was never written at its end. LayoutUnsupported for less, or for part of
        an extent.

        The tag on g0 goes last: if we die before it, asked again, the rest is done.
        """
        with self._locked():
            self.refuse_growth(volume, size_bytes)
            held = self._held()
            record = held.volume(volume)
            failpoint("substrate.grow.before")
            for found in held.all_of(volume):
                if found.size_bytes < size_bytes:
                    lvm.extend(self.group, found, size_bytes)
                mapper.resize(found.uuid, size_bytes)
            failpoint("substrate.grow.half")
            was, now = tags.volume_tag(record), tags.volume_tag(replace(record, size_bytes=size_bytes))
            if was != now:
                lvm.retag(self.group, held.record_of(volume), drop=[was], add=[now])
        failpoint("substrate.grow.after")

    def clone_operational(self, volume: UUID, generation: GenerationId) -> None:
        """Make the operational volume a snapshot of ``generation`` in one commit; DeviceBusy if the old one is in use."""
        if generation.volume != volume:
            raise BaseMismatch(f"{generation.name} is of another volume")
        with self._locked():
            held = self._held()
            source, old = held.generation(generation), held.operational.get(volume)
            if old is not None:
                mapper.refuse_in_use(old.uuid, "the operational volume")
            self._need_room(f"a clone of generation {generation.name}")
            failpoint("substrate.operational.before")
            failpoint("substrate.operational.before_rename")
            self._snapshot(source, [tags.operational_tag(volume), *_displacing(old)], writable=True)
            failpoint("substrate.operational.after")
            self._sweep()

    def recover(self) -> None:
        """Thaw what is frozen of ours, let go of devices and of the metadata snapshot, sweep what has no meaning. Idempotent."""
        with self._locked():
            self._take_into_use()
            self._thaw()
            mapper.remove_unused()
            if self._status().takes_writes:  # one that does not has to wait, and says so to everybody who wants to write
                thin_map.release_metadata(self._pool())
                self._sweep()

    # --- steps ---

    def _read(self) -> Held:
        found = lvm.volumes(self.group)
        return lvm_held.read([one for one in found if one.pool == self.pool_volume.uuid and one.thin_id is not None], self.group.name)

    def _need_room(self, what: str) -> None:
        """Raise NoSpace above the limits, before anything is made; DeviceFailed for a pool that takes no writes."""
        status = self._status()
        self._refuse_unfit(status)
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

    def _make(self, record: VolumeRecord) -> None:
        refuse_sectors(record, self._pool())
        if record.role is Role.PRIMARY:
            self._new_empty(record.size_bytes, [tags.operational_tag(record.id)])
        failpoint("substrate.create.before_rename")
        self._make_empty(record)

    def _make_empty(self, record: VolumeRecord) -> None:
        self._new_empty(record.size_bytes, g0_tags(record), "--permission", "r")

    def _refuse_kind(self, found: LogicalVolume, listed: tuple[LogicalVolume, ...]) -> None:
        origin = next((other for other in listed if other.uuid == found.origin), None)
        if found.thin_id is None or found.pool != self.pool_volume.uuid or (found.origin and (origin is None or origin.pool != found.pool)):
            raise LayoutUnsupported(
                f"logical volume {found.name} is no thin volume of the pool {self.pool_volume.name}",
                cause=f"it is {found.kind}{' of another pool' if found.thin_id is not None else ''}",
                fix="Only a thin volume of this pool can be adopted without a copy; copy it into a new volume otherwise.",
            )

    def _foreign_device(self, found: LogicalVolume) -> AbstractContextManager[Path]:
        return mapper.device_over(mapper.thin(self._pool(), _thin_id(found)), found.size_bytes, found.uuid, writable=False)

    def _take_in(self, found: LogicalVolume, record: VolumeRecord) -> None:
        """Let the kernel forget LVM's own device of it first: every device of it is one of ours from now on."""
        refuse_sectors(record, self._pool())
        mapper.refuse_in_use(found.uuid, f"logical volume {found.name}")
        lvm.deactivate(self.group, found)
        lvm.change(self.group, found.name, "--setactivationskip", "y")
        lvm.retag(self.group, found, add=[tags.operational_tag(record.id)])

    def _new_empty(self, size_bytes: int, tagged: list[str], *options: str) -> None:
        shape = ["--virtualsize", f"{size_bytes}b", "--thinpool", self.pool_volume.name, "--wipesignatures", "n", *HIDDEN, *options]
        lvm.create(self.group, [*shape, self.group.name], new_name(), tagged)

    def _snapshot(self, origin: LogicalVolume, tagged: list[str], *, writable: bool, room_bytes: int | None = None) -> str:
        name = new_name()
        permission = ("--permission", "rw" if writable else "r")
        lvm.create(self.group, ["--snapshot", *HIDDEN, *permission, f"{self.group.name}/{origin.name}"], name, tagged)
        return name

    def _clone(self, workspace: Workspace, base: GenerationId, room_bytes: int | None) -> None:
        held = self._held()
        failpoint("substrate.begin.before_rename")
        tagged = [tags.workspace_tag(workspace), *_displacing(held.workspaces.get(workspace))]
        self._snapshot(held.generation(base), tagged, writable=True)

    def _after_change(self, volume: UUID) -> None:
        """Nothing: thin volumes do not depend on one another."""

    def _device(self, volume: LogicalVolume, record: VolumeRecord, *, writable: bool) -> AbstractContextManager[Path]:
        if writable:
            self._refuse_unfit(self._status())
            if mapper.by_identity(lvm.dm_uuid(self.group, volume.uuid)):  # two devices of one thin volume do not exclude each other
                raise DeviceBusy(
                    f"somebody activated logical volume {volume.name}, which is to be written",
                    fix=f"Let go of it: lvchange --activate n {self.group.name}/{volume.name}.",
                )
        return mapper.device_over(mapper.thin(self._pool(), _thin_id(volume)), record.size_bytes, volume.uuid, writable=writable)

    def _take_into_use(self) -> None:
        """Let the kernel have the pool; one that takes no writes is taken from it first, so that its metadata gets checked.

        A disk that fails a flush fails the pool's commit with it. The kernel then goes back to the last one that succeeded and commits no
        more, also when the disk is sound again: what was written since is gone, and nobody was told that it is durable. Whoever starts
        the agent anew says that the disk is sound; that the metadata is, the check says, or DeviceFailed. While a volume is in use the
        pool stays with the kernel as it is.
        """
        pool = mapper.by_identity(lvm.dm_uuid(self.group, self.pool_volume.uuid, "tpool"))
        if pool is not None and mapper.pool_status(pool).takes_writes:
            return
        if pool is not None:
            lvm.deactivate(self.group, self.pool_volume)
        try:
            lvm.activate_checked(self.group, self.pool_volume)
        except CommandFailed as error:
            raise DeviceFailed(
                f"the thin pool of {self.group.name} cannot be taken into use",
                cause=str(error.cause),
                fix=f"If the check of its metadata failed: lvconvert --repair {self.group.name}/{self.pool_volume.name}.",
            ) from error

    def _status(self) -> mapper.PoolStatus:
        return mapper.pool_status(self._pool())

    def _refuse_unfit(self, status: mapper.PoolStatus) -> None:
        """Refuse to write to a pool that commits nothing: such a write would be accepted, and gone later."""
        pool = f"{self.group.name}/{self.pool_volume.name}"
        if status.takes_writes:
            return
        if status.metadata_is_full:
            raise NoSpace(
                f"the metadata of thin pool {pool} is full, and the kernel keeps it read-only",
                fix=f"Extend it (lvextend --poolmetadatasize +64m {pool}), then start the agent anew.",
            )
        raise DeviceFailed(
            f"thin pool {pool} takes no writes",
            cause=f"its mode is {status.mode}: a commit of its metadata failed, and the kernel trusts it no more",
            fix="See to the disks below it (dmesg), stop what serves its volumes (landfall unserve), and start the agent anew: "
            "it has the metadata checked and takes the pool into use again. What was acknowledged is there.",
        )

    def _pool(self) -> Path:
        return self._existing_device(lvm.dm_uuid(self.group, self.pool_volume.uuid, "tpool"))

    def _existing_device(self, identity: str) -> Path:
        device = mapper.by_identity(identity)
        if device is None:
            raise DeviceFailed(f"the thin pool of {self.group.name} is not active", cause=identity, fix=f"vgchange -ay {self.group.name}")
        return device


def _displacing(old: LogicalVolume | None) -> list[str]:
    return [] if old is None else [tags.instead_of_tag(old.uuid)]


def _thin_id(volume: LogicalVolume) -> int:
    if volume.thin_id is None:
        raise NotOurs(f"logical volume {volume.name} is no thin volume")
    return volume.thin_id
