"""A logical volume that is there becomes an operational volume: by tags alone, and never half."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.contract.errors import DeviceBusy, LandfallError, LayoutUnsupported, NoSuchVolume, NotOurs, VolumeExists
from agent.contract.identity import FilesystemKind, empty_generation
from agent.system.clock import wait_until
from agent.system.run import run
from agent.volume import filesystem, lvm, mapper
from agent.volume.lvm_snapshot import WAITING_TAG, LvmSnapshotSubstrate
from agent.volume.lvm_substrate import LvmSubstrate
from agent.volume.lvm_thin import LvmThinSubstrate
from agent.volume.substrate import VolumeRecord
from tests.storage.conformance import Bench, Call, blocks_of, content, facts_after, in_child, read, record, taken, write
from tests.storage.volume_groups import volume_group

pytestmark = pytest.mark.device_mapper

SIZE_BYTES = 64 << 20
KEPT = b"kept" * 1024
KINDS = [LvmThinSubstrate, LvmSnapshotSubstrate]


@dataclass(frozen=True)
class Scene:
    """A group with its substrate, beside what was made by others."""

    group: str
    kind: type[LvmThinSubstrate | LvmSnapshotSubstrate]

    def open(self) -> LvmThinSubstrate | LvmSnapshotSubstrate:
        return self.kind(self.group)

    @property
    def bench(self) -> Bench:
        module, name = self.kind.__module__, self.kind.__name__
        return Bench(self.open, f"from {module} import *; substrate = {name}({self.group!r})")

    def device(self, name: str) -> Path:
        """LVM's own device of a logical volume."""
        found = lvm.group(self.group)
        volume = next(volume for volume in lvm.volumes(found) if volume.name == name)
        device = mapper.by_identity(lvm.dm_uuid(found, volume.uuid))
        assert device is not None
        return device

    def existing(self, name: str = "existing") -> str:
        """Make a logical volume as an administrator does, with a filesystem and something after its superblock."""
        of = lvm.group(self.group)
        if self.kind is LvmThinSubstrate:
            pool = next(volume.name for volume in lvm.volumes(of) if volume.kind == "thin-pool")
            shape = ["--virtualsize", f"{SIZE_BYTES}b", "--thinpool", pool, self.group]
        else:
            shape = ["--size", f"{SIZE_BYTES}b", self.group]
        lvm.create(of, ["--wipesignatures", "n", *shape], name, [WAITING_TAG] if self.kind is LvmSnapshotSubstrate else [])
        run(["mkfs.ext4", "-q", "-b", "4096", str(self.device(name))])
        write(self.device(name), SIZE_BYTES // 4096 - 1, KEPT)
        return name


@pytest.fixture(params=KINDS, ids=["thin", "snapshot"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr(mapper, "_GRACE_S", 1.0)
    with volume_group(tmp_path, size_bytes=512 << 20) as name:
        if request.param is LvmThinSubstrate:
            LvmThinSubstrate.initialise(name)
        yield Scene(name, request.param)
        assert wait_until(lambda: not mapper._devices("LANDFALL-"), 5.0)


def of(size_bytes: int = SIZE_BYTES) -> VolumeRecord:
    return record(size_bytes=size_bytes)


def kept_of(substrate: LvmSubstrate, volume: VolumeRecord) -> bytes:
    with substrate.operational(volume.id) as device:
        return read(device, SIZE_BYTES // 4096 - 1)


def test_what_was_there_is_the_operational_volume_and_its_generations_have_it(scene: Scene) -> None:
    source, substrate, volume = scene.existing(), scene.open(), of()
    with substrate.foreign(source) as found:
        assert (found.size_bytes, found.sector_bytes) == (SIZE_BYTES, 512)
        filesystem.refuse_unsupported(found.device, FilesystemKind.EXT4)
        filesystem.refuse_unclean(found.device, FilesystemKind.EXT4)
        with pytest.raises(OSError, match="permitted"), open(found.device, "r+b", buffering=0) as file:
            file.write(b"x")
    assert substrate.volumes() == ()
    for name in (source, f"{scene.group}/{source}", f"/dev/{scene.group}/{source}"):
        substrate.adopt(volume, name)
        substrate.recover()
        assert substrate.volumes() == (volume,)
        assert kept_of(substrate, volume) == KEPT
    first = facts_after(substrate, volume.id)
    substrate.take(volume.id, None, first)
    second = taken(substrate, volume.id, {3: b"x" * 4096})
    assert content(substrate, first.id)[-4096:] == content(substrate, second.id)[-4096:] == KEPT
    assert blocks_of(substrate.changed(first.id, second.id)) == {3}
    assert len(substrate.changed(empty_generation(volume.id), first.id).first)
    with pytest.raises(VolumeExists):
        substrate.adopt(of(), source)
    substrate.remove(volume.id)


def test_what_cannot_be_adopted_is_refused_and_left_as_it_was(scene: Scene, tmp_path: Path) -> None:
    source, substrate = scene.existing(), scene.open()

    def refused(error: type[LandfallError], match: str, name: str = source) -> None:
        with pytest.raises(error, match=match), substrate.foreign(name):
            pass
        with pytest.raises(error, match=match):
            substrate.adopt(of(), name)

    mount_point = tmp_path / "mounted"
    mount_point.mkdir()
    run(["mount", str(scene.device(source)), str(mount_point)])
    refused(DeviceBusy, "mounted or open")
    run(["umount", str(mount_point)])
    refused(NotOurs, "no logical volume", "nothing")
    refused(NotOurs, "no logical volume of", f"other/{source}")
    refused(NotOurs, "no logical volume of", "/srv/image")
    group = lvm.group(scene.group)
    if scene.kind is LvmThinSubstrate:
        refused(VolumeExists, "Landfall's already", next(found.name for found in lvm.volumes(group) if found.kind == "thin-pool"))
    else:
        lvm.create(group, ["--snapshot", "--size", "8m", f"{scene.group}/{source}"], "snap", [WAITING_TAG])
        refused(LayoutUnsupported, "without snapshots")
        refused(LayoutUnsupported, "without snapshots", "snap")
        lvm.remove(group, next(found for found in lvm.volumes(group) if found.name == "snap"))
    lvm.change(group, source, "--permission", "r")
    refused(LayoutUnsupported, "read-only")
    lvm.change(group, source, "--permission", "rw")
    assert substrate.volumes() == ()
    assert read(scene.device(source), SIZE_BYTES // 4096 - 1) == KEPT
    volume = of()
    substrate.adopt(volume, source)
    refused(VolumeExists, "Landfall's already")
    scene.existing("second")
    with pytest.raises(VolumeExists):
        substrate.adopt(volume, "second")
    substrate.remove(volume.id)


@pytest.mark.parametrize("point", ["substrate.adopt.before", "substrate.adopt.half", "substrate.adopt.after"])
def test_A11_a_death_while_it_is_adopted_loses_nothing(scene: Scene, point: str) -> None:
    source, volume = scene.existing(), of()
    assert in_child(scene.bench, Call("adopt", (volume, source)), f"{point}=kill") == -9
    survivor = scene.open()
    for _ in range(2):
        survivor.recover()
    assert (survivor.volumes() == ()) is (point == "substrate.adopt.before")
    if point == "substrate.adopt.half":
        with pytest.raises(NoSuchVolume):
            survivor.take(volume.id, None, facts_after(survivor, volume.id))
    survivor.adopt(volume, source)
    assert kept_of(survivor, volume) == KEPT
    survivor.take(volume.id, None, facts_after(survivor, volume.id))
    survivor.remove(volume.id)


def test_a_volume_that_waits_for_its_adoption_does_not_keep_the_agent_from_starting(scene: Scene) -> None:
    scene.existing()
    scene.open().recover()
    if scene.kind is LvmSnapshotSubstrate:
        group = lvm.group(scene.group)
        lvm.retag(group, lvm.volumes(group)[0], drop=[WAITING_TAG])
        with pytest.raises(NotOurs, match="did not make") as refusal:
            scene.open()
        assert WAITING_TAG in refusal.value.fix_now
