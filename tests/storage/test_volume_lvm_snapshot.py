"""The lvm-snapshot substrate: the conformance suite. `make vm-test` runs it in a guest."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from agent.contract.errors import CommandFailed, DeviceBusy, LayoutUnsupported, NoSpace
from agent.contract.identity import BLOCK_BYTES, GenerationKind, empty_generation
from agent.contract.messages import Role
from agent.system.clock import wait_until
from agent.volume import lvm, mapper
from agent.volume.lvm_snapshot import LvmSnapshotSubstrate
from agent.volume.substrate import Substrate, Workspace, WorkspaceKind
from tests.storage.conformance import GROWN_BYTES, Bench, SubstrateConformance, block_of, content, facts_after, record, taken
from tests.storage.volume_groups import command, volume_group

pytestmark = pytest.mark.device_mapper


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with volume_group(tmp_path_factory.mktemp("disk")) as name:
        yield name


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come soon: nobody else is waited for longer than a passing look takes."""
    monkeypatch.setattr(mapper, "_GRACE_S", 1.0)


@pytest.fixture
def bench(group: str) -> Iterator[Bench]:
    yield Bench(
        lambda: LvmSnapshotSubstrate(group), f"from agent.volume.lvm_snapshot import *; substrate = LvmSnapshotSubstrate({group!r})"
    )
    survivor = LvmSnapshotSubstrate(group)
    survivor.recover()
    assert wait_until(lambda: not mapper._devices("LANDFALL-"), 30.0)
    for found in lvm.volumes(survivor.group):
        if not found.origin:  # an origin takes its snapshots with it
            subprocess.run(["lvremove", "-ff", "-y", f"{group}/{found.name}"], check=True, capture_output=True)


class TestLvmSnapshot(SubstrateConformance):
    CRASHES = (
        *(crash for crash in SubstrateConformance.CRASHES if crash[1] != "files.before_rename"),
        ("grow", "substrate.grow.journalled"),
        ("grow", "substrate.grow.detached"),
        ("grow", "substrate.grow.extended"),
        ("grow", "substrate.grow.rejoined"),
    )
    GROWS_IN_USE = False
    DISCARD = ("blkdiscard", "--zeroout")  # dm-snapshot's origin takes no discards, so nothing of a volume is ever unmapped but by zeros

    @pytest.mark.parametrize(("operation", "point"), CRASHES)
    def test_A11_a_crash_leaves_the_state_before_or_after(self, bench: Bench, tmp_path: Path, operation: str, point: str) -> None:
        super().test_A11_a_crash_leaves_the_state_before_or_after(bench, tmp_path, operation, point)

    def test_E21_sectors_of_4096_bytes(self, substrate: Substrate) -> None:
        with pytest.raises(LayoutUnsupported):
            substrate.create(record(sector_bytes=4096))

    def test_E20_what_the_disks_held_before_is_in_no_generation_of_a_volume_that_grew(self, group: str, substrate: Substrate) -> None:
        volume = record(Role.SECONDARY)
        substrate.create(volume)
        workspace = Workspace(volume.id, uuid4(), WorkspaceKind.LANDING)
        substrate.begin(workspace, empty_generation(volume.id))
        facts = facts_after(substrate, volume.id, GenerationKind.COMMITTED)
        substrate.commit(workspace, facts)
        command("lvcreate", "--yes", "--extents", "100%FREE", "--name", "others", group)
        with open(f"/dev/{group}/others", "r+b", buffering=0) as file:
            for at in range(0, 128 << 20, 1 << 20):
                os.pwrite(file.fileno(), b"\xa5" * (1 << 20), at)
            os.fsync(file.fileno())
        command("lvremove", "--yes", f"{group}/others")
        substrate.grow(volume.id, GROWN_BYTES)
        assert content(substrate, facts.id) == bytes(GROWN_BYTES)

    def test_E20_no_room_to_grow_is_said_and_the_volume_stays_as_it_was(self, group: str, substrate: Substrate) -> None:
        volume = record()
        substrate.create(volume)
        base = taken(substrate, volume.id, {1: block_of("base")}).id
        command("lvcreate", "--yes", "--extents", "100%FREE", "--name", "others", "--activate", "n", "--zero", "n", group)
        try:
            with pytest.raises(NoSpace, match="MiB are needed"):
                substrate.grow(volume.id, GROWN_BYTES)
        finally:
            command("lvremove", "--yes", f"{group}/others")
        assert substrate.volumes() == (volume,)
        assert content(substrate, base)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("base")

    def test_E20_snapshots_that_could_not_be_rejoined_are_given_to_nobody_until_they_are(
        self, group: str, substrate: Substrate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        volume = record()
        substrate.create(volume)
        base = taken(substrate, volume.id, {1: block_of("base")}).id

        def fails(*_: object) -> None:
            raise CommandFailed("lvconvert ended with status 5")

        with monkeypatch.context() as broken:
            broken.setattr(lvm, "rejoin", fails)
            with pytest.raises(CommandFailed):
                substrate.grow(volume.id, GROWN_BYTES)
            substrate.recover()
            assert substrate.generations(volume.id)[1].id == base
            for act in (
                lambda: content(substrate, base),
                lambda: substrate.operational(volume.id).__enter__(),
                lambda: substrate.take(volume.id, None, facts_after(substrate, volume.id)),
            ):
                with pytest.raises(DeviceBusy, match="made larger"):
                    act()
            with pytest.raises(DeviceBusy):
                substrate.grow(volume.id, GROWN_BYTES)
        substrate.recover()
        assert content(substrate, base)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("base")
        substrate.grow(volume.id, GROWN_BYTES)
        assert content(substrate, base)[BLOCK_BYTES:][:BLOCK_BYTES] == block_of("base")

    def leftovers(self, substrate: Substrate) -> list[str]:
        assert isinstance(substrate, LvmSnapshotSubstrate)
        return [volume.name for volume in substrate._held().meaningless]
