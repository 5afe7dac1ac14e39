"""The `reflink` substrate: every volume, generation and workspace is an image file in a pool on XFS or btrfs.

    <pool>/landfall-pool                          the marker
    <pool>/volumes/<uuid>/volume.json             VolumeRecord
                          operational.img         only on the node that serves the volume
                          adopted                 where that came from, if it was there before the volume
                          generations/NAME.img    immutable, with NAME.json (GenerationFacts)
                          workspaces/<transfer>.<kind>.img

An image counts only with its record and a record only with its image; ``recover`` sweeps the rest. Everything is made under a name that
begins with ``.new-`` and comes into being by one rename, with its content and then its folder made durable. Exclusion is by flock(2) on the
image, held by the loop device itself (loop.py). A snapshot is FICLONE; what changed is the difference of two extent maps (extents.py).
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from agent.contract.errors import (
    BaseMismatch,
    LandfallError,
    LayoutUnsupported,
    NoSuchGeneration,
    NoSuchTransfer,
    NoSuchVolume,
    NotOurs,
    RequestRefused,
    VolumeExists,
)
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind, empty_generation, plain_name
from agent.contract.messages import GenerationFacts, Role, Unreadable
from agent.system import block, files
from agent.system.failpoint import failpoint
from agent.volume import extents, images
from agent.volume.freeze import frozen, sync_mounted, thaw_if_frozen
from agent.volume.loop import attach, backs, lock, open_image
from agent.volume.mounts import Mount, mounts
from agent.volume.pool import Pool, said_plainly
from agent.volume.records import image_mtime_ns, read_record, write_record
from agent.volume.snapshot import catch_up, clone_ahead
from agent.volume.substrate import ChangedRuns, Foreign, Take, VolumeRecord, Workspace, WorkspaceKind

_ADOPTED = "adopted"
"""Where a volume's operational image came from, if it was one before."""

_GROWING = "growing"
"""The size that a volume is to have, as long as not all of it has that."""

T = TypeVar("T", VolumeRecord, GenerationFacts)


class ReflinkSubstrate:
    """Keeps the contract of ``substrate.Substrate`` with image files."""

    kind = "reflink"
    branches = True

    def __init__(self, pool: Path) -> None:
        """Open a pool; NotOurs if it does not carry the marker. ``recover`` is the caller's, once, before anything else."""
        self.pool = Pool(pool)

    @staticmethod
    def initialise(pool: Path) -> ReflinkSubstrate:
        """Mark a folder on XFS or btrfs as a pool, if it is none yet, and open it."""
        Pool.initialise(pool)
        return ReflinkSubstrate(pool)

    @property
    def disk(self) -> Path | None:
        """The device below the pool."""
        return self.pool.device

    def differential_identity(self, base: GenerationId) -> str:
        """UUID of the pool's filesystem."""
        return str(self.pool.filesystem)

    @contextmanager
    def differential(self, base: GenerationId) -> Iterator[Path]:
        """Give the block device below the pool; ``diff_block`` counts its blocks of 4096 bytes, also on btrfs."""
        yield self.pool.device

    def free_bytes(self, workspace: Workspace | None = None) -> int:
        """Return how much can still be written into the pool."""
        return self.pool.room_bytes()

    # --- volumes ---

    def volumes(self) -> tuple[VolumeRecord, ...]:
        """Return every volume held here whose record can be read, by name."""
        found = _readable(self.pool.volumes.glob("[!.]*/volume.json"), VolumeRecord)
        return tuple(sorted(found, key=lambda record: (record.name, str(record.id))))

    def unreadable(self) -> tuple[Unreadable, ...]:
        """Return the records of volumes and generations that cannot be read, and why."""
        found: list[Unreadable] = []
        for folder in sorted(self.pool.volumes.glob("[!.]*")):
            records: list[tuple[Path, Callable[[Path], object]]] = [(folder / "volume.json", lambda path: read_record(path, VolumeRecord))]
            for image in sorted(self._whole(folder / "generations")):
                records.append((image.with_suffix(".json"), lambda path: read_record(path, GenerationFacts)))
            for path, read in records:
                try:
                    read(path)
                except (LandfallError, OSError) as error:
                    found.append(Unreadable(_uuid(folder.name), str(path), str(error)))
        return tuple(found)

    def volume(self, volume: UUID) -> VolumeRecord:
        """Return the record of a volume; NoSuchVolume."""
        return self._record(volume)

    def create(self, record: VolumeRecord) -> None:
        """Make a volume with g0; a primary also gets an empty operational image. VolumeExists, NoSpace.

        If we die here there is the whole volume or what ``recover`` sweeps.
        """
        self._create(record)

    def _create(self, record: VolumeRecord, adopting: str = "") -> None:
        """Make a volume; one that is to get its operational image by ``adopting`` another has none yet."""
        plain_name(record.name)
        if record.size_bytes <= 0 or record.size_bytes % BLOCK_BYTES:
            raise LayoutUnsupported(f"{record.size_bytes} bytes are no whole number of blocks", fix=f"Use a multiple of {BLOCK_BYTES}.")
        if record.sector_bytes not in {512, 4096}:
            raise LayoutUnsupported(f"sectors of {record.sector_bytes} bytes", fix="Use sectors of 512 or 4096 bytes.")
        if any(held.id == record.id or held.name == record.name for held in self.volumes()):
            raise VolumeExists(f"volume {record.name} ({record.id}) exists")
        self.pool.need_room(0, f"volume {record.name}")
        new = self.pool.volumes / f"{files.TEMPORARY_PREFIX}{record.id}-{secrets.token_hex(4)}"
        failpoint("substrate.create.before")
        with said_plainly(f"making volume {record.name}"), images.removed_on_failure(new):
            for folder in (new, new / "generations", new / "workspaces"):
                folder.mkdir(mode=0o700)
            empty = GenerationFacts(empty_generation(record.id), GenerationKind.EMPTY, 0)
            image = new / "generations" / f"{empty.id.name}.img"
            images.make_sparse(image, record.size_bytes)
            write_record(image.with_suffix(".json"), empty, image_mtime_ns=image.stat().st_mtime_ns)
            if adopting:
                files.write_durably(new / _ADOPTED, os.fsencode(adopting))
            elif record.role is Role.PRIMARY:
                images.make_sparse(new / "operational.img", record.size_bytes)
            write_record(new / "volume.json", record)
            files.sync_directory(new)
            failpoint("substrate.create.before_rename")
            try:
                files.rename_durably(new, self._folder(record.id))
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                    raise VolumeExists(f"volume {record.name} ({record.id}) exists") from error
                raise
        failpoint("substrate.create.after")

    @contextmanager
    def foreign(self, source: str) -> Iterator[Foreign]:
        """Give an image file of the pool's filesystem that nobody has open or attached. See ``substrate.Substrate.foreign``."""
        image = Path(source)
        if not image.is_absolute() or self.pool.volumes in image.resolve().parents:
            raise NotOurs(f"{source} is no image file outside of the pool's own folders", fix="Name it by its absolute path on this node.")
        try:
            image_fd = open_image(image)
        except FileNotFoundError as error:
            raise NotOurs(f"there is no file {source} on this node") from error
        with os.fdopen(image_fd, "rb"):
            images.refuse_foreign(image_fd, image, self.pool)
            with attach(image) as device:
                yield Foreign(device, os.fstat(image_fd).st_size, 512)

    def adopt(self, record: VolumeRecord, source: str) -> None:
        """Make a volume of which an image file is the operational image: it is moved into the pool. See ``substrate.Substrate.adopt``."""
        known = next((held for held in self.volumes() if held.id == record.id), None)
        image, operational = Path(source), self._folder(record.id) / "operational.img"
        if known is not None and known != record:
            raise VolumeExists(f"volume {record.name} ({record.id}) exists, and is another")
        if operational.exists():
            adopted = self._folder(record.id) / _ADOPTED
            if image.exists() or not adopted.exists() or adopted.read_bytes() != os.fsencode(source):
                raise VolumeExists(f"volume {record.name} has an operational image already")
            return
        failpoint("substrate.adopt.before")
        if known is None:
            self._create(record, source)
        failpoint("substrate.adopt.half")
        with said_plainly(f"adopting {source}"), images.opened(image) as image_fd:
            lock(image_fd, image, exclusive=True)
            images.refuse_foreign(image_fd, image, self.pool)
            images.refuse_size(image_fd, record, image)
            os.fchown(image_fd, 0, 0)
            os.fchmod(image_fd, 0o600)
            os.fsync(image_fd)
            files.rename_durably(image, operational)
        failpoint("substrate.adopt.after")

    def remove(self, volume: UUID) -> None:
        """Destroy a volume with all it has; DeviceBusy while any image of it is in use. If we die here ``recover`` ends it."""
        self._record(volume)
        folder = self._folder(volume)
        held: list[int] = []
        try:
            for image in (*folder.glob("*.img"), *folder.glob("*/*.img")):
                held.append(open_image(image))
                lock(held[-1], image, exclusive=True)
            failpoint("substrate.remove.before")
            gone = folder.with_name(f"{files.TEMPORARY_PREFIX}{volume}-{secrets.token_hex(4)}")
            with said_plainly(f"removing volume {volume}"):
                files.rename_durably(folder, gone)
                failpoint("substrate.remove.renamed")
                shutil.rmtree(gone)
            failpoint("substrate.remove.after")
        finally:
            for image_fd in held:
                os.close(image_fd)

    def refuse_growth(self, volume: UUID, size_bytes: int) -> None:
        """LayoutUnsupported for less than the volume has, or for part of a block."""
        record = self._record(volume)
        if size_bytes < record.size_bytes or size_bytes % BLOCK_BYTES:
            raise LayoutUnsupported(
                f"volume {record.name} cannot have {size_bytes} bytes: it has {record.size_bytes}, in blocks of {BLOCK_BYTES}",
                fix=f"Name more than it has, and a multiple of {BLOCK_BYTES}.",
            )

    def grow(self, volume: UUID, size_bytes: int) -> None:
        """Let every image of a volume be larger, by a hole at its end, and the volume with them. LayoutUnsupported for less.

        What is to be done is written down first, so if we die here ``recover`` does it. An image that has neither the old nor the new
        size is left as it is. No generation's time of modification changes: it tells whether somebody wrote to it.
        """
        self.refuse_growth(volume, size_bytes)
        with said_plainly(f"growing volume {self._record(volume).name}"):
            files.write_durably(self._folder(volume) / _GROWING, str(size_bytes).encode())
            failpoint("substrate.grow.before")
            self._finish_growing(self._folder(volume))
            failpoint("substrate.grow.after")
            for mount in self._mounts_of(self._folder(volume) / "operational.img"):
                device_fd = os.open(mount.source, os.O_RDWR | os.O_CLOEXEC)
                try:
                    block.follow_loop(device_fd)
                finally:
                    os.close(device_fd)

    def set_role(self, volume: UUID, role: Role, epoch: int) -> None:
        """Record the role and epoch durably."""
        write_record(self._folder(volume) / "volume.json", replace(self._record(volume), role=role, epoch=epoch))

    # --- generations ---

    def generations(self, volume: UUID) -> tuple[GenerationFacts, ...]:
        """Return the generations that have both image and record, if it can be read, oldest first, g0 included."""
        self._record(volume)
        folder = self._folder(volume) / "generations"
        found = _readable((image.with_suffix(".json") for image in self._whole(folder)), GenerationFacts)
        return tuple(sorted(found, key=lambda facts: (facts.id.epoch, facts.id.counter, facts.id.nonce)))

    def take(self, volume: UUID, mount_point: Path | None, facts: GenerationFacts) -> float:
        """Take one generation."""
        return self.take_together((Take(volume, mount_point, facts),))

    def take_together(self, takes: Sequence[Take]) -> float:
        """Make the state of operational volumes at one moment generations; return the freeze in milliseconds.

        A volume without a mount point must not be in use (DeviceBusy). NotOurs if something else is mounted there. If we die here the
        guards thaw, and a clone that has no record yet is swept.
        """
        mounted = [take.mount_point for take in takes if take.mount_point is not None]
        with said_plainly(f"taking generation {', '.join(take.facts.id.name for take in takes)}"), ExitStack() as clones:
            begun = [clones.enter_context(self._taking(take)) for take in takes]
            if mounted:
                failpoint("substrate.take.before_freeze")
            with frozen(*mounted) as freeze:
                if mounted:
                    failpoint("substrate.take.frozen")
                for catch_up_now in begun:
                    catch_up_now()
            if mounted:
                failpoint("substrate.take.after_thaw")
        failpoint("substrate.take.after")
        return freeze.milliseconds

    @contextmanager
    def _taking(self, take: Take) -> Iterator[Callable[[], object]]:
        """Give what completes a clone of an operational image, to be called while that is held still; at the end it is a generation."""
        record, facts = self._record(take.volume), take.facts
        self._refuse_taken(facts)
        operational, image = self._folder(take.volume) / "operational.img", self._image(facts.id)
        self.pool.need_room(0, f"generation {facts.id.name}")
        new = image.with_name(f"{files.TEMPORARY_PREFIX}{image.name}")
        with images.removed_on_failure(new, image.with_suffix(".json")):
            with images.opened(self._operational_image(take.volume)) as source, images.made(new) as clone:
                if take.mount_point is None:
                    lock(source, operational, exclusive=True)
                    os.fsync(source)
                    yield partial(block.clone, source, clone)
                else:
                    images.refuse_other_mount(take.mount_point, operational)
                    sync_mounted(take.mount_point)
                    with images.opened(self._image(self.generations(take.volume)[-1].id)) as newest:
                        cloned = clone_ahead(source, clone, newest)
                    yield partial(catch_up, source, clone, cloned)
                images.refuse_size(clone, record, new)
                os.fsync(clone)
            failpoint("substrate.take.before_record")
            write_record(image.with_suffix(".json"), facts, image_mtime_ns=new.stat().st_mtime_ns)
            failpoint("substrate.take.before_rename")
            files.rename_durably(new, image)

    def drop(self, generation: GenerationId) -> None:
        """Give up a generation; NoSuchGeneration if it is not held, DeviceBusy while it is read. g0 stays."""
        image = self._held(generation)
        if generation == empty_generation(generation.volume):
            raise RequestRefused("g0 is the beginning of every volume and takes no room; it is not dropped")
        with said_plainly(f"dropping generation {generation.name}"), images.opened(image) as image_fd:
            lock(image_fd, image, exclusive=True)
            failpoint("substrate.drop.before")
            files.remove_durably(image.with_suffix(".json"))
            failpoint("substrate.drop.half")
            files.remove_durably(image)
        failpoint("substrate.drop.after")

    def changed(self, base: GenerationId, target: GenerationId) -> ChangedRuns:
        """Return the runs that differ, with the pre-images' addresses on ``differential``. BaseMismatch for two volumes.

        The addresses hold for as long as the base is held and the pool is not balanced or defragmented.
        """
        if base.volume != target.volume:
            raise BaseMismatch(f"{base.name} and {target.name} are of different volumes")
        with images.opened(self._held(base)) as base_fd, images.opened(self._held(target)) as target_fd:
            record = self._record(base.volume)
            images.refuse_size(base_fd, record, self._image(base))
            images.refuse_size(target_fd, record, self._image(target))
            runs = extents.changed_runs(block.extent_map(base_fd), block.extent_map(target_fd))
            if self.pool.kind == "btrfs":
                runs = extents.on_device(runs, block.btrfs_chunks(base_fd))
            return runs

    def reading(self, generation: GenerationId) -> AbstractContextManager[Path]:
        """Attach a generation read-only for as long as the context lasts, or a mount of it."""
        return self._attached(self._held(generation), generation.volume, writable=False)

    def refuse_written(self, generation: GenerationId) -> None:
        """BaseMismatch if the image was written to, or exchanged, since it became this generation: its time of modification tells.

        What changes below the filesystem (a disk that forgets) is not seen here; the digests of pieces and files see it.
        """
        image = self._held(generation)
        with said_plainly(f"looking at {image.name}"):
            was_ns, is_ns = image_mtime_ns(image.with_suffix(".json")), image.stat().st_mtime_ns
        if was_ns is not None and was_ns != is_ns:
            raise BaseMismatch(
                f"somebody wrote to generation {generation.name} after it was complete, or put another file in its place",
                cause=f"{image} was modified at {is_ns} ns, and should not have been since {was_ns} ns",
                fix="Drop it here and replicate from an older generation that both nodes hold, or in full. "
                "If you vouch for its content, give the image that time back (`touch -d @SECONDS.NANOSECONDS`).",
            )

    # --- the operational volume ---

    def operational(self, volume: UUID) -> AbstractContextManager[Path]:
        """Attach the operational image read-write, exclusively, for as long as the context lasts, or a mount of it. DeviceBusy."""
        return self._attached(self._operational_image(volume), volume, writable=True)

    def clone_operational(self, volume: UUID, generation: GenerationId) -> None:
        """Make the operational image a clone of ``generation`` in one step; DeviceBusy if the old one is in use."""
        if generation.volume != volume:
            raise BaseMismatch(f"{generation.name} is of another volume")
        self._clone(self._held(generation), self._folder(volume) / "operational.img", self._record(volume), "operational")

    # --- workspaces ---

    def begin(self, workspace: Workspace, base: GenerationId, room_bytes: int | None = None) -> None:
        """Clone ``base`` as a workspace, replacing one of the same name (DeviceBusy if that is in use).

        NoSpace leaves everything as it was. If we die here the old one stands, or the new one.
        """
        if base.volume != workspace.volume:
            raise BaseMismatch(f"{base.name} is of another volume")
        self._clone(self._held(base), self._workspace(workspace), self._record(base.volume), "begin")

    def branch(self, workspace: Workspace, source: Workspace) -> None:
        """Clone one workspace as another, replacing one of that name (DeviceBusy if that, or ``source``, is in use). NoSpace.

        If we die here the old one stands, or the new one.
        """
        image = self._existing(source)
        with said_plainly(f"cloning {image.name}"), images.opened(image) as image_fd:
            lock(image_fd, image, exclusive=True)
            self._clone(image, self._workspace(workspace), self._record(workspace.volume), "begin")

    def exists(self, workspace: Workspace) -> bool:
        """Whether the workspace is there, whole."""
        return self._workspace(workspace).is_file()

    def workspaces(self, volume: UUID) -> tuple[Workspace, ...]:
        """Return every workspace of a volume."""
        self._record(volume)
        found = []
        for image in sorted((self._folder(volume) / "workspaces").glob("[!.]*.img")):
            transfer, _, kind = image.stem.rpartition(".")
            with suppress(ValueError):
                found.append(Workspace(volume, UUID(transfer), WorkspaceKind(kind)))
        return tuple(found)

    def writing(self, workspace: Workspace) -> AbstractContextManager[Path]:
        """Attach a workspace read-write, exclusively; DeviceBusy if somebody else has it, NoSuchTransfer if it is not there."""
        return self._attached(self._existing(workspace), workspace.volume, writable=True)

    def commit(self, workspace: Workspace, facts: GenerationFacts) -> None:
        """Make the workspace a generation by one rename. DeviceBusy while it is attached or mounted.

        If we die before the rename it is a workspace still and its record without image is swept; after it, it is the generation.
        """
        source, image = self._existing(workspace), self._image(facts.id)
        if facts.id.volume != workspace.volume:
            raise BaseMismatch(f"{facts.id.name} is of another volume")
        self._refuse_taken(facts)
        with said_plainly(f"committing generation {facts.id.name}"), images.opened(source) as image_fd:
            lock(image_fd, source, exclusive=True)
            images.refuse_size(image_fd, self._record(workspace.volume), source)
            os.fsync(image_fd)
            write_record(image.with_suffix(".json"), facts, image_mtime_ns=os.fstat(image_fd).st_mtime_ns)
            failpoint("substrate.commit.before_rename")
            files.rename_durably(source, image)
        failpoint("substrate.commit.after_rename")

    def replace(self, workspace: Workspace, generation: GenerationId) -> None:
        """Let a healed workspace take the place of ``generation`` by one rename. DeviceBusy while the workspace is attached.

        Who reads the old image meanwhile goes on reading the old one. If we die here the generation is the old or the healed one.
        """
        source, image = self._existing(workspace), self._held(generation)
        if generation.volume != workspace.volume:
            raise BaseMismatch(f"{generation.name} is of another volume")
        with said_plainly(f"replacing generation {generation.name}"), images.opened(source) as image_fd:
            lock(image_fd, source, exclusive=True)
            images.refuse_size(image_fd, self._record(workspace.volume), source)
            if (mtime_ns := image_mtime_ns(image.with_suffix(".json"))) is not None:
                os.utime(image_fd, ns=(mtime_ns, mtime_ns))  # the record stays as it is: one rename is one step
            os.fsync(image_fd)
            failpoint("substrate.replace.before")
            files.rename_durably(source, image)
        failpoint("substrate.replace.after")

    def discard(self, workspace: Workspace) -> None:
        """Remove a workspace if it is there; DeviceBusy while it is in use."""
        image = self._workspace(workspace)
        if not self.exists(workspace):
            return
        with said_plainly(f"discarding {image.name}"), images.opened(image) as image_fd:
            lock(image_fd, image, exclusive=True)
            failpoint("substrate.discard.before")
            files.remove_durably(image)
        failpoint("substrate.discard.after")

    # --- after a crash ---

    def recover(self) -> None:
        """Thaw what is frozen of ours, sweep what a crash left half made. Idempotent; nothing else of this pool may be at work."""
        for folder in self.pool.volumes.glob("[!.]*"):
            self._thaw(folder / "operational.img")
        with said_plainly("sweeping the pool"):
            files.sweep(self.pool.path)
            for left in self.pool.volumes.glob(f"{files.TEMPORARY_PREFIX}*"):
                shutil.rmtree(left)
            for folder in self.pool.volumes.glob("[!.]*"):
                for inner in (folder, folder / "generations", folder / "workspaces"):
                    files.sweep(inner)
                whole = {path.stem for path in self._whole(folder / "generations")}
                for path in (folder / "generations").iterdir():
                    if path.suffix in {".img", ".json"} and path.stem not in whole:
                        path.unlink()
                files.sync_directory(folder / "generations")
                with suppress(LandfallError):  # a record that cannot be read
                    self._finish_growing(folder)

    # --- steps ---

    def _folder(self, volume: UUID) -> Path:
        return self.pool.volumes / str(volume)

    def _record(self, volume: UUID) -> VolumeRecord:
        try:
            record = read_record(self._folder(volume) / "volume.json", VolumeRecord)
        except FileNotFoundError as error:
            raise NoSuchVolume(f"no volume {volume} here") from error
        if record.id != volume:
            raise NotOurs(f"the folder of volume {volume} holds the record of {record.id}")
        return record

    def _image(self, generation: GenerationId) -> Path:
        return self._folder(generation.volume) / "generations" / f"{generation.name}.img"

    def _workspace(self, workspace: Workspace) -> Path:
        return self._folder(workspace.volume) / "workspaces" / f"{workspace.transfer}.{workspace.kind}.img"

    def _existing(self, workspace: Workspace) -> Path:
        self._record(workspace.volume)
        if not self.exists(workspace):
            raise NoSuchTransfer(f"there is no {workspace.kind} volume of transfer {workspace.transfer}")
        return self._workspace(workspace)

    def _operational_image(self, volume: UUID) -> Path:
        self._record(volume)
        image = self._folder(volume) / "operational.img"
        if not image.is_file():
            raise NoSuchVolume(f"volume {volume} has no operational image here", fix="Serve it first, or ask the node that does.")
        return image

    def _held(self, generation: GenerationId) -> Path:
        """Return the image of a generation that agrees in all four fields."""
        if not any(facts.id == generation for facts in self.generations(generation.volume)):
            raise NoSuchGeneration(f"generation {generation.name} of volume {generation.volume} is not held here")
        return self._image(generation)

    @staticmethod
    def _whole(folder: Path) -> list[Path]:
        return [image for image in folder.glob("g*.img") if image.with_suffix(".json").is_file()]

    def _refuse_taken(self, facts: GenerationFacts) -> None:
        if any(held.id.name == facts.id.name for held in self.generations(facts.id.volume)):
            raise RequestRefused(f"generation {facts.id.name} is here already")

    @contextmanager
    def _attached(self, image: Path, volume: UUID, *, writable: bool) -> Iterator[Path]:
        record = self._record(volume)
        with said_plainly(f"attaching {image.name}"), images.opened(image) as image_fd:
            images.refuse_size(image_fd, record, image)
        with attach(image, writable=writable, sector_bytes=record.sector_bytes) as device:
            yield device

    def _clone(self, source: Path, destination: Path, record: VolumeRecord, step: str) -> None:
        """Clone an image under another name in one durable step, replacing what has that name and is not in use."""
        self.pool.need_room(0, destination.name)
        new = destination.with_name(f"{files.TEMPORARY_PREFIX}{destination.name}")
        with said_plainly(f"cloning {source.name}"), images.removed_on_failure(new), images.locked_if_there(destination):
            failpoint(f"substrate.{step}.before")
            with images.opened(source) as source_fd, images.made(new) as clone_fd:
                images.refuse_size(source_fd, record, source)
                os.fsync(source_fd)
                block.clone(source_fd, clone_fd)
                os.fsync(clone_fd)
            failpoint(f"substrate.{step}.before_rename")
            files.rename_durably(new, destination)
        failpoint(f"substrate.{step}.after")

    def _finish_growing(self, folder: Path) -> None:
        """Do what was written down by ``grow``; nothing if nothing was."""
        try:
            size_bytes = int((folder / _GROWING).read_bytes())
        except FileNotFoundError:
            return
        record = read_record(folder / "volume.json", VolumeRecord)
        for image in (*folder.glob("*.img"), *folder.glob("*/*.img")):
            image_fd = open_image(image, writable=True)
            try:
                about = os.fstat(image_fd)
                if about.st_size == record.size_bytes:
                    os.truncate(image_fd, size_bytes)
                    os.utime(image_fd, ns=(about.st_atime_ns, about.st_mtime_ns))
                    os.fsync(image_fd)
            finally:
                os.close(image_fd)
        failpoint("substrate.grow.half")
        write_record(folder / "volume.json", replace(record, size_bytes=size_bytes))
        files.remove_durably(folder / _GROWING)

    def _thaw(self, operational: Path) -> None:
        """Thaw every mount of an operational image that a dead freezer left frozen."""
        for mount in self._mounts_of(operational):
            thaw_if_frozen(mount.mount_point)

    @staticmethod
    def _mounts_of(operational: Path) -> list[Mount]:
        if not operational.exists():
            return []
        loops = (mount for mount in mounts() if mount.source.startswith("/dev/loop") and Path(mount.source).exists())
        return [mount for mount in loops if backs(Path(mount.source), operational)]


def _readable(paths: Iterable[Path], kind: type[T]) -> list[T]:
    found = []
    for path in paths:
        with suppress(LandfallError, OSError):  # told by `unreadable`; one that cannot be read must not hide the others
            found.append(read_record(path, kind))
    return found


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None
