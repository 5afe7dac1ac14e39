"""Thin volumes in particular: whose group it is, how full the pool may be, freezing what is mounted, what a crash leaves reserved."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from agent.contract.errors import BaseMismatch, FailpointHit, LayoutUnsupported, NoSpace, NotOurs, ProgramMissing
from agent.contract.identity import BLOCK_BYTES, GenerationId, GenerationKind, empty_generation
from agent.contract.messages import Role
from agent.system.clock import wait_until
from agent.volume import filesystem, lvm, mapper
from agent.volume.lvm_thin import Limits, LvmThinSubstrate
from agent.volume.substrate import Workspace, WorkspaceKind
from tests.storage.conformance import BLOCKS, Bench, Call, block_of, blocks_of, facts_after, in_child, read, record, taken, write
from tests.storage.volume_groups import command, volume_group

pytestmark = pytest.mark.device_mapper

POOL_BYTES = 160 << 20


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("disk"), size_bytes=POOL_BYTES) as name:
        LvmThinSubstrate.initialise(name)
        yield name


@pytest.fixture
def substrate(group: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[LvmThinSubstrate]:
    monkeypatch.setattr(mapper, "_GRACE_S", 1.0)
    opened = LvmThinSubstrate.initialise(group)
    yield opened
    opened.recover()
    assert wait_until(lambda: not mapper._devices("LANDFALL-"), 30.0)
    for held in opened.volumes():
        opened.remove(held.id)


def test_a_group_without_the_tag_is_not_touched(tmp_path: Path) -> None:
    with volume_group(tmp_path, tag=None, size_bytes=64 << 20) as stranger:
        for opening in (LvmThinSubstrate, LvmThinSubstrate.initialise):
            with pytest.raises(NotOurs):
                opening(stranger)
        found = subprocess.run(["lvs", "--noheadings", stranger], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == ""


def test_a_group_that_is_not_there_is_refused() -> None:
    with pytest.raises(NotOurs):
        LvmThinSubstrate("landfall-not-there")


def test_without_lvm2_the_package_is_named(substrate: LvmThinSubstrate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as without:
        without.setenv("PATH", str(tmp_path))
        with pytest.raises(ProgramMissing, match="lvm2"):
            LvmThinSubstrate(substrate.group.name)


def test_the_pool_errors_when_it_is_full_instead_of_waiting(substrate: LvmThinSubstrate) -> None:
    table = subprocess.run(["dmsetup", "table", substrate._pool()], capture_output=True, text=True, check=True).stdout
    assert "error_if_no_space" in table


def test_B12_tags_that_cannot_be_read_hide_nothing_and_nothing_of_theirs_is_swept(substrate: LvmThinSubstrate) -> None:
    volume, other = record(), record()
    for made in (volume, other):
        substrate.create(made)
        taken(substrate, made.id, {1: block_of(made.name)})
    before = len(lvm.volumes(substrate.group))
    g0 = substrate._held().record_of(volume.id)
    (tag,) = (tag for tag in g0.tags if tag.startswith("landfall/volume/"))
    lvm.retag(substrate.group, g0, drop=[tag], add=[tag.replace("/1/", "/9/", 1)])
    substrate.recover()
    assert substrate.volumes() == (other,)
    assert [found.where for found in substrate.unreadable()] == [f"{substrate.group.name}/{g0.name}"]
    assert len(lvm.volumes(substrate.group)) == before
    lvm.retag(substrate.group, g0, drop=[tag.replace("/1/", "/9/", 1)], add=[tag])
    assert len(substrate.generations(volume.id)) == 2


def test_E20_a_volume_grows_by_zeros_while_it_is_used(substrate: LvmThinSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    base = taken(substrate, volume.id, {1: block_of("base")}).id
    size = volume.size_bytes + 2 * substrate.group.extent_bytes
    with substrate.operational(volume.id) as device:
        substrate.grow(volume.id, size)
        write(device, size // BLOCK_BYTES - 1, block_of("at the new end"))
    assert [held.size_bytes for held in substrate.volumes()] == [size]
    substrate.grow(volume.id, size)
    target = facts_after(substrate, volume.id)
    substrate.take(volume.id, None, target)
    assert size // BLOCK_BYTES - 1 in blocks_of(substrate.changed(base, target.id))
    with substrate.reading(base) as device:
        assert read(device, size // BLOCK_BYTES - 1) == bytes(BLOCK_BYTES)
    for wrong in (volume.size_bytes, size + BLOCK_BYTES):
        with pytest.raises(LayoutUnsupported):
            substrate.grow(volume.id, wrong)


def test_E6_E7_nothing_is_begun_above_a_limit(substrate: LvmThinSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    base = taken(substrate, volume.id, {1: block_of("a")}).id
    for limits in (Limits(data_percent=0.01), Limits(metadata_percent=0.01)):
        strict = LvmThinSubstrate(substrate.group.name, limits=limits)
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        with pytest.raises(NoSpace):
            strict.begin(workspace, base)
        with pytest.raises(NoSpace):
            strict.take(volume.id, None, facts_after(strict, volume.id))
        with pytest.raises(NoSpace):
            strict.create(record())
        assert not strict.exists(workspace)
        assert len(strict.generations(volume.id)) == 2


def test_E6_a_full_pool_fails_the_writer_and_harms_no_generation(substrate: LvmThinSubstrate) -> None:
    volume = record(Role.SECONDARY, size_bytes=256 << 20)
    substrate.create(volume)
    workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
    substrate.begin(workspace, empty_generation(volume.id))
    with substrate.writing(workspace) as device, open(device, "r+b", buffering=0) as file:
        write(device, 0, block_of("first"))
        with pytest.raises(OSError, match=r"No space|Input/output"):
            _fill(file.fileno(), 256 << 20)
    with pytest.raises(NoSpace):
        substrate.begin(Workspace(volume.id, uuid4(), WorkspaceKind.LANDING), empty_generation(volume.id))
    substrate.discard(workspace)
    assert substrate.free_bytes() > 64 << 20
    assert len(substrate.generations(volume.id)) == 1


def test_E7_a_pool_whose_metadata_is_full_takes_nothing_until_it_has_more_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    with open(tmp_path / "more" / "disk", "wb") as file:
        file.truncate(64 << 20)
    more = command("losetup", "--find", "--show", str(tmp_path / "more" / "disk")).strip()
    try:
        with volume_group(tmp_path, size_bytes=POOL_BYTES) as name:
            substrate = LvmThinSubstrate.initialise(name)
            volume = record()
            substrate.create(volume)
            base = taken(substrate, volume.id, {1: block_of("base")}).id
            with substrate.operational(volume.id) as device:
                write(device, 1, block_of("acknowledged"))
                _fill_metadata(substrate)
                with pytest.raises(OSError, match="Input/output"):
                    write(device, BLOCKS - 1, block_of("not acknowledged"))
            status = mapper.pool_status(substrate._pool())
            assert status.metadata_is_full
            assert not status.takes_writes
            with pytest.raises(NoSpace, match="metadata"):
                substrate.take(volume.id, None, facts_after(substrate, volume.id))
            with pytest.raises(NoSpace, match="metadata"), substrate.operational(volume.id):
                pass
            assert _blocks(substrate, base) == block_of("base")
            command("vgextend", name, more)
            command("lvextend", "--poolmetadatasize", "+8m", f"{name}/{substrate.pool_volume.name}")
            opened = LvmThinSubstrate(name)
            opened.recover()
            with opened.operational(volume.id) as device:
                assert read(device, 1, 1) == block_of("acknowledged")
                assert read(device, BLOCKS - 1, 1) == bytes(BLOCK_BYTES)
                write(device, BLOCKS - 1, block_of("later"))
            target = facts_after(opened, volume.id)
            opened.take(volume.id, None, target)
            assert blocks_of(opened.changed(base, target.id)) == {1, BLOCKS - 1}
            assert _blocks(opened, base) == block_of("base")
    finally:
        command("losetup", "--detach", more)


def _blocks(substrate: LvmThinSubstrate, generation: GenerationId) -> bytes:
    with substrate.reading(generation) as device:
        return read(device, 1, 1)


def _fill_metadata(substrate: LvmThinSubstrate) -> None:
    """Make empty thin volumes that nobody knows until the pool refuses more; each takes a block of its metadata."""
    pool = Path("/sys/class/block", substrate._pool().name, "dm", "name").read_text().strip()
    status = mapper.pool_status(substrate._pool())
    with open("/dev/mapper/control", "r+b", buffering=0) as control, suppress(OSError):
        for number in range(status.metadata_total + 1):
            _message(control.fileno(), pool, f"create_thin {0x800000 + number}")


def _message(control_fd: int, name: str, text: str) -> None:
    """Send a device a message (linux/dm-ioctl.h, DM_TARGET_MSG): a thousand runs of dmsetup would take minutes."""
    message = struct.pack("<Q", 0) + text.encode() + b"\0"
    head = struct.pack("<3I3IiIIIQ128s136s", 4, 0, 0, 312 + len(message), 312, 0, 0, 0, 0, 0, 0, name.encode(), b"")
    fcntl.ioctl(control_fd, 3 << 30 | 312 << 16 | 0xFD << 8 | 14, bytearray(head + message))


def _fill(device_fd: int, size_bytes: int) -> None:
    for at in range(1 << 20, size_bytes, 1 << 20):
        os.pwrite(device_fd, bytes([1]) * (1 << 20), at)
        os.fsync(device_fd)


def test_a_mounted_filesystem_is_frozen_for_the_snapshot(substrate: LvmThinSubstrate, tmp_path: Path) -> None:
    volume = record(size_bytes=32 << 20)
    substrate.create(volume)
    mount_point = tmp_path / "served"
    mount_point.mkdir()
    with substrate.operational(volume.id) as device:
        filesystem.make(device, volume.filesystem)
        filesystem.mount(device, mount_point, volume.filesystem, read_only=False)
    try:
        (mount_point / "file").write_bytes(b"content")
        facts = facts_after(substrate, volume.id)
        assert substrate.take(volume.id, mount_point, facts) > 0
        (mount_point / "file").write_bytes(b"later")
        with pytest.raises(NotOurs):
            substrate.take(volume.id, tmp_path, facts_after(substrate, volume.id))
    finally:
        filesystem.unmount(mount_point)
    with substrate.reading(facts.id) as device:
        filesystem.mount(device, mount_point, volume.filesystem, read_only=True)
        try:
            assert (mount_point / "file").read_bytes() == b"content"
        finally:
            filesystem.unmount(mount_point)


def test_a_metadata_snapshot_that_a_crash_left_is_released(substrate: LvmThinSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    base, target = (taken(substrate, volume.id, {n: block_of(f"{n}")}).id for n in (1, 2))
    name = substrate.group.name
    bench = Bench(lambda: LvmThinSubstrate(name), f"from agent.volume.lvm_thin import *; substrate = LvmThinSubstrate({name!r})")
    assert in_child(bench, Call("changed", (base, target)), "thin_map.reserved=kill") == -9
    assert mapper.pool_status(substrate._pool()).held
    assert blocks_of(substrate.changed(base, target)) == {2}
    assert not mapper.pool_status(substrate._pool()).held
    assert in_child(bench, Call("changed", (base, target)), "thin_map.reserved=kill") == -9
    substrate.recover()
    assert not mapper.pool_status(substrate._pool()).held


@pytest.mark.parametrize(("operation", "point"), [("take", "substrate.take.before_record"), ("create", "substrate.create.before_rename")])
def test_what_fails_half_way_leaves_nothing(
    substrate: LvmThinSubstrate, monkeypatch: pytest.MonkeyPatch, operation: str, point: str
) -> None:
    volume = record()
    substrate.create(volume)
    before = len(lvm.volumes(substrate.group))
    with monkeypatch.context() as armed:
        armed.setenv("LANDFALL_ALLOW_FAILPOINTS", "1")
        armed.setenv("LANDFALL_FAILPOINTS", ";".join(f"{point}=raise:{nth}" for nth in range(1, 9)))
        arguments = (volume.id, None, facts_after(substrate, volume.id)) if operation == "take" else (record(),)
        with pytest.raises(FailpointHit):
            getattr(substrate, operation)(*arguments)
    assert len(lvm.volumes(substrate.group)) == before


def test_A12_after_a_boot_the_pool_is_activated_and_all_is_there(substrate: LvmThinSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    facts = taken(substrate, volume.id, {5: block_of("kept")})
    pool = f"{substrate.group.name}/{substrate.pool_volume.name}"
    subprocess.run(["lvchange", "--activate", "n", pool], check=True, capture_output=True)
    assert mapper.by_identity(lvm.dm_uuid(substrate.group, substrate.pool_volume.uuid, "tpool")) is None
    booted = LvmThinSubstrate(substrate.group.name)
    booted.recover()
    assert booted.generations(volume.id)[-1] == facts
    with booted.reading(facts.id) as device:
        assert read(device, 5, 1) == block_of("kept")


def test_what_somebody_else_commits_is_seen(substrate: LvmThinSubstrate) -> None:
    volume = record()
    substrate.create(volume)
    held = taken(substrate, volume.id, {1: block_of("a")})
    substrate.refuse_written(held.id)
    subprocess.run(
        ["lvchange", "--permission", "rw", f"{substrate.group.name}/{substrate._held().generations[held.id].name}"],
        check=True,
        capture_output=True,
    )
    with pytest.raises(BaseMismatch):
        substrate.refuse_written(held.id)


def test_a_committed_generation_is_read_only_for_lvm_too(substrate: LvmThinSubstrate) -> None:
    volume = record(Role.SECONDARY)
    substrate.create(volume)
    workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
    substrate.begin(workspace, empty_generation(volume.id))
    with substrate.writing(workspace) as device:
        write(device, 7, block_of("landed"))
    facts = facts_after(substrate, volume.id, GenerationKind.COMMITTED)
    substrate.commit(workspace, facts)
    substrate.refuse_written(facts.id)
    runs = substrate.changed(empty_generation(volume.id), facts.id)
    assert blocks_of(runs) == {7}
    assert substrate.pool_volume.chunk_bytes > BLOCK_BYTES
    assert lvm.group(substrate.group.name).uuid == substrate.group.uuid
